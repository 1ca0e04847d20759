"""Chen et al. 2021, "The Elastic Lottery Ticket Hypothesis": what its tables share (Table 4 and the authors' code).

IMP removes 20% of what is left a level, by magnitude over all layers; the classifier is left alone in VGGs and MLPs and
pruned in ResNets. Tickets are stretched by appending, units that do not divide evenly repeating the earliest. A target
trains from the source's rewind step with a fresh optimizer. The milestones "80, 160" of 160 epochs are read as 80 and
120, which the authors' code has; momentum 0.9 and weight decay 1e-4 are that code's. Three runs on CIFAR-10, one on
ImageNet. ImageNet does not fit a set in memory: its recipes run on TinyImageNet, with the stem for it, and so compare
with the paper in kind only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from recipe import Settings, shortened

from pysparse_ticket.search.mapping import write_mapping
from pysparse_ticket.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Elastic(Settings):
    """samples: training images that SNIP and GraSP see. every: steps between two of RigL's updates."""

    samples: int = 1280
    every: int = 100


RESNET = Elastic(
    data="cifar10",
    network="resnet32",
    train=TrainConfig(epochs=160, batch_size=128, lr=0.1, weight_decay=1e-4, milestones=(80, 120)),
    rewind_step=1000,
)
VGG = replace(RESNET, network="vgg13", rewind_step=200)
MLP = Elastic(
    data="mnist",
    network="mlp-2",
    train=TrainConfig(epochs=40, batch_size=128, lr=0.1, momentum=0.0, weight_decay=0.0),
)
IMAGENET = Elastic(
    data="tinyimagenet",
    network="tiny-resnet18",
    train=TrainConfig(epochs=90, batch_size=1024, lr=0.4, weight_decay=1e-4, milestones=(30, 60, 80), warmup_epochs=5),
    rewind_step=5 * 98,  # 5 epochs of TinyImageNet's 100,000 images
    seeds=1,
)

DIGITS = {"data": "digits", "load": {"size": 8}, "subset": (512, 360)}
DIGITS_16 = {"data": "digits", "load": {"size": 16}, "subset": (512, 360)}


def quick(full: Elastic, rounds: tuple[int, ...], epochs: int = 4, **data) -> Elastic:
    """Few epochs of 8 steps on 512 embedded images, rewound to step 2, in few rounds to the same sparsity."""
    small = replace(
        full, **data, train=shortened(full.train, epochs), rounds=rounds, rewind_step=min(full.rewind_step, 2),
        seeds=1, threads=1, plan="packed", samples=256, every=4,
    )  # fmt: skip
    return small if full.network.startswith("mlp") else replace(small, width=8)


def fc_transfer(source: int, target: int) -> dict:
    """Options of ``pst.elastic`` between VGGs of ``source`` and ``target`` linear layers: all but the classifier are
    alike, so that the first is a unit as the others are."""

    def stages(count: int) -> list[list[str]]:
        return [[f"linear.{i}" for i in range(count - 1)], [f"linear.{count - 1}"]]

    old, new = source - 1, target - 1
    stage = {unit: tuple(range(unit, new, old)) for unit in range(min(old, new))}
    mapping = write_mapping([stage]) if max(old, new) > 1 else None
    return {"stages": [stages(source), stages(target)], "mapping": mapping}
