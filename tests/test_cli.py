import json
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

import pysparse_ticket as pst
from pysparse_ticket.checkpoint import load
from pysparse_ticket.cli import app


def run(*words, code=0):
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_info_names_every_backend_with_a_reason():
    out = run("info").output
    for name in ("reference", "cpu", "triton", "cuda"):
        assert f"backend {name}" in out
    assert pst.__version__ in out and "torch" in out


def test_find_writes_a_ticket_that_loads(tmp_path):
    out = run(
        "find", tmp_path / "t.safetensors", "--model", "resnet20", "--size", 8, "--remove", 2, "--score", "snip"
    ).output
    ticket = pst.Ticket.load(tmp_path / "t.safetensors")
    assert len(ticket.removed_blocks) == 2 and all(name in out for name in ticket.removed_blocks)


def test_compare_writes_everything(tmp_path):
    words = (
        "compare",
        "--model",
        "resnet20",
        "--size",
        8,
        "--epochs",
        1,
        "--seeds",
        1,
        "--remove",
        2,
        "--batch-size",
        512,
    )
    out = run(*words, "--runs", tmp_path, "--name", "r", "--country", "BRA").output
    arms = json.loads((tmp_path / "r" / "summary.json").read_text())
    names = ["dense", "layers grasp -2", "layers snip -2", "layers random -2", "filters grasp", "weights 90%"]
    assert [arm["name"] for arm in arms] == names
    for arm in arms:
        assert arm["macs"] > 0 and arm["peak_bytes"] > 0 and arm["train_seconds"] > 0 and arm["seeds"] == [0]
        assert 0 < arm["accuracy"]["mean"] < 1 and "std" in arm["accuracy"]
        assert (arm["joules"] is None) == arm["energy_method"].startswith("not measured")
        assert arm["name"] in out
    assert arms[0]["speedup"] == 1.0 and not arms[0]["plan"]
    # resnet20 at 8x8: one block is 4,718,592 / 16 MACs; 3 -> 1 input channels in the stem
    assert arms[1]["macs"] == arms[0]["macs"] - 2 * 4_718_592 // 16
    assert arms[5]["parameters"] == arms[0]["parameters"] - 270_608 + round(0.1 * 270_608)
    assert (tmp_path / "r" / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert "weights 90%" in (tmp_path / "r" / "table.md").read_text()
    facts = json.loads((tmp_path / "r" / "run.json").read_text())
    assert facts["torch"] and facts["settings"]["seeds"] == 1
    tickets = sorted(p.name for p in (tmp_path / "r").glob("*.ticket.safetensors"))
    assert len(tickets) == 5 and all(pst.Ticket.load(tmp_path / "r" / t).rewind for t in tickets)
    again = run(*words, "--runs", tmp_path, "--name", "r", "--country", "BRA")
    assert again.exit_code == 0
    resumed = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert [a["train_seconds"] for a in resumed] == [a["train_seconds"] for a in arms]


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path):
    words = ["--model", "resnet20", "--size", "8", "--epochs", "500", "--seeds", "1", "--remove", "1"]
    words = [sys.executable, "-m", "pysparse_ticket.cli", "compare", *words, "--runs", str(tmp_path), "--name", "r"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    checkpoint = tmp_path / "r" / "dense-seed0.checkpoint"
    before = None
    while process.poll() is None:  # until an epoch's checkpoint has replaced the first one
        stamp = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
        if before and stamp != before:
            break
        before = before or stamp
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 130 and "compare --name r and the same options" in " ".join(message.split()), message
    assert "Traceback" not in message and load(checkpoint)["step"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "vgg"], "resnet20"),
        (["--data", "imagenet"], "digits"),
        (["--data", "cifar10", "--root", "/nowhere"], "/nowhere"),
        (["--sparsity", "1.0"], "sparsity must lie in [0, 1)"),
        (["--remove", "10"], "cannot remove 10 blocks"),
        (["--epochs", "0"], "epochs"),
        (["--country", "XYZ"], "BRA"),
        (["--device", "cuda:9"], "cuda"),
    ],
    ids=lambda v: v[1] if isinstance(v, list) else "",
)
def test_bad_input_gets_one_sentence_and_code_2(tmp_path, words, message):
    words = ["compare", "--epochs", "1", "--seeds", "1", "--size", "8", "--runs", str(tmp_path), *words]
    result = run(*words, code=2)
    assert message in result.stderr and "Traceback" not in result.output + result.stderr


IMP = ("--method", "imp", "--model", "lenet-300-100", "--size", 8, "--epochs", 2, "--batch-size", 512, "--rounds", 2)


def test_find_imp_saves_the_last_ticket_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    import torch

    from pysparse_ticket import find

    words = (*IMP, "--rewind-step", 2)
    out = run("find", tmp_path / "t.safetensors", *words).output
    ticket = pst.Ticket.load(tmp_path / "t.safetensors")
    assert "36.00%" in out and round(ticket.sparsity, 3) == 0.36 and ticket.provenance["rewind_step"] == 2
    (levels,) = (tmp_path / "t-levels").iterdir()
    rows = [json.loads((levels / f"level-{i:02d}" / "result.json").read_text()) for i in range(3)]
    assert [round(row["sparsity"], 2) for row in rows] == [0, 0.2, 0.36] and all(0 < r["accuracy"] < 1 for r in rows)

    class Killed(RuntimeError):
        pass

    def killed(at):
        def train(*args, **options):
            done = options.pop("on_step")

            def on_step(progress):
                done(progress)
                calls.append(progress.step)
                if len(calls) in at:
                    raise Killed

            return original(*args, **options, on_step=on_step, checkpoint_every=1)

        return train

    original, calls = find.train, []
    with monkeypatch.context() as patch:  # at step 2 of level 0, after it, and in the middle of the levels 1 and 2
        patch.setattr(find, "train", killed({2, 5, 8, 11, 13}))
        while True:
            result = CliRunner().invoke(app, list(map(str, ("find", tmp_path / "again.safetensors", *words))))
            if result.exit_code == 0:
                break
            assert isinstance(result.exception, Killed), result.output + repr(result.exception)
    again = pst.Ticket.load(tmp_path / "again.safetensors")
    assert len(calls) > 13 and all(torch.equal(m, again.masks[n]) for n, m in ticket.masks.items())
    (other,) = (tmp_path / "again-levels").iterdir()
    for i in range(3):
        a, b = (load(folder / f"level-{i:02d}" / "trained.safetensors") for folder in (levels, other))
        assert a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "omp"], "unknown method 'omp'; known: at-init, imp"),
        ([*IMP, "--score", "snip"], "--score does not go with --method imp"),
        (["--rounds", "2"], "--rounds does not go with --method at-init"),
        ([*IMP, "--importance", "zscore"], "unknown importance 'zscore'"),
        ([*IMP, "--rate", "1.5"], "in (0, 1), not 1.5"),
        ([*IMP, "--rewind-step", "6"], "rewind_step 6 is not before the last of 6 steps"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_find_refuses_with_one_sentence_and_code_2(tmp_path, words, message):
    result = run("find", tmp_path / "t.safetensors", *words, code=2)
    assert message in result.stderr and not list(tmp_path.iterdir())
