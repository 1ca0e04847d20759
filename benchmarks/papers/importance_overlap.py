"""Vandersmissen et al. 2023, section 4 (ticket overlap): what the tickets by magnitude, L1 and L2 share, in %.

ResNet-18 on TinyImageNet at 96.48%, three deterministic runs from one initialisation. The paper's 9.34% of the unpruned
connections and 0.33% of all are one count (9.34% of 3.52% is 0.33%): the intersection of the three masks over what one
ticket keeps, which is no intersection over union. Both are printed, and the overlap of independent masks of each
layer's density.
"""

from __future__ import annotations

from dataclasses import replace

from importance_setup import DIGITS, RESNET18, quick
from recipe import Recipe, main

import pysparse_ticket as pst

PAPER = {
    "of the unpruned": {"shared %": 9.34},
    "of all": {"shared %": 0.33},
    "of the first convolution's unpruned": {"shared %": 68.78},
}
LEVEL, FIRST = 15, "stem.weight"


def measure(runs, part, seed):
    tickets = []
    for importance in ("magnitude", "l1", "l2"):
        rows = runs.search(f"{importance}-{seed}", seed, importance=importance)
        tickets.append(pst.Ticket.load(rows[LEVEL]["ticket"]))
    found = pst.overlap(*tickets)
    first = [{FIRST: ticket.masks[FIRST]} for ticket in tickets]
    kept = sum(int(mask.sum()) for mask in tickets[0].masks.values())
    total = sum(mask.numel() for mask in tickets[0].masks.values())
    yield "of the unpruned", "shared %", 100 * found["overlap"]
    yield "of all", "shared %", 100 * found["overlap"] * kept / total
    yield "of the first convolution's unpruned", "shared %", 100 * pst.overlap(*first)["overlap"]
    yield "of the union", "shared %", 100 * found["iou"]
    yield "of the unpruned, by chance", "shared %", 100 * found["chance"]


full = replace(RESNET18, rounds=tuple(range(1, LEVEL + 1)), seeds=1)
RECIPE = Recipe(
    "importance_overlap",
    "Vandersmissen et al. 2023, section 4: overlap of three tickets of ResNet-18 at 96.48%",
    PAPER,
    {"": full},
    {"": quick(full, rounds=(5, 10, LEVEL), **DIGITS)},
    measure,
)

if __name__ == "__main__":
    main(RECIPE)
