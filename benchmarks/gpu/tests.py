"""All tests on the GPU, compute-sanitizer over small shapes, and with the time that is left the tests of the CPU.

    make gpu-test

The latter do not count: they are CI's, against the pinned versions. Ends within BUDGET seconds (570), whatever hangs.
Logs go to the folder OUT, by default build/gpu-test.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from gpu.stages import ROOT, TOTAL, Stage, gpu_name, run_stages

SANITIZERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
FLAWS = "86"  # the exit status of a sanitizer that found something


def pytest_words(*words: str) -> list[str]:
    """Without whatever plugins the machine has, whose own warnings would be errors here; a hanging test ends all."""
    timeout = ["-p", "pytest_timeout", "--timeout=120", "--timeout-method=thread"]
    known = timeout if importlib.util.find_spec("pytest_timeout") else []
    # a dependency's deprecations on an unknown machine are no failures of ours
    own = ["-o", "addopts=", "-p", "no:cacheprovider", "-q", "-rfE", "--tb=short", "-W", "default"]
    return [sys.executable, "-m", "pytest", *own, *known, *words]


def find_sanitizer() -> str | None:
    beside = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *beside, *SANITIZERS]))


def stages() -> list[Stage]:
    quiet = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    checker = find_sanitizer()
    missing = None if checker else "compute-sanitizer is not on this machine"
    sanitized = [sys.executable, "-m", "gpu.sanitize", "--device", "cuda"]

    def sanitizer(tool: str, reserve: float) -> Stage:
        words = [checker or "", "--tool", tool, "--error-exitcode", FLAWS, "--print-limit", "20", *sanitized]
        # without the caching allocator a buffer ends where its allocation ends
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
        return Stage(tool, words, 110, reserve=reserve, missing=missing, env=env)

    spread = ["-p", "xdist", "-n", "8", "--dist", "loadfile"] if importlib.util.find_spec("xdist") else []
    # as on a machine without a GPU, where the Triton kernels are interpreted
    threads = {"CUDA_VISIBLE_DEVICES": "", **({"OMP_NUM_THREADS": "2"} if spread else {})}
    return [
        Stage("build", [sys.executable, "-m", "gpu.build_in_place"], 160),
        Stage("gpu tests", pytest_words("-m", "gpu", "tests"), 300, reserve=170, env=quiet),
        sanitizer("memcheck", 75),
        sanitizer("racecheck", 0),
        Stage(
            "cpu tests",
            pytest_words(*spread, "--maxfail", "20", "-m", "not gpu", "tests"),
            300,
            optional=True,
            env=quiet | threads,
        ),
    ]


def main() -> None:
    if gpu_name() == "cpu":  # every test would be skipped, and nothing be wrong
        raise SystemExit("torch sees no CUDA GPU; the tests of a CPU are make test")
    logs = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-test")
    outcomes = run_stages(stages(), logs, float(os.environ.get("BUDGET", TOTAL)))
    raise SystemExit(0 if all(o.fine for o in outcomes) else 1)


if __name__ == "__main__":
    main()
