"""Rows of the evidence: one training run or one comparison of tickets each, their CSV file, and mean ± std."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

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


NAMES = [field.name for field in fields(Row)]
NUMBERS = {field.name for field in fields(Row) if "float" in str(field.type)}


def to_csv(rows: Iterable[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(NAMES)
    for row in rows:
        values = [getattr(row, name) for name in NAMES]
        writer.writerow(["" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in values])
    return text.getvalue()


def from_csv(text: str) -> list[Row]:
    """Raises ValueError for a file of other columns."""
    reader = csv.DictReader(io.StringIO(text))
    if missing := [name for name in NAMES if name not in (reader.fieldnames or ())]:
        raise ValueError(f"the CSV lacks the columns {', '.join(missing)}; remove it and run make evidence")

    def value(name: str, cell: str) -> object:
        if name in NUMBERS:
            return float(cell) if cell else None
        return int(cell) if name == "seed" else cell

    return [Row(**{name: value(name, cells[name]) for name in NAMES}) for cells in reader]


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
