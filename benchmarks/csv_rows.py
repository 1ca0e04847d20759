"""Rows of measurements, dataclasses of text and numbers, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import fields


def names_of(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def write_rows(kind: type, rows: Iterable[object], derived: Sequence[str] = (), digits: int = 5) -> str:
    """One column a field, then one a ``derived`` property; an empty cell is None, which was not measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [*names_of(kind), *derived]
    writer.writerow(columns)
    for row in rows:
        values = [getattr(row, name) for name in columns]
        writer.writerow(["" if v is None else f"{v:.{digits}g}" if isinstance(v, float) else v for v in values])
    return text.getvalue()


def read_rows(kind: type, text: str, maker: str) -> list:
    """The rows; ValueError, which names the ``maker`` to run again, for a file of other columns."""
    reader = csv.DictReader(io.StringIO(text))
    if missing := [name for name in names_of(kind) if name not in (reader.fieldnames or ())]:
        raise ValueError(f"the CSV lacks the columns {', '.join(missing)}; remove it and run {maker}")
    types = {field.name: str(field.type) for field in fields(kind)}

    def value(name: str, cell: str) -> object:
        if "float" in types[name]:
            return float(cell) if cell else None
        return int(cell) if types[name] == "int" else cell

    return [kind(**{name: value(name, cells[name]) for name in types}) for cells in reader]


def measured_on(rows: Iterable) -> str:
    """A Markdown list: each machine's line, and the works that were measured there."""
    works: dict[str, list[str]] = {}
    for row in rows:
        works.setdefault(row.machine, []).append(row.work)
    return "".join(f"- {machine}: {', '.join(dict.fromkeys(named))}\n" for machine, named in works.items())
