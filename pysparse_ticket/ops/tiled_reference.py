"""The tiled ops in plain torch: any device, any floating dtype, differentiable by autograd alone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .masked_conv2d import Pair
from .pattern import Pattern

LANES = 16


def pack(x: Tensor, halo: int) -> Tensor:
    n, c, h, w = x.shape
    count = (n + LANES - 1) // LANES
    x = F.pad(x, (halo, halo, halo, halo, 0, 0, 0, count * LANES - n))
    return x.view(count, LANES, c, h + 2 * halo, w + 2 * halo).permute(0, 2, 3, 4, 1).contiguous()


def unpack(tiles: Tensor, n: int, halo: int) -> Tensor:
    x = tiles.permute(0, 4, 1, 2, 3).flatten(0, 1)[:n]
    return x[:, :, halo : x.shape[2] - halo, halo : x.shape[3] - halo]


def conv(
    x: Tensor,
    n: int,
    halo: int,
    values: Tensor,
    pattern: Pattern,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    bias: Tensor | None,
    norm: nn.BatchNorm2d | None,
) -> Tensor:
    """``norm(conv(x))``, tiles to tiles; the norm updates its own running statistics."""
    bias = bias if bias is None else bias.to(x.dtype)
    weight = pattern.scatter(values.to(x.dtype))
    y = F.conv2d(unpack(x, n, halo), weight, bias, stride, padding, dilation)
    return pack(y if norm is None else norm(y), halo)


def act(z: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    z = z if residual is None else z + residual
    return z.relu() if relu else z
