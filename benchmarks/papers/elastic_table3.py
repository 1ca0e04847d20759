"""Chen et al. 2021, Table 3: points lost to the dense network at 90% and 95%.

Tickets are transferred from ResNet-14 to 20, 20 to 32 and 32 to 56. The levels next to those sparsities are taken: 10
(89.26%) and 13 (94.50%). The column of DPF, dynamic pruning with feedback, is the paper's alone.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from elastic_setup import DIGITS, RESNET, quick
from recipe import Recipe, main

import pysparse_ticket as pst

PAIRS = ((14, 20), (20, 32), (32, 56))
LEVELS = {"90%": 10, "95%": 13}
PAPER = {
    "R20 90%": {"DPF": -1.60, "E-LTH": -1.64},
    "R20 95%": {"DPF": -4.47, "E-LTH": -4.48},
    "R32 90%": {"DPF": -1.41, "E-LTH": -0.96},
    "R32 95%": {"DPF": -2.89, "E-LTH": -2.83},
    "R56 90%": {"DPF": -0.56, "E-LTH": -0.50},
    "R56 95%": {"DPF": -1.77, "E-LTH": -1.66},
    "R20 dense": {"E-LTH": 92.48},
    "R32 dense": {"E-LTH": 93.83},
    "R56 dense": {"E-LTH": 94.51},
}


def measure(runs, part, seed):
    for source, target in PAIRS:
        network = f"resnet{target}"
        found = runs.search(f"imp-{source}-{seed}", seed, f"resnet{source}")
        dense, _ = runs.dense(f"dense-{target}-{seed}", seed, network)
        yield f"R{target} dense", "E-LTH", dense["accuracy"]
        for label, level in LEVELS.items():
            ticket = pst.Ticket.load(found[level]["ticket"])
            find = partial(pst.elastic, ticket, None, runs.network(seed, network))
            result = runs.ticket(f"ett-{target}-{level}-{seed}", seed, find, found[level]["place"], network)
            yield f"R{target} {label}", "E-LTH", result["accuracy"] - dense["accuracy"]


full = replace(RESNET, rounds=tuple(range(1, 14)))
RECIPE = Recipe(
    "elastic_table3",
    "Chen et al. 2021, Table 3: CIFAR-10, points over dense",
    PAPER,
    {"": full},
    {"": quick(full, (10, 13), **DIGITS)},
    measure,
    "{:+.2f}",
)

if __name__ == "__main__":
    main(RECIPE)
