"""Jordao et al. 2023, Table 3: removing one layer of ResNet-32, against as many filters by the same score.

Filters that go together through the residual sums are removed together, so that the filter network is small too.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from layers_setup import FULL, quick
from recipe import Recipe, main

import pysparse_ticket as pst

SCORES = {"SNIP": "snip", "GraSP": "grasp"}
PAPER = {"filters": {"SNIP": -0.79, "GraSP": -0.11}, "layers": {"SNIP": 0.08, "GraSP": 0.40}}


def measure(runs, part, seed):
    settings = runs.settings
    dense, _ = runs.dense(f"dense-{seed}", seed)
    model, batch = runs.network(seed), runs.batch(seed, settings.samples)
    for column, score in SCORES.items():
        layers = pst.at_init(
            model, batch, score=score, granularity="layer", remove=settings.remove[0],
            aggregate=settings.aggregate, seed=seed,
        )  # fmt: skip
        found = {
            "filters": partial(pst.filter_twin, model, layers, batch, aggregate=settings.aggregate, seed=seed),
            "layers": lambda layers=layers: layers,
        }
        for row, find in found.items():
            ticket = runs.ticket(f"{row}-{score}-{seed}", seed, find)
            yield row, column, ticket["accuracy"] - dense["accuracy"]


full = replace(FULL, remove=(1,))
RECIPE = Recipe(
    "layers_table3",
    "Jordao et al. 2023, Table 3: ResNet-32 on CIFAR-10 at equal numbers of filters, p=1, points over dense",
    PAPER,
    {"": full},
    {"": quick(full)},
    measure,
    "{:+.2f}",
)

if __name__ == "__main__":
    main(RECIPE)
