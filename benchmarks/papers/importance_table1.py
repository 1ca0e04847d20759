"""Vandersmissen et al. 2023, Table 1: the least and the greatest weight of layers of ResNet-18 on TinyImageNet, at the
start, at the rewind step 1000 and at the end (78,200 iterations)."""

from __future__ import annotations

from importance_setup import DIGITS, RESNET18, quick
from recipe import Recipe, main

LAYERS = {
    "conv1": "stem.weight",
    "downsample1": "stage2.0.shortcut.0.weight",
    "conv17": "stage4.1.conv2.weight",
    "fc": "fc.weight",
}
COLUMNS = ("min at 0", "max at 0", "min at 1000", "max at 1000", "min at 78200", "max at 78200")
PAPER = {
    "conv1": dict(zip(COLUMNS, (-0.47, 0.41, -0.57, 0.78, -1.07, 0.90), strict=True)),
    "downsample1": dict(zip(COLUMNS, (-0.65, 0.66, -0.64, 0.63, -1.01, 1.11), strict=True)),
    "conv17": dict(zip(COLUMNS, (-0.11, 0.10, -0.12, 0.10, -0.15, 0.19), strict=True)),
    "fc": dict(zip(COLUMNS, (-0.30, 0.27, -0.29, 0.39, -0.45, 1.19), strict=True)),
}


def measure(runs, part, seed):
    last, kept = runs.dense(f"dense-{seed}", seed, marks=(0, runs.settings.rewind_step))
    states = (kept[0]["model"], kept[runs.settings.rewind_step]["model"], last["model"])
    for row, name in LAYERS.items():
        values = [value for state in states for value in (state[name].min(), state[name].max())]
        for column, value in zip(COLUMNS, values, strict=True):
            yield row, column, value.item()


RECIPE = Recipe(
    "importance_table1",
    "Vandersmissen et al. 2023, Table 1: ranges of ResNet-18's weights on TinyImageNet",
    PAPER,
    {"": RESNET18},
    {"": quick(RESNET18, **DIGITS)},
    measure,
)

if __name__ == "__main__":
    main(RECIPE)
