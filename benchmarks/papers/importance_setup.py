"""Vandersmissen and Oramas 2023, "Considering Layerwise Importance in the Lottery Ticket Hypothesis": appendix A.4.

Lottery Ticket Rewinding: 20% of what is left goes a level, over all layers together, the output layer among them;
importances come from the magnitudes of the unpruned weights. SGD, weights drawn by Kaiming normal, 3 runs. The batch
size "238" of ResNet-20 is read as 128, which its 391 iterations an epoch of CIFAR-10 need, and the "96.84%" of the text
on partial re-initialisation as 96.48%, 15 levels of 20%.
"""

from __future__ import annotations

from dataclasses import replace

from recipe import Settings, shortened

from pysparse_ticket.train import TrainConfig

IMPORTANCES = {"Magnitude": "magnitude", "L1": "l1", "L2": "l2", "SoftMax": "softmax", "MinMax": "minmax"}

LENET = Settings(
    data="mnist",
    network="lenet-300-100",
    train=TrainConfig(epochs=40, batch_size=128, lr=0.1, momentum=0.0, weight_decay=0.0),
    rewind_step=0,
    rounds=tuple(range(1, 25)),
)
RESNET20 = Settings(
    data="cifar10",
    network="resnet20",
    train=TrainConfig(epochs=160, batch_size=128, lr=0.1, weight_decay=1e-4, milestones=(80, 120)),
    rewind_step=1000,
    rounds=tuple(range(1, 41)),
)
RESNET18 = Settings(
    data="tinyimagenet",
    network="tiny-resnet18",
    train=TrainConfig(epochs=200, batch_size=256, lr=0.2, weight_decay=1e-4, milestones=(100, 150)),
    rewind_step=1000,
    rounds=tuple(range(1, 41)),
)
VGG16 = replace(RESNET20, network="vgg16", rewind_step=2000, rounds=tuple(range(1, 36)))

DIGITS = {"data": "digits", "load": {"size": 8}, "subset": (512, 360)}
DIGITS_16 = {"data": "digits", "load": {"size": 16}, "subset": (512, 360)}


def quick(full: Settings, epochs: int = 4, rounds: tuple[int, ...] = (5, 10), **data) -> Settings:
    """Few epochs of 8 steps on 512 embedded images, rewound to step 2, in rounds of five levels."""
    small = replace(
        full, **data, train=shortened(full.train, epochs), rounds=rounds, rewind_step=min(full.rewind_step, 2),
        seeds=1, threads=1, plan="packed",
    )  # fmt: skip
    return small if full is LENET else replace(small, width=8)
