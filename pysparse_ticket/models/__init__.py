"""The networks of the papers, by name."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import nn

from .imagenet_resnet import BLOCKS, Bottleneck, ImageNetResNet
from .mlp import Mlp, lenet_300_100, mlp_n
from .resnet import DEPTHS, BasicBlock, CifarResNet
from .vgg import STAGES, Vgg

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "CifarResNet",
    "ImageNetResNet",
    "Mlp",
    "Vgg",
    "build",
    "fresh",
    "lenet_300_100",
    "mlp_n",
    "names",
]


def names() -> tuple[str, ...]:
    """The names of the papers' networks; `build` also takes ``resnet<6n+2>`` and ``mlp-<n>`` of any other n >= 1, and
    ``vgg16-fc<n>`` for n linear layers."""
    return (
        *(f"resnet{depth}" for depth in DEPTHS),
        *(f"vgg{depth}" for depth in STAGES),
        *(f"{stem}-resnet{depth}" for stem in ("imagenet", "tiny") for depth in BLOCKS),
        "lenet-300-100",
        "mlp-2",
        "mlp-3",
        "mlp-4",
    )


def build(name: str, num_classes: int, in_shape: Sequence[int], width: int | None = None) -> nn.Module:
    """A fresh network for images of shape ``in_shape`` (C, H, W) and ``num_classes`` logits.

    ``resnet18`` and its like are CIFAR's three stages; ``imagenet-resnet18`` and ``tiny-resnet18`` have four.
    ``width`` is the channels of the first stage of a convolutional network, the papers' by default.
    Raises ValueError for an unknown name (the message lists the known ones), for a depth that the family does not have,
    for a width below 1 or of an MLP, and for images too small for the network's halvings: below 4x4 pixels for a CIFAR
    ResNet, 16x16 for a VGG, 32x32 and 8x8 for the ImageNet and TinyImageNet ResNets.
    """
    if len(in_shape) != 3 or min(in_shape) < 1:
        raise ValueError(f"in_shape is (channels, height, width), each at least 1, not {tuple(in_shape)}")
    if num_classes < 1:
        raise ValueError(f"num_classes is at least 1, not {num_classes}")
    if width is not None and (width < 1 or name.startswith(("lenet", "mlp"))):
        raise ValueError(f"width is the channels of a convolutional network's first stage, not {width} of {name}")
    scaled = {} if width is None else {"width": width}
    if name == "lenet-300-100":
        return lenet_300_100(math.prod(in_shape), num_classes)
    if match := re.fullmatch(r"mlp-(\d+)", name):
        return mlp_n(int(match[1]), math.prod(in_shape), num_classes)
    if match := re.fullmatch(r"resnet(\d+)", name):
        _at_least(4, name, in_shape)
        return CifarResNet(int(match[1]), num_classes, in_shape[0], **scaled)
    if match := re.fullmatch(r"vgg(13|16|19)(?:-fc(\d+))?", name):
        _at_least(16, name, in_shape)
        return Vgg(int(match[1]), num_classes, in_shape[0], linear=int(match[2] or 1), **scaled)
    if match := re.fullmatch(r"(imagenet|tiny)-resnet(\d+)", name):
        _at_least(32 if match[1] == "imagenet" else 8, name, in_shape)
        return ImageNetResNet(int(match[2]), num_classes, in_shape[0], stem=match[1], **scaled)
    raise ValueError(f"unknown model {name!r}; known: {', '.join(names())}")


def fresh(name: str, num_classes: int, in_shape: Sequence[int], seed: int, device: str = "cpu", **options) -> nn.Module:
    """`build` with weights drawn from the seed, on the device; torch's own generators stay where they are."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(name, num_classes, in_shape, **options).to(device)


def _at_least(pixels: int, name: str, in_shape: Sequence[int]) -> None:
    if min(in_shape[1:]) < pixels:
        raise ValueError(f"{name} needs images of at least {pixels}x{pixels} pixels, not {in_shape[1]}x{in_shape[2]}")
