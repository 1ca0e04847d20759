"""Rows of measured speed-ups: their CSV file, and the Markdown tables made of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from csv_rows import measured_on, read_rows, write_rows

from pysparse_ticket.files import write_whole
from pysparse_ticket.planner import SLOWER_AT_MOST
from pysparse_ticket.report import markdown_table

HEADER = """# CPU benchmarks

Made by `make bench` from `cpu.csv`, which has every row. A figure is the median time of the fastest dense torch over
ours, both of one process and interleaved, after the results were compared. Dense torch is contiguous, channels_last
(convolutions) or compiled by torch.compile (inductor); "rival" says which was fastest. Threads, versions, revision and
date of each work are below.

- forward: without gradients. dX, dW: that gradient alone, by autograd through a graph that was kept. step: forward with
  all gradients; of a network also loss and optimizer.
- alone: ordinary tensors in and out, so packing counts. chain: between two of our layers, tiles in and out.
- break-even: where the line through the logarithms of the two neighbouring figures crosses 1, no figure of its own.
- GF: of the surviving weights' multiply-adds, two operations each. share: of the multiply-add peak of all threads in
  registers, measured in the same run; "dense share" is the rival's, with all weights.
- bf16: dense under autocast to bf16 over ours under autocast to bf16, steps only. Tiles stay in fp32 under autocast.
  Networks' rivals in bf16 are eager. Where bf16 is slower than fp32 on the machine, the fp32 figure is the one to read.
- spread: 20th to 80th percentile of ours, as a share of its median.
"""


@dataclass(frozen=True)
class Row:
    """One pass of one arm against the fastest dense. Times are medians in ms, GF billions of operations a second."""

    work: str
    shape: str
    arm: str
    sparsity: float
    passes: str  # forward, dX, dW or step
    rival: str
    rival_ms: float
    ours_ms: float
    gf: float
    share: float
    rival_share: float
    spread: float
    bf16_rival_ms: float | None
    bf16_ours_ms: float | None
    revision: str
    machine: str

    @property
    def speedup(self) -> float:
        return self.rival_ms / self.ours_ms

    @property
    def bf16_speedup(self) -> float | None:
        return self.bf16_rival_ms / self.bf16_ours_ms if self.bf16_rival_ms and self.bf16_ours_ms else None


def to_csv(rows: Iterable[Row]) -> str:
    """All rows with their speed-ups; an empty cell was not measured."""
    return write_rows(Row, rows, ("speedup", "bf16_speedup"))


def from_csv(text: str) -> list[Row]:
    """Raises ValueError for a file of other columns."""
    return read_rows(Row, text, "make bench")


def merge(old: Iterable[Row], new: Sequence[Row]) -> list[Row]:
    """The old rows of other works and the new ones, in the order of the works' names."""
    works = {row.work for row in new}
    return sorted([*(row for row in old if row.work not in works), *new], key=lambda row: row.work)


def store(folder: Path, new: Sequence[Row]) -> None:
    """Replaces the new rows' works in ``cpu.csv`` of the folder and makes ``cpu.md`` of the whole."""
    path = folder / "cpu.csv"
    rows = merge(from_csv(path.read_text()) if path.exists() else [], new)
    write_whole(path, to_csv(rows).encode())
    write_whole(folder / "cpu.md", to_markdown(rows).encode())


def break_even(points: Sequence[tuple[float, float]]) -> str:
    """The sparsity from which on the speed-ups ``(sparsity, speed-up)`` are above 1.

    Between the last point below 1 and the next one, where a line through (sparsity, log speed-up) crosses 0. Beyond
    the points only a bound is known. ValueError for no points.
    """
    points = sorted(points)
    if not points:
        raise ValueError("a break-even needs at least one speed-up")
    below = [i for i, (_, speedup) in enumerate(points) if speedup < 1]
    if not below:
        return f"below {points[0][0]:.0%}"
    if below[-1] == len(points) - 1:
        return f"above {points[-1][0]:.0%}"
    (s0, r0), (s1, r1) = points[below[-1] : below[-1] + 2]
    return f"{s0 - (s1 - s0) * math.log(r0) / (math.log(r1) - math.log(r0)):.0%}"


def to_markdown(rows: Sequence[Row]) -> str:
    """The header, who measured what, and for each work two tables: speed-ups by sparsity, and the steps' figures."""
    works = list(dict.fromkeys(row.work for row in rows))
    parts = [HEADER, "## Measured on\n", measured_on(rows)]
    for work in works:
        own = [row for row in rows if row.work == work]
        parts += [f"## {work}\n", *speedup_tables(own), step_table(own)]
    return "\n".join(parts)


def speedup_tables(rows: Sequence[Row]) -> list[str]:
    """One table for each list of sparsities that at least one shape and arm was measured at."""
    lines: dict[tuple[str, str, str], dict[float, float]] = {}
    for row in rows:
        lines.setdefault((row.shape, row.arm, row.passes), {})[row.sparsity] = row.speedup
    tables: dict[tuple[float, ...], list[list[str]]] = {}
    for (shape, arm, passes), speedups in lines.items():
        if len(speedups) > 1:
            cells = [shape, arm, passes, *(f"{speedups[s]:.2f}" for s in sorted(speedups))]
            cells.append(break_even(list(speedups.items())))
            tables.setdefault(tuple(sorted(speedups)), []).append(cells)
    return [
        markdown_table(
            ["shape", "arm", "pass", *(f"{s:.4g}%" for s in (100 * s for s in sparsities)), "break-even"], body
        )
        for sparsities, body in tables.items()
    ]


def step_table(rows: Sequence[Row]) -> str:
    """The steps' times, rates and bf16 ratios; a step that takes more than 1.03 of the dense one's time is marked."""
    header = [
        "shape",
        "arm",
        "sparsity",
        "step",
        "ms",
        "dense ms",
        "rival",
        "GF",
        "share",
        "dense share",
        "bf16",
        "spread",
    ]
    steps = [row for row in rows if row.passes == "step"]
    return markdown_table(header, [step_cells(row) for row in steps]) if steps else ""


def step_cells(row: Row) -> list[str]:
    slow = row.ours_ms > SLOWER_AT_MOST * row.rival_ms
    return [
        row.shape,
        row.arm,
        f"{100 * row.sparsity:.4g}%",
        f"{row.speedup:.2f}" + (" slower" if slow else ""),
        f"{row.ours_ms:.3g}",
        f"{row.rival_ms:.3g}",
        row.rival,
        f"{row.gf:.0f}",
        f"{row.share:.0%}",
        f"{row.rival_share:.0%}",
        "not measured" if row.bf16_speedup is None else f"{row.bf16_speedup:.2f}",
        f"{row.spread:.0%}",
    ]
