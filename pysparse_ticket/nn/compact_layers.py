"""Layers behind removed filters: linear layers that read them, depthwise convolutions that pass them on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dense_state import DenseState, keep_mask, part_of
from .plain_conv2d import plain_conv2d


class CompactLinear(DenseState):
    """Equivalent to ``F.linear(x, weight * keep_in, bias)`` on the kept features alone.

    x ``[N, kept features]`` to ``[N, O]``. The Parameter holds the kept columns; the state_dict is the dense one.
    """

    def __init__(self, linear: nn.Linear, keep_in: Tensor) -> None:
        super().__init__()
        keep_in = keep_mask(keep_in, linear.in_features, "keep_in").to(linear.weight.device)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("in_index", keep_in.nonzero().flatten(), persistent=False)
        self.weight = part_of(linear.weight, slice(None), self.in_index)
        self.bias = part_of(linear.bias)

    @classmethod
    def from_dense(cls, linear: nn.Linear, keep_in: Tensor) -> CompactLinear:
        """keep_in bool [in features]."""
        return cls(linear, keep_in)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def macs(self, _, output: Tensor) -> int:
        """Multiply-adds of one forward pass over the whole batch."""
        return output.numel() * len(self.in_index)

    def to_dense(self) -> nn.Linear:
        """A plain linear layer over all features, zero in the columns that were removed."""
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, **like)
        return self.fill(linear)

    def _dense_slots(self):
        rows = torch.arange(self.out_features, device=self.weight.device)
        return {"weight": ((self.out_features, self.in_features), (rows, self.in_index), 0.0)}

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, kept {len(self.in_index)}"


class CompactDepthwiseConv2d(DenseState):
    """Equivalent to a depthwise convolution with ``weight * keep[:, None, None, None]`` on the kept channels alone.

    x ``[N, kept channels, H, W]`` to ``[N, kept filters, H', W']``, each channel with all or none of its filters. The
    Parameters hold the kept filters; the state_dict is the dense one.
    """

    def __init__(self, conv: nn.Conv2d, keep: Tensor) -> None:
        super().__init__()
        if conv.groups != conv.in_channels:
            raise ValueError(f"a depthwise convolution has a group a channel, not {conv.groups} of {conv.in_channels}")
        keep = keep_mask(keep, conv.out_channels, "keep").to(conv.weight.device)
        channels = keep.reshape(conv.in_channels, -1)
        if not keep.any() or not torch.equal(channels.any(1), channels.all(1)):
            raise ValueError("keep must keep a channel, and all filters of a channel or none")
        self.in_channels, self.out_channels, self.kernel_size = conv.in_channels, conv.out_channels, conv.kernel_size
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.groups = int(channels.any(1).sum())
        self.register_buffer("out_index", keep.nonzero().flatten(), persistent=False)
        self.weight = part_of(conv.weight, self.out_index)
        self.bias = part_of(conv.bias, self.out_index)

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, keep: Tensor) -> CompactDepthwiseConv2d:
        """keep bool [out channels]."""
        return cls(conv, keep)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def macs(self, _, output: Tensor) -> int:
        """Multiply-adds of one forward pass over the whole batch."""
        return output.numel() * self.kernel_size[0] * self.kernel_size[1]

    def to_dense(self) -> nn.Conv2d:
        """A plain depthwise convolution over all channels, zero where filters were removed."""
        return self.fill(plain_conv2d(self, self.weight, groups=self.in_channels))

    def _dense_slots(self):
        slots = {"weight": ((self.out_channels, 1, *self.kernel_size), (self.out_index,), 0.0)}
        if self.bias is not None:
            slots["bias"] = ((self.out_channels,), (self.out_index,), 0.0)
        return slots

    def extra_repr(self) -> str:
        return f"{self.in_channels} -> {self.out_channels}, kept {len(self.out_index)}, kernel_size={self.kernel_size}"
