"""Fully connected networks: LeNet-300-100 and the MLP-n of the Elastic LTH paper (Chen et al. 2021, Table 5)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    """Flatten, then ``layers.0``, ``layers.1``, ... with a ReLU between two: ``[N, ...]`` to logits ``[N, sizes[-1]]``.

    ``sizes`` are the features from the input to the logits. Weights are drawn by ``kaiming_normal_`` at its defaults
    (fan in, gain sqrt 2), biases keep torch's default. Raises ValueError for fewer than two sizes or a size below 1.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"an MLP needs two or more sizes of at least 1, input and logits among them, not {sizes}")
        self.flatten = nn.Flatten()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flatten(x)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def lenet_300_100(in_features: int = 784, num_classes: int = 10) -> Mlp:
    """LeNet-300-100: ``{in_features, 300, 100, num_classes}``."""
    return Mlp([in_features, 300, 100, num_classes])


def mlp_n(n: int, in_features: int = 784, num_classes: int = 10) -> Mlp:
    """MLP-n: ``{in_features, 300 x n, 100, num_classes}``, n + 2 linear layers; MLP-1 is LeNet-300-100."""
    if n < 1:
        raise ValueError(f"an MLP-n has n >= 1 layers of 300 units, not {n}")
    return Mlp([in_features, *[300] * n, 100, num_classes])
