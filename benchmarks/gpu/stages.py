"""Commands one after the other within a budget of seconds: each has what is left, none stops the next."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOTAL = 570.0  # seconds, of a limit of ten minutes
GRACE = 5.0  # seconds between the request to end and the end
SHORTEST = 3.0  # seconds under which a stage is not started
TAIL = 40  # lines shown of a stage that failed


@dataclass
class Stage:
    """A command that may take ``seconds`` at most, so that ``reserve`` is left for the stages behind it.

    What becomes of an ``optional`` one is told and does not count. Where ``missing`` gives a reason the command is not
    run, and that is a failure.
    """

    name: str
    command: Sequence[str]
    seconds: float
    reserve: float = 0.0
    optional: bool = False
    missing: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """How a stage ended: ok, failed, cut off or not run, and the last line that it printed."""

    name: str
    verdict: str
    seconds: float
    last: str
    fine: bool


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's, with the checkout first on Python's path."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "PYTHONUNBUFFERED": "1",
        **extra,
    }


def gpu_name() -> str:
    """By a process of its own: this one holds no memory of the GPU, and an extension that is not built is no matter."""
    code = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else 'cpu')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    return found.stdout.strip() or "unknown"


def run_stages(
    stages: Sequence[Stage],
    logs: Path,
    total: float = TOTAL,
    show: Callable[[str], object] = print,
    *,
    before: Callable[[Stage], object] = lambda stage: None,
    after: Callable[[Outcome], object] = lambda outcome: None,
) -> list[Outcome]:
    """Runs them in their order and shows a table of their outcomes last; each one's output is in ``logs``.

    ``before`` is called with each stage that is begun, ``after`` with each outcome.
    """
    logs.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + total
    outcomes = []
    for stage in stages:
        left = min(stage.seconds, end - time.monotonic() - stage.reserve)
        show(f"== {stage.name} (at most {max(left, 0):.0f} s)")
        if not stage.missing and left >= SHORTEST:
            before(stage)
        outcome = _run(stage, left, logs / f"{stage.name.replace(' ', '-')}.log", show)
        outcomes.append(outcome)
        after(outcome)
        show(f"   {outcome.verdict} after {outcome.seconds:.0f} s: {outcome.last}")
    width = max(len(o.name) for o in outcomes)
    show("\n" + "\n".join(f"{o.name:<{width}}  {o.verdict:<8}  {o.seconds:5.0f} s  {o.last}" for o in outcomes))
    return outcomes


def _run(stage: Stage, left: float, log: Path, show: Callable[[str], object]) -> Outcome:
    if stage.missing:
        return Outcome(stage.name, "not run", 0.0, stage.missing, False)
    if left < SHORTEST:
        return Outcome(stage.name, "not run", 0.0, "no time was left", stage.optional)
    start = time.monotonic()
    with log.open("w") as file:
        try:
            child = subprocess.Popen(
                list(stage.command),
                cwd=ROOT,
                env=environment(stage.env),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(stage.name, "not run", 0.0, str(error), False)
        try:
            code, cut = child.wait(left), False
        except subprocess.TimeoutExpired:
            code, cut = _end(child), True
        except BaseException:
            _end(child)
            raise
    seconds = time.monotonic() - start
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    verdict = "cut off" if cut else "ok" if code == 0 else "failed"
    if verdict == "failed" or (cut and not stage.optional):
        show("\n".join(lines[-TAIL:]))
    last = (lines[-1] if lines else "no output")[:160]
    last += " (does not count)" if stage.optional and verdict != "ok" else ""
    return Outcome(stage.name, verdict, seconds, last, verdict == "ok" or stage.optional)


def _end(child: subprocess.Popen) -> int:
    """Ends the command and all that it started; a stage that stores its results as they come loses none of them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
            return child.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break
    return child.wait()


def copy_out(found: Path, out: str | None) -> None:
    """Copies a folder's files to the folder ``out`` where one is given."""
    if not out:
        return
    for path in sorted(found.rglob("*")):
        if path.is_file():
            target = Path(out) / path.relative_to(found)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
