"""Rows of a GPU's figures: their CSV file, and the Markdown tables made of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from csv_rows import measured_on, read_rows, write_rows

from gpu.goals import GOALS
from pysparse_ticket.files import write_whole
from pysparse_ticket.report import machine, machine_line, markdown_table
from pysparse_ticket.report.machine import revision

NAME = "gpu"  # of the two files
HEADER = """# GPU benchmarks

Made by `make gpu-bench` from `gpu.csv`, which has every row. A ratio is the best dense torch's figure over ours, both
of one process and interleaved, medians, after the results were compared. Above 1 we take less. In brackets is the goal,
where one was set. "not there" and "not measured" say why.

- forward: without gradients. dX, dW: that gradient alone. step: forward with all gradients; of a model also loss and
  optimizer.
- graph: replays of CUDA graphs, each after L2 was overwritten. eager: calls in a row, as in a training loop.
- error: the largest relative error of output and gradients against the same layer in fp32 (bf16 rows) or fp64.
- spread: 20th to 80th percentile of ours, as a share of its median.
- J: joules a training step, of the board's total-energy counter; net of the idle power where it says so.
- sparsity: share of the weights removed; of a layer ticket of the blocks, of a filter ticket of the multiply-adds.
"""


@dataclass(frozen=True)
class Row:
    """One figure of ours and the best dense one's; None was not measured, and ``note`` says why."""

    work: str
    shape: str
    arm: str
    sparsity: float
    what: str
    unit: str  # ms, J, MB, GB/s or TFLOP/s
    ours: float | None
    best: float | None = None
    rival: str = ""
    spread: float | None = None
    error: float | None = None
    how: str = ""
    note: str = ""
    revision: str = ""
    machine: str = ""

    @property
    def ratio(self) -> float | None:
        return self.best / self.ours if self.best and self.ours else None

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        return self.work, self.shape, self.arm, f"{self.sparsity:.4g}", self.what

    @property
    def goal(self) -> float | None:
        key = (self.work, self.shape, self.arm, self.what)
        return next((goal for (*k, s), goal in GOALS.items() if (*k,) == key and abs(s - self.sparsity) < 0.02), None)


def to_csv(rows: Iterable[Row]) -> str:
    """All rows with their ratios and goals; an empty cell was not measured."""
    return write_rows(Row, rows, ("ratio", "goal"))


def from_csv(text: str) -> list[Row]:
    """Raises ValueError for a file of other columns."""
    return read_rows(Row, text, "make gpu-bench")


def to_markdown(rows: Sequence[Row]) -> str:
    works = list(dict.fromkeys(row.work for row in rows))
    parts = [HEADER, "Measured on\n", measured_on(rows)]
    for work in works:
        own = [row for row in rows if row.work == work]
        parts += [f"## {work}\n", ratio_table(own), value_table(own)]
    return "\n".join(part for part in parts if part)


def ratio_table(rows: Sequence[Row]) -> str:
    """Ratios by sparsity; empty where there is nothing to compare."""
    sparsities = sorted({row.sparsity for row in rows if row.ratio})
    lines: dict[tuple[str, str, str], dict[float, str]] = {}
    for row in rows:
        if row.ratio:
            goal = f" ({row.goal:g})" if row.goal else ""
            what = row.what if row.unit == "ms" else f"{row.what}, {row.unit}"
            lines.setdefault((row.shape, row.arm, what), {})[row.sparsity] = f"{row.ratio:.2f}{goal}"
    if not lines:
        return ""
    header = ["shape", "arm", "pass", *(f"{100 * s:.4g}%" for s in sparsities)]
    return markdown_table(header, [[*key, *(cells.get(s, "-") for s in sparsities)] for key, cells in lines.items()])


def value_table(rows: Sequence[Row]) -> str:
    header = ["shape", "arm", "sparsity", "pass", "unit", "ours", "dense", "rival", "spread", "error", "how", "note"]

    def number(value: float | None, spec: str) -> str:
        return "not measured" if value is None else format(value, spec)

    body = [
        [
            row.shape,
            row.arm,
            f"{100 * row.sparsity:.4g}%",
            row.what,
            row.unit,
            number(row.ours, ".4g"),
            number(row.best, ".4g") if row.rival else "-",
            row.rival or "-",
            "-" if row.spread is None else f"{row.spread:.0%}",
            "-" if row.error is None else f"{row.error:.0e}",
            row.how or "-",
            row.note.replace("|", "/") or "-",
        ]
        for row in rows
    ]
    return markdown_table(header, body)


def folder_of_gpu(name: str) -> str:
    """A folder's name for a GPU's: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def facts() -> dict[str, str]:
    """The revision and the machine's line. A copy without its history is told its revision by REVISION."""
    found = machine()
    found["revision"] = os.environ.get("REVISION") or revision() or "unknown"
    return {"revision": str(found["revision"]), "machine": machine_line(found)}


def results_folder(root: Path) -> Path:
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return root / "benchmarks" / "results" / folder_of_gpu(gpu)


def store(folder: Path, new: Sequence[Row]) -> None:
    """Puts the rows into ``gpu.csv`` of the folder, in the place of older ones of the same figure, and makes ``gpu.md``
    of the whole."""
    path = folder / f"{NAME}.csv"
    rows = {row.key: row for row in [*(from_csv(path.read_text()) if path.exists() else []), *new]}
    _write(folder, list(rows.values()))


def forget(folder: Path, work: str) -> None:
    """Takes a work's rows out: an arm that is no more must not stay among new ones."""
    path = folder / f"{NAME}.csv"
    if path.exists():
        _write(folder, [row for row in from_csv(path.read_text()) if row.work != work])


def _write(folder: Path, rows: Sequence[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{NAME}.csv", to_csv(rows).encode())
    write_whole(folder / f"{NAME}.md", to_markdown(rows).encode())
