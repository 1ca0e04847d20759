"""Jordao et al. 2023, Table 2: layer tickets of ResNet-32 at initialisation, one to five blocks removed.

Algorithm 2: one batch with its labels, one shot, the kept blocks at their first weights. The paper calls GraSP "a
variant of SNIP in which the importance considers the signal of the weight": its column is read as Wang et al. 2020
define it, theta Hg, and the other reading, theta g with its sign, is measured beside it. How weights' scores become a
block's is not said; they are summed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from layers_setup import FULL, quick
from recipe import Recipe, main

import pysparse_ticket as pst

SCORES = {"SNIP": "snip", "GraSP": "grasp", "GraSP as theta g": "grasp-signed"}
PAPER = {
    "p=1": {"SNIP": 0.08, "GraSP": 0.40},
    "p=2": {"SNIP": 0.00, "GraSP": 0.72},
    "p=3": {"SNIP": -0.50, "GraSP": 0.34},
    "p=4": {"SNIP": -0.53, "GraSP": 0.41},
    "p=5": {"SNIP": -1.00, "GraSP": 0.12},
}


def measure(runs, part, seed):
    settings = runs.settings
    dense, _ = runs.dense(f"dense-{seed}", seed)
    batch = runs.batch(seed, settings.samples)
    for remove in settings.remove:
        for column, score in SCORES.items():
            find = partial(
                pst.at_init, runs.network(seed), batch, score=score, granularity="layer", remove=remove,
                aggregate=settings.aggregate, seed=seed,
            )  # fmt: skip
            ticket = runs.ticket(f"{score}-{remove}-{seed}", seed, find)
            yield f"p={remove}", column, ticket["accuracy"] - dense["accuracy"]


full = replace(FULL, remove=(1, 2, 3, 4, 5))
RECIPE = Recipe(
    "layers_table2",
    "Jordao et al. 2023, Table 2: ResNet-32 on CIFAR-10, layers removed at initialisation, points over dense",
    PAPER,
    {"": full},
    {"": quick(full)},
    measure,
    "{:+.2f}",
)

if __name__ == "__main__":
    main(RECIPE)
