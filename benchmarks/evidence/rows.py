"""Rows of the evidence: one training run or one comparison of tickets each, their CSV file, and mean ± std."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from csv_rows import read_rows, write_rows

from pysparse_ticket.files import write_whole


@dataclass(frozen=True)
class Row:
    """What one arm gave at one seed; None was not measured, or has no meaning for the arm."""

    table: str
    data: str
    network: str
    arm: str
    level: str  # rounds, blocks removed, or the sparsity asked for, as the table names it
    seed: int
    sparsity: float | None = None
    accuracy: float | None = None
    train_seconds: float | None = None  # of training alone, from the step that the ticket rewinds to
    find_seconds: float | None = None
    overlap: float | None = None
    iou: float | None = None
    chance: float | None = None
    emptied: float | None = None  # tensors of which no weight is left
    exploration: float | None = None  # share of the weights that were ever active
    settings: str = ""
    revision: str = ""
    machine: str = ""

    @property
    def key(self) -> tuple:
        """What an earlier row has to share for its arm not to be run again."""
        return (self.table, self.data, self.network, self.arm, self.level, self.seed, self.settings)


def to_csv(rows: Iterable[Row]) -> str:
    return write_rows(Row, rows, digits=6)


def from_csv(text: str) -> list[Row]:
    """Raises ValueError for a file of other columns."""
    return read_rows(Row, text, "make evidence")


class Store:
    """The CSV file: rows found there are not measured again; every addition writes the whole file and renames it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = from_csv(path.read_text()) if path.exists() else []

    def has(self, row: Row) -> bool:
        return any(old.key == row.key for old in self.rows)

    def add(self, rows: Sequence[Row]) -> None:
        keys = {row.key for row in rows}
        self.rows = sorted([*(row for row in self.rows if row.key not in keys), *rows], key=lambda row: row.table)
        write_whole(self.path, to_csv(self.rows).encode())


def spread(values: Iterable[float | None], digits: int = 2, scale: float = 1.0) -> str:
    """ "mean ± std" (divisor n - 1) of the values that were measured; a lone one stands without a spread."""
    given = [scale * value for value in values if value is not None]
    if not given:
        return "not measured"
    mean = f"{statistics.fmean(given):.{digits}f}"
    return f"{mean} ± {statistics.stdev(given):.{digits}f}" if len(given) > 1 else mean


def middle(values: Iterable[float | None]) -> str:
    """The median: one run that another program held up does not count."""
    given = [value for value in values if value is not None]
    return f"{statistics.median(given):.2f}" if given else "not measured"


def of(rows: Iterable[Row], name: str) -> list[float | None]:
    return [getattr(row, name) for row in rows]


def grouped(rows: Iterable[Row], by: Callable[[Row], tuple]) -> dict[tuple, list[Row]]:
    """The rows by a key, keys in the order in which they come first."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(by(row), []).append(row)
    return found
