"""Vandersmissen et al. 2023, Table 2: accuracy of tickets by five layerwise importances, mean and deviation of 3 runs.

Parts: (a) LeNet-300-100 on MNIST, (b) ResNet-20 on CIFAR-10, (c) ResNet-18 on TinyImageNet, (d) VGG-16 on CIFAR-10.
Rows are the sparsities 1 - 0.8^s after s levels; the dense accuracy is that of level 0.
"""

from __future__ import annotations

from importance_setup import DIGITS, DIGITS_16, IMPORTANCES, LENET, RESNET18, RESNET20, VGG16, quick
from recipe import Recipe, main, percent_gone

DENSE = {"a": (98.11, 0.08), "b": (91.67, 0.40), "c": (49.53, 0.56), "d": (93.52, 0.08)}
# {part: {level: (mean, deviation) of each importance}}, the paper's figures
FIGURES = {
    "a": {
        5: ((98.00, 0.09), (98.12, 0.10), (98.04, 0.15), (98.00, 0.08), (98.02, 0.09)),
        10: ((98.08, 0.06), (98.15, 0.05), (98.06, 0.08), (98.05, 0.08), (98.04, 0.10)),
        15: ((97.94, 0.08), (98.12, 0.15), (97.95, 0.10), (97.90, 0.05), (97.77, 0.17)),
        20: ((97.23, 0.15), (97.44, 0.02), (97.47, 0.10), (97.33, 0.17), (97.41, 0.05)),
        24: ((90.62, 0.29), (90.89, 0.22), (91.05, 1.09), (91.29, 0.79), (91.82, 0.16)),
    },
    "b": {
        5: ((92.01, 0.14), (91.57, 0.20), (91.65, 0.25), (90.15, 0.92), (91.64, 0.13)),
        10: ((90.90, 0.15), (90.56, 0.22), (90.86, 0.39), (87.75, 0.33), (90.51, 0.05)),
        15: ((85.59, 1.00), (84.76, 0.62), (86.28, 0.45), (84.00, 0.54), (83.28, 0.32)),
        20: ((77.07, 1.57), (76.31, 0.71), (76.68, 0.63), (76.37, 1.06), (74.36, 0.57)),
        25: ((63.36, 0.55), (63.40, 0.77), (62.78, 0.46), (63.07, 0.55), (50.17, 6.78)),
        30: ((45.66, 2.96), (45.36, 1.49), (43.65, 0.80), (38.42, 5.46), (31.50, 1.80)),
        35: ((22.58, 4.57), (21.60, 4.79), (19.59, 6.37), (17.75, 3.20), (14.62, 4.00)),
        40: ((12.87, 4.97), (10.00, 0.0), (12.45, 3.55), (12.29, 2.00), (13.34, 2.89)),
    },
    "c": {
        5: ((49.99, 0.10), (50.96, 0.19), (50.45, 0.40), (50.96, 0.18), (50.38, 0.47)),
        10: ((49.98, 0.41), (50.84, 0.65), (50.49, 0.50), (50.69, 0.73), (50.24, 0.68)),
        15: ((48.72, 0.20), (49.76, 0.56), (49.41, 0.09), (45.30, 4.42), (47.77, 0.37)),
        20: ((46.36, 0.52), (47.58, 0.24), (47.26, 0.52), (40.48, 3.52), (43.49, 0.17)),
        25: ((38.54, 0.48), (37.37, 0.35), (37.90, 0.54), (32.51, 2.57), (34.23, 1.19)),
        30: ((24.56, 1.00), (25.12, 0.71), (25.88, 0.47), (21.67, 1.40), (23.34, 0.12)),
        35: ((13.56, 0.11), (14.03, 0.61), (15.30, 0.28), (10.16, 2.17), (12.74, 0.76)),
        40: ((4.62, 0.25), (6.48, 0.30), (6.83, 0.36), (4.69, 0.72), (5.31, 0.62)),
    },
    "d": {
        5: ((93.45, 0.12), (93.57, 0.14), (93.69, 0.04), (93.49, 0.03), (93.76, 0.25)),
        10: ((93.75, 0.03), (93.78, 0.25), (93.57, 0.06), (64.99, 47.64), (93.67, 0.11)),
        15: ((93.69, 0.10), (93.76, 0.04), (93.66, 0.18), (64.68, 47.36), (93.47, 0.14)),
        20: ((93.53, 0.10), (93.24, 0.14), (93.03, 0.04), (63.72, 46.54), (92.83, 0.02)),
        25: ((91.88, 0.14), (90.94, 0.31), (91.48, 0.30), (60.66, 43.87), (91.81, 0.09)),
        30: ((51.53, 36.01), (83.70, 0.15), (84.03, 0.31), (56.58, 40.35), (33.95, 22.7)),
        35: ((10.00, 0.0), (40.99, 1.12), (29.54, 6.67), (24.21, 17.48), (14.38, 7.59)),
    },
}


def row_of(part: str, level: int) -> str:
    return f"({part}) {percent_gone(level):.2f}%" if level else f"({part}) dense"


PAPER = {}
for name, levels in FIGURES.items():
    PAPER[row_of(name, 0)] = {"Magnitude": DENSE[name]}
    PAPER |= {row_of(name, level): dict(zip(IMPORTANCES, line, strict=True)) for level, line in levels.items()}


def measure(runs, part, seed):
    for column, importance in IMPORTANCES.items():
        for level, result in runs.search(f"{importance}-{seed}", seed, importance=importance).items():
            if level in FIGURES[part] or (not level and importance == "magnitude"):
                yield row_of(part, level), column, result["accuracy"]


RECIPE = Recipe(
    "importance_table2",
    "Vandersmissen et al. 2023, Table 2: accuracy in % by importance and sparsity",
    PAPER,
    {"a": LENET, "b": RESNET20, "c": RESNET18, "d": VGG16},
    {
        "a": quick(LENET, epochs=8, **DIGITS),
        "b": quick(RESNET20, **DIGITS),
        "c": quick(RESNET18, epochs=3, **DIGITS),
        "d": quick(VGG16, epochs=3, **DIGITS_16),
    },
    measure,
)

if __name__ == "__main__":
    main(RECIPE)
