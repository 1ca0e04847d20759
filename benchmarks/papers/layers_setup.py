"""Jordao et al. 2023, "When Layers Play the Lottery, all Tickets Win at Initialization": what its tables share.

CIFAR-10, ResNet-32 and -56. The paper gives neither epochs, learning rate, batch, weight decay nor the number of runs.
Taken are those of the same group's published scripts: SGD with nesterov momentum 0.9, rate 0.01, a tenth after 100 and
after 150 of 200 epochs, batch 128, weight decay 1e-4; three runs, paired by seed. Their scripts pass three augmented
copies of the data in an epoch; here it is one. Tables are differences to the dense network in percentage points.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from recipe import Settings, shortened

from pysparse_ticket.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Layers(Settings):
    """remove: p, the blocks removed. rewind_epochs: i of theta_i. samples: training images that are scored."""

    remove: tuple[int, ...] = (1,)
    rewind_epochs: tuple[int, ...] = (0,)
    samples: int = 128
    aggregate: str = "sum"  # the paper's counts of filters show that it is the small blocks of stage 1 that go first


FULL = Layers(
    data="cifar10",
    network="resnet32",
    train=TrainConfig(epochs=200, batch_size=128, lr=0.01, nesterov=True, weight_decay=1e-4, milestones=(100, 150)),
)


def quick(full: Layers) -> Layers:
    """8 epochs of 6 steps on 8x8 digits; rewinding keeps its share of the training."""
    return replace(
        full,
        data="digits",
        load={"size": 8},
        subset=(384, 240),
        width=8,
        train=shortened(full.train, epochs=8),
        rewind_epochs=tuple(round(epoch * 8 / full.train.epochs) for epoch in full.rewind_epochs),
        samples=min(full.samples, 256),
        seeds=1,
        threads=1,
        plan="packed",
    )
