"""The runner of make gpu-test and make gpu-bench: budgets, cut-offs, honest outcomes. No GPU."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch
from gpu import build_in_place, sanitize, stages
from gpu import tests as gpu_tests
from gpu.checks import LIMITS, relative_error
from gpu.stages import Stage, copy_out, run_stages
from torch import nn

from pysparse_ticket.nn import MaskedLinear


def python(code):
    return [sys.executable, "-c", code]


def run(stages, tmp_path, total=900.0):
    shown = []
    outcomes = run_stages(stages, tmp_path / "logs", total, shown.append)
    return {o.name: o for o in outcomes}, "\n".join(shown)


def test_a_failing_stage_stops_nothing_and_is_told(tmp_path):
    found, shown = run(
        [
            Stage("bad", python("print('first'); raise SystemExit('why it failed')"), 300),
            Stage("good", python("print('all is well')"), 300),
            Stage("not there", ["/no/such/program"], 20),
            Stage("no tool", python(""), 20, missing="the tool is not on this machine"),
            Stage("extra", python("raise SystemExit('of no matter')"), 300, optional=True),
        ],
        tmp_path,
    )
    assert [(o.verdict, o.fine) for o in found.values()] == [
        ("failed", False),
        ("ok", True),
        ("not run", False),
        ("not run", False),
        ("failed", True),
    ]
    table = shown.rpartition("\n\n")[2].splitlines()
    assert [line.split()[0] for line in table] == ["bad", "good", "not", "no", "extra"]
    assert "why it failed" in table[0] and "all is well" in table[1] and "the tool is not" in table[3]
    assert (tmp_path / "logs" / "bad.log").read_text() == "first\nwhy it failed\n"


def test_a_stage_that_hangs_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "SHORTEST", 0.0)
    monkeypatch.setattr(stages, "GRACE", 0.5)
    born = tmp_path / "pid"
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"open({str(born)!r}, 'w').write(str(child.pid)); print('stored', flush=True); time.sleep(600)"
    )
    hang = Stage("hang", python(code), 3)
    found, _ = run([hang, Stage("next", python("print(1)"), 300)], tmp_path)
    assert found["hang"].verdict == "cut off" and not found["hang"].fine and found["next"].fine
    if not born.exists():
        pytest.skip("the machine took longer than the stage to start it")
    state = Path("/proc", born.read_text(), "stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_time_is_kept_for_what_comes_later(tmp_path, monkeypatch):
    asked = {}

    def fake(stage, left, log, show):
        asked[stage.name] = left
        return stages.Outcome(stage.name, "ok", 0.0, "", True)

    monkeypatch.setattr(stages, "_run", fake)
    run([Stage("a", [], 500, reserve=30), Stage("b", [], 10), Stage("c", [], 500)], tmp_path, total=100)
    assert asked == pytest.approx({"a": 70, "b": 10, "c": 100}, abs=1)


def test_what_has_no_time_left_is_not_started(tmp_path):
    found, _ = run([Stage("a", python("print(1)"), 20), Stage("b", python(""), 9, optional=True)], tmp_path, total=0.0)
    assert [(o.verdict, o.fine) for o in found.values()] == [("not run", False), ("not run", True)]


def test_only_what_is_begun_is_announced(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "_run", lambda stage, *_: stages.Outcome(stage.name, "ok", 0.0, "", True))
    begun, ended = [], []
    found = [Stage("a", [], 9), Stage("b", [], 1), Stage("c", [], 9, missing="no tool"), Stage("d", [], 9, reserve=50)]
    call = {"before": lambda stage: begun.append(stage.name), "after": lambda outcome: ended.append(outcome.name)}
    run_stages(found, tmp_path / "logs", 52.0, lambda _: None, **call)
    assert begun == ["a"] and ended == ["a", "b", "c", "d"]


def test_results_are_copied(tmp_path):
    (tmp_path / "a" / "gpu").mkdir(parents=True)
    (tmp_path / "a" / "gpu" / "gpu.csv").write_text("rows")
    copy_out(tmp_path / "a", str(tmp_path / "out"))
    copy_out(tmp_path / "a", None)
    assert (tmp_path / "out" / "gpu" / "gpu.csv").read_text() == "rows"


def test_the_gpu_tests_fit_their_budget(monkeypatch):
    monkeypatch.setattr(gpu_tests, "find_sanitizer", lambda: "/usr/bin/compute-sanitizer")
    names = [stage.name for stage in gpu_tests.stages()]
    assert names == ["build", "gpu tests", "memcheck", "racecheck", "cpu tests"]
    # were all to hang, each of the first four would still have its turn
    left = stages.TOTAL
    for stage in gpu_tests.stages()[:4]:
        turn = min(stage.seconds, left - stage.reserve)
        assert turn >= 60, stage.name
        left -= turn + 2 * stages.GRACE
    monkeypatch.setattr(gpu_tests, "find_sanitizer", lambda: None)
    assert gpu_tests.stages()[2].missing == "compute-sanitizer is not on this machine"


def test_the_sanitizer_is_found_where_cuda_keeps_it(monkeypatch, tmp_path):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_tests, "SANITIZERS", ())
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_tests.find_sanitizer() == str(tool)
    monkeypatch.delenv("CUDA_HOME")
    assert gpu_tests.find_sanitizer() is None


def test_the_marked_tests_are_collected():
    """The words of the stage, asked only to collect: a wrong option or marker would end it before any test."""
    import subprocess

    words = gpu_tests.pytest_words("-m", "gpu", "--collect-only", "tests/test_filter_sparse_conv2d.py")
    env = stages.environment({"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    done = subprocess.run(words, cwd=stages.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_equals_the_masked_convolution[cuda-" in done.stdout and "[cpu-" not in done.stdout


def test_the_kernels_are_linked_once(tmp_path, monkeypatch):
    (tmp_path / "pysparse_ticket").mkdir()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    monkeypatch.setattr(build_in_place, "ROOT", tmp_path)
    for _ in range(2):
        build_in_place.link_kernels()
    assert (tmp_path / "pysparse_ticket" / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("old", [False, True], ids=["setuptools", "old setuptools"])
def test_a_build_that_pyproject_stops_is_tried_apart(old, tmp_path, monkeypatch):
    for name in ("pysparse_ticket", "kernels", "csrc"):
        (tmp_path / name).mkdir()
    fail = "if (pathlib.Path.cwd() / 'pyproject.toml').exists(): raise SystemExit('license must be a table')\n"
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "setup.py").write_text(
        "import pathlib, sys\n" + (fail if old else "") + "pathlib.Path('pysparse_ticket/_C.abi3.so').touch()\n"
    )
    monkeypatch.setattr(build_in_place, "ROOT", tmp_path)
    (tmp_path / "pysparse_ticket" / "backends.py").write_text("def summary():\n    return []\n")
    with pytest.raises(SystemExit) as end:
        build_in_place.main()
    assert end.value.code == 0 and (tmp_path / "pysparse_ticket" / "_C.abi3.so").exists()


def test_the_small_cases_cover_every_format():
    torch.manual_seed(0)
    names = [name for name, _, _ in sanitize.modules("cpu")]
    for fmt in MaskedLinear.FORMATS:
        assert any(f"MaskedLinear 37x70x53, blocks of 32 in {fmt}" in name for name in names) or fmt not in (
            "packed",
            "dense",
        )
    assert sum("FilterSparseConv2d" in name for name in names) >= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_small_case_is_right_or_stops(dtype):
    torch.manual_seed(0)
    x = torch.randn(37, 70)
    masked = MaskedLinear.from_dense(nn.Linear(70, 53), torch.rand(53, 70) < 0.1)
    assert sanitize.check("linear", masked, x, dtype) < LIMITS[dtype]
    masked.forward = lambda x: MaskedLinear.forward(masked, x) * 1.1
    with pytest.raises(SystemExit, match=r"linear, torch\..*: wrong by"):
        sanitize.check("linear", masked, x, dtype)
    assert sanitize.check_fused_norm((2, 6, 5), 4, 2, dtype, "cpu") < LIMITS[dtype]


def test_relative_error_of_nan_and_of_another_shape_is_infinite():
    a = torch.ones(4)
    assert relative_error(a * 1.5, a) == pytest.approx(0.5) and relative_error(a, a) == 0
    assert relative_error(a[:3], a) == relative_error(a * float("nan"), a) == float("inf")


def test_the_checkout_leads_on_the_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert stages.environment({"A": "b"})["PYTHONPATH"].split(os.pathsep)[0] == str(stages.ROOT)
    assert stages.environment({"A": "b"})["A"] == "b"


def test_without_a_gpu_nothing_is_called_tested(monkeypatch):
    monkeypatch.setattr(gpu_tests, "gpu_name", lambda: "cpu")
    with pytest.raises(SystemExit, match="torch sees no CUDA GPU; the tests of a CPU are make test"):
        gpu_tests.main()


@pytest.mark.parametrize("gpu", [True, False])
def test_tests_of_triton_kernels_are_the_gpus_where_there_is_one(gpu, monkeypatch):
    marks = {}

    def item(*fixtures):
        return SimpleNamespace(fixturenames=fixtures, add_marker=lambda mark: marks.setdefault(fixtures, mark.name))

    monkeypatch.setattr(conftest, "gpu_is_there", lambda: gpu)
    conftest.pytest_collection_modifyitems([item("gpu_or_interpreter", "poison"), item("poison")])
    assert marks == ({("gpu_or_interpreter", "poison"): "gpu"} if gpu else {})
