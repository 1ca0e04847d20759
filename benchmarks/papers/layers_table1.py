"""Jordao et al. 2023, Table 1: layer tickets of a trained ResNet-32, rewound to epochs 0, 25, 50 and 75.

Algorithm 1: train, score every removable block, drop the lowest, rewind to theta_i, train the n - i epochs that are
left. "Learning-rate rewinding" is named in the set-up while the algorithm sets the weights to theta_i: weights are
rewound here, and the learning rate's schedule goes on from epoch i. The table does not say how many blocks it removes;
one is taken, as in the paper's Table 3. Scores see 500 images a class, as the group's scripts have it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from layers_setup import FULL, quick
from recipe import Recipe, main

import pysparse_ticket as pst

SCORES = {"HRank": "hrank", "expectABS": "expectabs", "PLS": "pls-vip", "Random": "random", "KL": "kl"}
COLUMNS = ("theta_0", "theta_25", "theta_50", "theta_75")
PAPER = {
    "HRank": dict(zip(COLUMNS, (-0.01, 0.21, 0.10, 0.12), strict=True)),
    "expectABS": dict(zip(COLUMNS, (0.33, 0.13, -0.48, -0.62), strict=True)),
    "PLS": dict(zip(COLUMNS, (0.06, 0.31, 0.10, 0.10), strict=True)),
    "Random": dict(zip(COLUMNS, (0.38, 0.15, 0.26, -0.07), strict=True)),
    "KL": dict(zip(COLUMNS, (0.74, 0.46, -0.03, -0.17), strict=True)),
}


def measure(runs, part, seed):
    settings = runs.settings
    steps = [epoch * runs.epoch_steps for epoch in settings.rewind_epochs]
    dense, kept = runs.dense(f"dense-{seed}", seed, marks=steps)
    trained = runs.network(seed)
    trained.load_state_dict(dense["model"])
    x, y = runs.batch(seed, settings.samples)
    pairs = list(zip(x.split(128), y.split(128), strict=True))
    for row, score in SCORES.items():
        for column, step in zip(COLUMNS, steps, strict=True):
            find = partial(
                pst.after_training, trained, pairs, score=score, remove=settings.remove[0],
                rewind=kept[step]["model"], seed=seed,
            )  # fmt: skip
            ticket = runs.ticket(f"{score}-{column}-{seed}", seed, find, kept[step]["place"])
            yield row, column, ticket["accuracy"] - dense["accuracy"]


full = replace(FULL, remove=(1,), rewind_epochs=(0, 25, 50, 75), samples=5000)
RECIPE = Recipe(
    "layers_table1",
    "Jordao et al. 2023, Table 1: ResNet-32 on CIFAR-10, layers removed after training, points over dense",
    PAPER,
    {"": full},
    {"": quick(full)},
    measure,
    "{:+.2f}",
)

if __name__ == "__main__":
    main(RECIPE)
