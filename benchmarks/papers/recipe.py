"""What every recipe shares: its settings, its command line, the results that it keeps, and the table that it prints."""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from trainings import Runs

from pysparse_ticket.files import write_whole
from pysparse_ticket.report import machine, machine_line, markdown_table
from pysparse_ticket.train import Interrupted, TrainConfig

Given = float | tuple[float, float]  # a figure of a paper, or its mean and standard deviation


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a recipe runs; ``--quick`` replaces data, network size, length of training, plan and seeds alone.

    load, subset  options of the data's loader; how many training and test images, None for all
    width         channels of the network's first stage, None for the network's own
    rewind_step   the step that tickets are rewound to
    rounds        levels of 20% that are trained; a round from level 5 to 10 removes what five of 20% would
    plan          how sparse layers run, as ``pst.sparsify`` takes it; "auto" races, which takes small runs' most time
    threads       torch's threads on the CPU, None as they are
    """

    data: str
    network: str
    train: TrainConfig
    seeds: int = 3
    load: Mapping[str, int] = field(default_factory=dict)
    subset: tuple[int, int] | None = None
    width: int | None = None
    rewind_step: int = 0
    rounds: tuple[int, ...] = ()
    plan: str = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class Recipe:
    """One table of a paper.

    paper    {row: {column: the paper's figure}}: data of the paper, never ours
    full     {part: settings of the paper}; a table of one part calls it ""
    quick    the same parts, small and on embedded data
    measure  (runs of a part, part, seed) -> (row, column, our figure) one after the other
    form     how a figure is written
    """

    name: str
    title: str
    paper: Mapping[str, Mapping[str, Given]]
    full: Mapping[str, Settings]
    quick: Mapping[str, Settings]
    measure: Callable[[Runs, str, int], Iterator[tuple[str, str, float]]]
    form: str = "{:.2f}"


def percent_gone(level: int) -> float:
    """Sparsity in % after so many rounds of 20% of what is left, to two decimals as the papers print it."""
    return round(100 * (1 - 0.8**level), 2)


def shortened(config: TrainConfig, epochs: int, batch_size: int = 64) -> TrainConfig:
    """The same schedule in fewer epochs: milestones and warm-up keep their share of the training."""
    share = epochs / config.epochs
    marks = sorted({round(mark * share) for mark in config.milestones} - {0, epochs})
    warmup = config.warmup_epochs * share
    return replace(config, epochs=epochs, batch_size=batch_size, milestones=tuple(marks), warmup_epochs=warmup)


def main(recipe: Recipe, words: list[str] | None = None) -> dict:
    """Run a recipe from the command line, print its table and return what results.json holds."""
    parser = argparse.ArgumentParser(description=f"{recipe.title}. Called again, an interrupted run goes on.")
    parser.add_argument("--quick", action="store_true", help="small networks on embedded data, in a minute or two")
    parser.add_argument("--data-root", metavar="DIR", help="the folder that holds the paper's data sets")
    parser.add_argument("--out", type=Path, default=Path("runs/papers"), help="where runs and results are kept")
    parser.add_argument("--part", choices=[*recipe.full], action="append", help="only these parts of the table")
    parser.add_argument("--seeds", type=int, help="how many, in place of the recipe's")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(words)
    if not args.quick and args.data_root is None:
        parser.error("the paper's data lie in a folder of yours: pass --data-root DIR, or --quick for embedded data")
    parts = {}
    try:
        for part, settings in (recipe.quick if args.quick else recipe.full).items():
            config = replace(settings.train, device=args.device)
            parts[part] = replace(settings, train=config, seeds=args.seeds or settings.seeds)
        facts = {part: asdict(settings) | {"seeds": None} for part, settings in parts.items()}  # more seeds go on
        blob = json.dumps(facts, sort_keys=True)
        mode = "quick" if args.quick else "full"
        folder = args.out / f"{recipe.name}-{mode}-{hashlib.sha256(blob.encode()).hexdigest()[:8]}"
        return run(recipe, parts, folder, args.data_root, args.part)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(130) from None


def run(
    recipe: Recipe, parts: Mapping[str, Settings], folder: Path, root: str | None = None, only: Sequence[str] = ()
) -> dict:
    """Measure every part, or ``only`` some, at every seed; results.json in ``folder`` is rewritten after each figure,
    table.md at the end."""
    ours: dict[tuple[str, str], dict[int, float]] = {}
    if (path := folder / "results.json").exists():  # figures of parts that are not asked for now stay
        for cell in json.loads(path.read_text())["cells"]:
            ours[cell["row"], cell["column"]] = {int(seed): value for seed, value in cell["ours"].items()}
    facts = {"recipe": recipe.name, "title": recipe.title, "settings": {p: asdict(s) for p, s in parts.items()}}

    def store() -> dict:
        results = facts | {"machine": machine(), "cells": cells(recipe, ours)}
        write_whole(path, json.dumps(results, indent=1).encode())
        return results

    wanted = [part for part in parts if not only or part in only]
    for part in wanted:
        settings = parts[part]
        if settings.threads:
            torch.set_num_threads(settings.threads)
        runs = Runs(parts, part, folder, root)
        try:
            _ = runs.data
        except (FileNotFoundError, ImportError) as error:
            if len(wanted) == 1:
                raise
            print(f"part {part} is not run: {error}", file=sys.stderr)
            continue
        for seed in range(settings.seeds):
            for row, column, value in recipe.measure(runs, part, seed):
                ours.setdefault((row, column), {})[seed] = value
                store()
                print(f"{row}, {column}, seed {seed}: {recipe.form.format(value)}", file=sys.stderr, flush=True)
    results = store()
    text = table(recipe, results["cells"]) + f"\n{recipe.title}. {machine_line(results['machine'])}.\n"
    write_whole(folder / "table.md", text.encode())
    print(text)
    return results


def cells(recipe: Recipe, ours: Mapping[tuple[str, str], Mapping[int, float]]) -> list[dict]:
    """Every cell of the paper's table and of ours: ``paper`` is the paper's figure or None, ``ours`` {seed: value}."""
    given = {(row, column): value for row, line in recipe.paper.items() for column, value in line.items()}
    return [
        {"row": row, "column": column, "paper": given.get((row, column)), "ours": ours.get((row, column), {})}
        for row, column in dict.fromkeys([*given, *ours])
    ]


def table(recipe: Recipe, cells: list[dict]) -> str:
    """The paper's figure and ours side by side; a figure that nobody measured reads "not given" or "not run"."""
    found = {(cell["row"], cell["column"]): cell for cell in cells}
    rows, columns = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))

    def written(value: Given | None, otherwise: str) -> str:
        if value is None:
            return otherwise
        mean, *spread = value if isinstance(value, tuple | list) else (value,)
        return " ± ".join([recipe.form.format(mean), *(f"{deviation:.2f}" for deviation in spread)])

    def both(row: str, column: str) -> list[str]:
        cell = found.get((row, column))
        if cell is None:
            return ["", ""]
        values = list(cell["ours"].values())
        spread = [statistics.stdev(values)] if len(values) > 1 else []
        mine = (statistics.fmean(values), *spread) if values else None
        return [written(cell["paper"], "not given"), written(mine, "not run")]

    header = [name for column in columns for name in (f"{column}, paper", "ours")]
    return markdown_table(["", *header], [[row, *(text for c in columns for text in both(row, c))] for row in rows])
