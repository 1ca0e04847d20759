"""The plain convolution that a layer of ours stands for."""

from __future__ import annotations

from torch import Tensor, nn


def plain_conv2d(layer: nn.Module, like: Tensor, groups: int = 1, padding_mode: str = "zeros") -> nn.Conv2d:
    """A new ``nn.Conv2d`` of the layer's dense geometry, with a bias where it has one; device and dtype of ``like``."""
    return nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        groups,
        layer.bias is not None,
        padding_mode,
        device=like.device,
        dtype=like.dtype,
    )
