"""Chen et al. 2021, Table 5: tickets at 89.26% (ten levels) stretched and squeezed in fully connected layers.

VGG-13 with 2, 3 or 5 linear layers on CIFAR-10, whose features the paper does not give (they are the last stage's), and
MLP-n of 784, n times 300, 100 and 10 units on MNIST. A row is the source, a column the target; the diagonal is IMP.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from elastic_setup import DIGITS, DIGITS_16, MLP, VGG, fc_transfer, quick
from recipe import Recipe, main

import pysparse_ticket as pst

LEVEL = 10
COUNTS = {"vgg": (2, 3, 5), "mlp": (2, 3, 4)}
FIGURES = {
    "vgg": ((93.50, 93.61, 93.38), (93.50, 93.62, 93.59), (93.44, 93.59, 93.38)),
    "mlp": ((98.06, 97.95, 97.99), (97.91, 97.83, 97.83), (97.88, 97.91, 98.03)),
}
NAMES = {"vgg": "VGG-13, {} linear", "mlp": "MLP-{}"}
PAPER = {
    NAMES[part].format(source): {f"to {n}": value for n, value in zip(COUNTS[part], line, strict=True)}
    for part, lines in FIGURES.items()
    for source, line in zip(COUNTS[part], lines, strict=True)
}


def network_of(part: str, count: int) -> str:
    return f"vgg13-fc{count}" if part == "vgg" else f"mlp-{count}"


def classifier_of(part: str, count: int) -> str:
    return f"linear.{count - 1}" if part == "vgg" else f"layers.{count + 1}"


def measure(runs, part, seed):
    for source in COUNTS[part]:
        spare = [classifier_of(part, source)]
        found = runs.search(f"imp-{source}-{seed}", seed, network_of(part, source), spare=spare)[LEVEL]
        for target in COUNTS[part]:
            accuracy = found["accuracy"]
            if target != source:
                network = network_of(part, target)
                find = partial(
                    pst.elastic, pst.Ticket.load(found["ticket"]), None, runs.network(seed, network),
                    **(fc_transfer(source, target) if part == "vgg" else {}),
                )  # fmt: skip
                name = f"ett-{source}-{target}-{seed}"
                accuracy = runs.ticket(name, seed, find, found["place"], network)["accuracy"]
            yield NAMES[part].format(source), f"to {target}", accuracy


full = {
    "vgg": replace(VGG, rounds=tuple(range(1, LEVEL + 1))),
    "mlp": replace(MLP, rounds=tuple(range(1, LEVEL + 1))),
}
RECIPE = Recipe(
    "elastic_table5",
    "Chen et al. 2021, Table 5: accuracy in % at 89.26%",
    PAPER,
    full,
    {"vgg": quick(full["vgg"], (LEVEL,), **DIGITS_16), "mlp": quick(full["mlp"], (5, LEVEL), epochs=8, **DIGITS)},
    measure,
)

if __name__ == "__main__":
    main(RECIPE)
