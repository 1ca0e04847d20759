"""Jordao et al. 2023, Table 4: what removing layers saves of a training step, in %, and how many times faster it is.

FLOPs are multiply-adds of convolutions and linear layers: exact. Memory is the peak of a training step; the paper does
not say what it counts. CO2 is energy times one intensity, so its saving is that of the joules, measured where the
machine has a meter. ResNet-32's row "p=4" saves 34.13% of FLOPs, which is five blocks (four would save 27.30%): p=5 is
run. The blocks are those that GraSP removes at initialisation; times are of steps, interleaved with the dense ones.
"""

from __future__ import annotations

import copy
from dataclasses import replace

from layers_setup import FULL, quick
from recipe import Recipe, main

import pysparse_ticket as pst
from pysparse_ticket.measure import Meter, interleave, macs, peak_bytes
from pysparse_ticket.steps import training_step

COLUMNS = ("FLOPs %", "memory %", "CO2 %", "speed-up x")
PAPER = {
    "ResNet-32 p=1": dict(zip(COLUMNS, (6.82, 10.13, 11.11, 1.10), strict=True)),
    "ResNet-32 p=3": dict(zip(COLUMNS, (20.47, 25.29, 25.92, 1.35), strict=True)),
    "ResNet-32 p=5": dict(zip(COLUMNS, (34.13, 30.11, 33.33, 1.57), strict=True)),
    "ResNet-56 p=3": dict(zip(COLUMNS, (11.25, 15.15, 13.33, 1.16), strict=True)),
    "ResNet-56 p=4": dict(zip(COLUMNS, (15.00, 19.42, 20.00, 1.24), strict=True)),
    "ResNet-56 p=5": dict(zip(COLUMNS, (18.76, 23.69, 24.44, 1.34), strict=True)),
    "ResNet-56 p=12": dict(zip(COLUMNS, (45.00, 45.82, 51.11, 2.03), strict=True)),
}
REPEATS = 5


def measure(runs, part, seed):
    settings = runs.settings
    batch = runs.batch(seed)
    models = {0: runs.network(seed)}
    for remove in settings.remove:
        ticket = pst.at_init(models[0], batch, granularity="layer", remove=remove, aggregate=settings.aggregate)
        models[remove] = pst.sparsify(copy.deepcopy(models[0]), ticket)
    plain = replace(settings.train, nesterov=False, weight_decay=0.0)  # momentum alone
    steps, cost, peak, joules = {}, {}, {}, {}
    for remove, model in models.items():
        steps[remove], optimizer = training_step(model.train(), *batch, plain)
        cost[remove] = macs(model, batch[0][:1])
        peak[remove] = peak_bytes(steps[remove], model, optimizer, settings.train.device)
        with Meter(settings.train.device) as meter:
            for _ in range(REPEATS):
                steps[remove]()
        joules[remove] = meter.joules
    times = interleave(steps, repeats=REPEATS, warmup=1)
    for remove in settings.remove:
        row = f"ResNet-{part} p={remove}"
        yield row, "FLOPs %", 100 * (1 - cost[remove] / cost[0])
        yield row, "memory %", 100 * (1 - peak[remove] / peak[0])
        if joules[0] and joules[remove] is not None:
            yield row, "CO2 %", 100 * (1 - joules[remove] / joules[0])
        yield row, "speed-up x", times[0].median / times[remove].median


full = {
    "32": replace(FULL, network="resnet32", remove=(1, 3, 5), seeds=1),
    "56": replace(FULL, network="resnet56", remove=(3, 4, 5, 12), seeds=1),
}
SMALL = {"data": "procedural", "load": {"train": 100, "test": 100, "size": 32}, "subset": None, "width": None}
RECIPE = Recipe(
    "layers_table4",
    "Jordao et al. 2023, Table 4: what layer tickets save on CIFAR-10's images",
    PAPER,
    full,
    {
        part: replace(quick(settings), **SMALL, train=replace(FULL.train, batch_size=16))
        for part, settings in full.items()
    },
    measure,
)

if __name__ == "__main__":
    main(RECIPE)
