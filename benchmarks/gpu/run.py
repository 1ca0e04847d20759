"""The benchmarks of a GPU, most important first, each for what is left of the budget; rows are stored as they come.

    make gpu-bench           or, of some stages, make gpu-bench STAGES="models resnet50"

Ends within BUDGET seconds (570). Results go to benchmarks/results/<gpu>/gpu.csv and gpu.md and, where OUT is set, to
that folder too, with the stages' logs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gpu.record import folder_of_gpu, forget
from gpu.stages import ROOT, TOTAL, Stage, copy_out, gpu_name, run_stages

# name, module and its words, seconds
PLAN = (
    ("ceilings", ("gpu.ceilings",), 40),
    ("block 64", ("gpu.block_matmul", "--only", "block 64."), 75),
    ("model resnet56", ("gpu.models", "resnet56"), 150),
    ("unstructured", ("gpu.unstructured",), 60),
    ("filter conv", ("gpu.filter_conv",), 50),
    ("filter norm", ("gpu.filter_norm",), 40),
    ("block conv", ("gpu.block_conv",), 50),
    ("block 128", ("gpu.block_matmul", "--only", "block 128."), 40),
    ("block 32", ("gpu.block_matmul", "--only", "block 32."), 40),
    ("model resnet50", ("gpu.models", "resnet50"), 150),
    ("blocks of others", ("gpu.block_matmul", "--only", "others"), 40),
    ("model vit", ("gpu.models", "vit"), 90),
    ("model resnet20", ("gpu.models", "resnet20", "--no-compile"), 60),
)
MARGIN = 5.0  # seconds of a stage in which no new group of arms is begun


def works(module: str, words: Sequence[str]) -> str:
    """The work whose rows a stage makes."""
    return f"model {words[0]}" if module == "gpu.models" else module.removeprefix("gpu.")


def plan(names: Sequence[str], folder: Path, options: Sequence[str] = ()) -> list[Stage]:
    """The stages asked for by words of their names, all of them by default; SystemExit for a word of none."""
    for name in names:
        if not any(name in known for known, *_ in PLAN):
            raise SystemExit(f"unknown stage {name!r}; known: {', '.join(known for known, *_ in PLAN)}")
    chosen = [one for one in PLAN if not names or any(name in one[0] for name in names)]
    stages = [Stage("build", [sys.executable, "-m", "gpu.build_in_place"], 160)]
    for name, (module, *words), seconds in chosen:
        limit = ["--limit", str(seconds - MARGIN), "--store", str(folder), *options]
        stages.append(Stage(name, [sys.executable, "-m", module, *words, *limit], seconds))
    return stages


def main(argv: Sequence[str] | None = None) -> None:
    names = list(sys.argv[1:] if argv is None else argv)
    name = gpu_name()
    if name == "cpu":
        raise SystemExit("torch sees no CUDA GPU; the benchmarks of a CPU are make bench")
    folder = ROOT / "benchmarks" / "results" / folder_of_gpu(name)
    logs, out = ROOT / "build" / "gpu-bench", os.environ.get("OUT")
    stages = plan(names, folder)
    forgotten: set[str] = set()

    def before(stage: Stage) -> None:
        """A work's old rows go when its first stage begins, not before: what is never reached stays as it was."""
        entry = next((one for one in PLAN if one[0] == stage.name), None)
        if entry and (work := works(entry[1][0], entry[1][1:])) not in forgotten:
            forgotten.add(work)
            if not names:
                forget(folder, work)

    def after(_) -> None:
        copy_out(folder, out and str(Path(out) / folder.name))
        if out:
            text = "\n".join(f"== {log.stem}\n{log.read_text(errors='replace')}" for log in sorted(logs.glob("*.log")))
            (Path(out) / "log.txt").write_text(text)

    for log in logs.glob("*.log"):
        log.unlink()
    outcomes = run_stages(stages, logs, float(os.environ.get("BUDGET", TOTAL)), before=before, after=after)
    raise SystemExit(0 if all(o.fine for o in outcomes) else 1)


if __name__ == "__main__":
    main()
