"""The networks of the papers, by name."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from torch import nn

from .mlp import Mlp, lenet_300_100, mlp_n
from .resnet import DEPTHS, BasicBlock, CifarResNet

__all__ = ["BasicBlock", "CifarResNet", "Mlp", "build", "lenet_300_100", "mlp_n", "names"]


def names() -> tuple[str, ...]:
    """The names of the papers' networks; `build` also takes ``resnet<6n+2>`` and ``mlp-<n>`` of any other n >= 1."""
    return (*(f"resnet{depth}" for depth in DEPTHS), "lenet-300-100", "mlp-2", "mlp-3", "mlp-4")


def build(name: str, num_classes: int, in_shape: Sequence[int]) -> nn.Module:
    """A fresh network for images of shape ``in_shape`` (C, H, W) and ``num_classes`` logits.

    Raises ValueError for an unknown name (the message lists the known ones), for a ResNet depth that is not 6 n + 2,
    and for images below 4x4, which a ResNet's two halvings would leave without a pixel to spare.
    """
    if len(in_shape) != 3 or min(in_shape) < 1:
        raise ValueError(f"in_shape is (channels, height, width), each at least 1, not {tuple(in_shape)}")
    if num_classes < 1:
        raise ValueError(f"num_classes is at least 1, not {num_classes}")
    if name == "lenet-300-100":
        return lenet_300_100(math.prod(in_shape), num_classes)
    if match := re.fullmatch(r"mlp-(\d+)", name):
        return mlp_n(int(match[1]), math.prod(in_shape), num_classes)
    if match := re.fullmatch(r"resnet(\d+)", name):
        if min(in_shape[1:]) < 4:
            raise ValueError(f"{name} needs images of at least 4x4 pixels, not {in_shape[1]}x{in_shape[2]}")
        return CifarResNet(int(match[1]), num_classes, in_shape[0])
    raise ValueError(f"unknown model {name!r}; known: {', '.join(names())}")
