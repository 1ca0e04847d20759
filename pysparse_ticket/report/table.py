"""The table of arms: on the terminal, and the same cells in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

NOT_MEASURED = "not measured"


def _scaled(value: float | None, units: Sequence[str], base: float = 1000.0) -> str:
    if value is None:
        return NOT_MEASURED
    for unit in units[:-1]:
        if abs(value) < 0.9995 * base:  # what rounds to 1000 takes the next unit
            return f"{value:.3g} {unit}".rstrip()
        value /= base
    return f"{value:.3g} {units[-1]}".rstrip()


COLUMNS = {
    "arm": lambda a: a["name"],
    "acc %": lambda a: f"{100 * a['accuracy']['mean']:.2f} ± {100 * a['accuracy']['std']:.2f}",
    "train s": lambda a: f"{a['train_seconds']:.2f}",
    "speed-up": lambda a: f"{a['speedup']:.2f}x",
    "MACs": lambda a: _scaled(a["macs"], ("", "k", "M", "G")),
    "params": lambda a: _scaled(a["parameters"], ("", "k", "M", "G")),
    "memory": lambda a: _scaled(a["peak_bytes"], ("B", "kB", "MB", "GB")),
    "joules": lambda a: NOT_MEASURED if a["joules"] is None else f"{a['joules']:.1f}",
    "g CO2": lambda a: NOT_MEASURED if a["gco2"] is None else f"{a['gco2']:.3g}",
}

STEP_COLUMNS = {
    "arm": COLUMNS["arm"],
    "sparsity": lambda a: f"{a['sparsity']:.1%}",
    "step ms": lambda a: f"{1e3 * a['step_seconds']:.3g} ± {500 * (a['p80'] - a['p20']):.2g}",
    **{name: COLUMNS[name] for name in ("speed-up", "MACs", "params", "memory")},
    "joules": lambda a: NOT_MEASURED if a["joules"] is None else f"{a['joules']:.3g}",
}  # of `pysparse-ticket bench`: the median, and half of what lies between the 20th and the 80th percentile

Columns = Mapping[str, Callable[[Mapping], str]]


def cells(arms: Sequence[Mapping], columns: Columns = COLUMNS) -> tuple[list[str], list[list[str]]]:
    """Header and rows; the CO2 column is there only when an intensity was given."""
    columns = {n: f for n, f in columns.items() if n != "g CO2" or any(a.get("intensity") for a in arms)}
    return list(columns), [[render(arm) for render in columns.values()] for arm in arms]


def rich_table(arms: Sequence[Mapping], title: str, columns: Columns = COLUMNS) -> Table:
    header, rows = cells(arms, columns)
    # the eight columns fit in 80 characters as long as "not measured" folds
    table = Table(title=title, box=SIMPLE_HEAD, padding=0, show_edge=False)
    for name in header:
        left, folds = name == "arm", name in ("joules", "g CO2")
        table.add_column(name, justify="left" if left else "right", no_wrap=not folds, min_width=8 if folds else None)
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        "| " + " | ".join(header) + " |",
        "|" + "|".join("---" if i == 0 else "---:" for i in range(len(header))) + "|",
    ]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"
