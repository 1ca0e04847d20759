"""Measure what is missing of the evidence and write results/tickets.csv and tickets.md; see ``evidence.lab.Setup``.

cd benchmarks && python -m evidence [--tables a b c d] [--data procedural digits] [--seeds 3] [--tables-only]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from evidence import importances, layer_tickets, moving, transfers
from evidence.lab import Lab, Setup
from evidence.rows import Store, grouped
from pysparse_ticket.files import write_whole

TABLES = {module.TABLE: module for module in (importances, layer_tickets, transfers, moving)}
TITLES = {
    "a": "(a) Importances",
    "b": "(b) Layer tickets and their filter twins",
    "c": "(c) Elastic transfer",
    "d": "(d) Moving masks",
}
SETUPS = {"procedural": Setup(), "digits": Setup(data="digits", size=8)}
HERE = Path(__file__).parent.parent
HEADER = """# Tickets on the embedded data

Made by `make evidence` from `tickets.csv`, which has every row. Accuracy is mean ± std (n - 1) over the seeds, seconds
are medians: "train s" of training alone, without evaluation, from the step rewound to; "find s" and "search s" of all
that came before. Masked weights and filters run on tiles (`plan="tiled"`), dense networks and layer tickets on torch.
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tables", nargs="+", choices=TABLES, help="all by default")
    options.add_argument("--data", nargs="+", choices=SETUPS, default=list(SETUPS))
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--tables-only", action="store_true", help="render what is stored")
    options.add_argument("--results", type=Path, default=HERE / "results")
    options.add_argument("--tickets", type=Path, default=HERE.parent / "runs" / "evidence")
    given = options.parse_args()
    store = Store(given.results / "tickets.csv")
    for data in () if given.tables_only else given.data:
        lab = Lab(SETUPS[data], store, given.tickets / data, say=lambda line: print(line, flush=True))
        for table in given.tables or TABLES:
            began = time.perf_counter()
            TABLES[table].run(lab, range(given.seeds))
            print(f"({table}) on {data}: {time.perf_counter() - began:.0f} s", flush=True)
            write_whole(given.results / "tickets.md", markdown(store).encode())
    write_whole(given.results / "tickets.md", markdown(store).encode())


def markdown(store: Store) -> str:
    parts = [HEADER]
    for (settings,), rows in grouped(store.rows, lambda row: (row.settings,)).items():
        seeds = len({row.seed for row in rows})
        parts.append(f"- {settings}; {seeds} seeds; {'; '.join(dict.fromkeys(row.machine for row in rows))}\n")
    for name, module in TABLES.items():
        if any(row.table == name for row in store.rows):
            parts += [f"\n## {TITLES[name]}\n", module.render(store.rows)]
    return "\n".join(parts)


if __name__ == "__main__":
    main()
