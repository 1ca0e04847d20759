"""Chen et al. 2021, section 4 (linear mode connectivity): how far accuracy falls between two runs of one ticket.

ResNet-32 on CIFAR-10: IMP's own ticket (called stable, no figure given) and those transferred from ResNet-20 and
ResNet-14. Two runs differ in the order of their data; 21 points, the whole state averaged with batch norm's statistics,
which are not measured anew: what the authors' code does. The sparsity is not stated; 89.26% is taken.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from elastic_setup import DIGITS, RESNET, quick
from recipe import Recipe, main

import pysparse_ticket as pst
from pysparse_ticket.analysis import linear_connectivity
from pysparse_ticket.train import evaluate

LEVEL = 10
ROWS = {"IMP": 32, "ETT from ResNet-20": 20, "ETT from ResNet-14": 14}
PAPER = {"ETT from ResNet-20": {"max drop": 8.72}, "ETT from ResNet-14": {"max drop": 69.72}}


def measure(runs, part, seed):
    model = runs.network(seed)
    for row, depth in ROWS.items():
        found = runs.search(f"imp-{depth}-{seed}", seed, f"resnet{depth}")[LEVEL]
        ticket = pst.Ticket.load(found["ticket"])
        find = partial(pst.elastic, ticket, None, model)
        ends = [
            runs.ticket(f"from-{depth}-order-{order}-{seed}", seed, find, found["place"], order=order, weights=True)
            for order in (seed + 9999, seed + 10001)
        ]
        line = linear_connectivity(model, ends[0]["model"], ends[1]["model"], lambda m: 100 * evaluate(m, runs.data))
        yield row, "max drop", line.max_drop


full = replace(RESNET, rounds=tuple(range(1, LEVEL + 1)), seeds=1)
RECIPE = Recipe(
    "elastic_connectivity",
    "Chen et al. 2021, section 4: points of accuracy lost between two runs of a ticket of ResNet-32",
    PAPER,
    {"": full},
    {"": quick(full, (LEVEL,), **DIGITS)},
    measure,
)

if __name__ == "__main__":
    main(RECIPE)
