"""Chen et al. 2021, Table 1: tickets at 73.79% (six levels) of ResNet-18, -26 and -34, found or transferred.

Reinit draws new weights for IMP's masks, Random shuffles those masks within each layer, and Magnitude, SNIP and GraSP
prune the rewound weights in one shot. SNIP and GraSP run batch norm on its running statistics, and GraSP keeps the
largest |theta Hg|: what the authors' code does. It sums over an epoch; here it is over ten batches of 128.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from elastic_setup import DIGITS, IMAGENET, quick
from recipe import Recipe, main

import pysparse_ticket as pst
from pysparse_ticket.search.controls import reinitialise, shuffle_masks

DEPTHS = (18, 26, 34)
COLUMNS = tuple(f"Res-{depth}" for depth in DEPTHS)
LEVEL = 6
ONE_SHOT = {"Magnitude": "magnitude", "SNIP": "snip", "GraSP": "grasp-magnitude"}
PAPER = {
    "Full": dict(zip(COLUMNS, (69.96, 72.56, 73.77), strict=True)),
    "IMP": dict(zip(COLUMNS, (70.22, 72.94, 74.20), strict=True)),
    "Reinit": dict(zip(COLUMNS, (62.88, 66.97, 68.36), strict=True)),
    "Random": dict(zip(COLUMNS, (63.10, 67.07, 68.68), strict=True)),
    "Magnitude": dict(zip(COLUMNS, (64.96, 68.51, 69.74), strict=True)),
    "SNIP": dict(zip(COLUMNS, (62.23, 67.51, 69.35), strict=True)),
    "GraSP": dict(zip(COLUMNS, (62.85, 67.24, 69.23), strict=True)),
    "ETT from Res-18": {"Res-26": 71.29, "Res-34": 71.86},
    "ETT from Res-26": {"Res-18": 68.17, "Res-34": 73.37},
    "ETT from Res-34": {"Res-18": 68.08, "Res-26": 72.47},
}


def measure(runs, part, seed):
    searches = {d: runs.search(f"imp-{d}-{seed}", seed, f"tiny-resnet{d}") for d in DEPTHS}
    x, y = runs.batch(seed, runs.settings.samples)
    pairs = list(zip(x.split(128), y.split(128), strict=True))
    for depth, column in zip(DEPTHS, COLUMNS, strict=True):
        network = f"tiny-resnet{depth}"
        found = searches[depth]
        yield "Full", column, found[0]["accuracy"]
        yield "IMP", column, found[LEVEL]["accuracy"]
        ticket, model = pst.Ticket.load(found[LEVEL]["ticket"]), runs.network(seed, network)
        fresh = partial(runs.network, seed + 1000, network)
        arms = {
            "Reinit": partial(reinitialise, ticket, model, init=lambda m, f=fresh: m.load_state_dict(f().state_dict())),
            "Random": partial(shuffle_masks, ticket, seed),
        }
        for row, score in ONE_SHOT.items():
            arms[row] = partial(
                pst.at_init, model, pairs, score=score, granularity="weight", sparsity=ticket.sparsity,
                state=ticket.rewind, bn_mode="eval", allow_empty=True, seed=seed,
            )  # fmt: skip
        for source in DEPTHS:
            if source != depth:
                donor = pst.Ticket.load(searches[source][LEVEL]["ticket"])
                arms[f"ETT from Res-{source}"] = partial(pst.elastic, donor, None, model)
        for row, find in arms.items():
            name = f"{row.replace(' ', '-')}-{depth}-{seed}"
            yield row, column, runs.ticket(name, seed, find, found[LEVEL]["place"], network)["accuracy"]


full = replace(IMAGENET, rounds=tuple(range(1, LEVEL + 1)))
RECIPE = Recipe(
    "elastic_table1",
    "Chen et al. 2021, Table 1: accuracy in % at 73.79% (the paper's on ImageNet, ours on TinyImageNet)",
    PAPER,
    {"": full},
    {"": quick(full, (LEVEL,), **DIGITS)},
    measure,
)

if __name__ == "__main__":
    main(RECIPE)
