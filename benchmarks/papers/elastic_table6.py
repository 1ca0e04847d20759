"""Chen et al. 2021, Table 6: tickets of ResNet-20 across data sets, SVHN and CIFAR-10, and stretched to ResNet-32.

The sparsity is not stated; 89.26% (ten levels) is taken, which the IMP figure of ResNet-20 on CIFAR-10 fits. Parts are
the data that the target trains on; a row needs the source's data too. The IMP column is the target's own search.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

from elastic_setup import DIGITS, RESNET, quick
from recipe import Recipe, main

import pysparse_ticket as pst

LEVEL = 10
NAMES = {"svhn": "SVHN", "cifar10": "CIFAR-10"}
PAPER = {
    "SVHN to SVHN ResNet-20": {"ETT": 95.95, "IMP": 95.95},
    "SVHN to SVHN ResNet-32": {"ETT": 96.00, "IMP": 96.32},
    "SVHN to CIFAR-10 ResNet-20": {"ETT": 87.21, "IMP": 91.07},
    "SVHN to CIFAR-10 ResNet-32": {"ETT": 88.67, "IMP": 92.22},
    "CIFAR-10 to SVHN ResNet-20": {"ETT": 95.44, "IMP": 95.95},
    "CIFAR-10 to SVHN ResNet-32": {"ETT": 95.79, "IMP": 96.32},
    "CIFAR-10 to CIFAR-10 ResNet-20": {"ETT": 91.07, "IMP": 91.07},
    "CIFAR-10 to CIFAR-10 ResNet-32": {"ETT": 91.38, "IMP": 92.22},
}


def measure(runs, part, seed):
    own = {d: runs.search(f"imp-{d}-{seed}", seed, f"resnet{d}")[LEVEL] for d in (20, 32)}
    for source in NAMES:
        there = runs if source == part else runs.beside(source)
        try:
            _ = there.data
        except (FileNotFoundError, ImportError) as error:
            print(f"tickets of {source} are not run: {error}", file=sys.stderr)
            continue
        found = there.search(f"imp-20-{seed}", seed, "resnet20")[LEVEL]
        for depth in (20, 32):
            row = f"{NAMES[source]} to {NAMES[part]} ResNet-{depth}"
            yield row, "IMP", own[depth]["accuracy"]
            if source == part and depth == 20:
                yield row, "ETT", own[20]["accuracy"]
                continue
            network = f"resnet{depth}"
            find = partial(pst.elastic, pst.Ticket.load(found["ticket"]), None, runs.network(seed, network))
            result = runs.ticket(f"ett-{source}-{depth}-{seed}", seed, find, own[depth]["place"], network)
            yield row, "ETT", result["accuracy"]


full = replace(RESNET, network="resnet20", rounds=tuple(range(1, LEVEL + 1)))
small = quick(full, (LEVEL,), **DIGITS)
RECIPE = Recipe(
    "elastic_table6",
    "Chen et al. 2021, Table 6: accuracy in % of tickets of ResNet-20 across data sets",
    PAPER,
    {"svhn": replace(full, data="svhn"), "cifar10": full},
    {"svhn": replace(small, load=small.load | {"seed": 1}), "cifar10": small},
    measure,
)

if __name__ == "__main__":
    main(RECIPE)
