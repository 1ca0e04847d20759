"""Convolution over the surviving filters and input channels, computed compactly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.filter_conv2d import filter_conv2d, filter_conv2d_reference
from .dense_state import DenseState, copied, keep_mask, part_of
from .plain_conv2d import plain_conv2d


class FilterSparseConv2d(DenseState):
    """Equivalent to ``F.conv2d(x, weight * keep_out[:, None, None, None] * keep_in[None, :, None, None], ...)``.

    x ``[N, C, H, W]`` to ``[N, O, H', W']`` with exact zeros in the removed channels. With ``compact_in`` x holds only
    the kept input channels, with ``compact_out`` the output only the kept filters: between two convolutions of a
    block the removed channels then never exist. Parameters hold the surviving part; the state_dict is the dense one.

    format "compact"  torch's convolution of the kept channels, copied out of whole tensors and back where there are any
    format "fused"    one kernel reads and writes the kept channels where they lie (``ops.filter_conv2d``)
    """

    FORMATS = ("compact", "fused")

    def __init__(self, conv: nn.Conv2d, keep_out: Tensor, keep_in: Tensor | None, compact_in: bool, compact_out: bool):
        super().__init__()
        if conv.groups != 1:
            raise ValueError(f"FilterSparseConv2d takes convolutions of one group, not {conv.groups}")
        if conv.padding_mode != "zeros":
            raise ValueError(f"FilterSparseConv2d pads with zeros, not {conv.padding_mode!r}")
        keep_out = keep_mask(keep_out, conv.out_channels, "keep_out").to(conv.weight.device)
        keep_in = keep_mask(keep_in, conv.in_channels, "keep_in").to(conv.weight.device)
        if not keep_out.any() or not keep_in.any():
            raise ValueError("keep_out and keep_in must each keep a channel")
        self.in_channels, self.out_channels, self.kernel_size = conv.in_channels, conv.out_channels, conv.kernel_size
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.compact_in, self.compact_out = compact_in, compact_out
        self.format = "compact"
        self.register_buffer("out_index", keep_out.nonzero().flatten(), persistent=False)
        self.register_buffer("in_index", keep_in.nonzero().flatten(), persistent=False)
        self.weight = part_of(conv.weight, self.out_index, self.in_index)
        self.bias = part_of(conv.bias, self.out_index)

    @classmethod
    def from_dense(
        cls,
        conv: nn.Conv2d,
        keep_out: Tensor,
        keep_in: Tensor | None = None,
        *,
        compact_in: bool = False,
        compact_out: bool = False,
    ) -> FilterSparseConv2d:
        """keep_out bool [O], keep_in bool [C] or None for all: copies the surviving weights of ``conv``."""
        return cls(conv, keep_out, keep_in, compact_in, compact_out)

    def set_format(self, format: str) -> None:
        """Change how the layer runs; ValueError for an unknown format, or for "fused" with ``padding="same"``."""
        if format not in self.FORMATS:
            raise ValueError(f"unknown format {format!r}; known: {', '.join(self.FORMATS)}")
        if format == "fused" and isinstance(self.padding, str):
            raise ValueError(f"the fused convolution takes a padding in pixels, not {self.padding!r}")
        self.format = format

    def forward(self, x: Tensor) -> Tensor:
        convolve = filter_conv2d if self.format == "fused" else filter_conv2d_reference
        return convolve(x, *self.operands())

    def operands(self) -> tuple:
        """What the ops of ``ops/filter_conv2d*.py`` take behind x."""
        in_index = None if self.compact_in or len(self.in_index) == self.in_channels else self.in_index
        out_index = None if self.compact_out or len(self.out_index) == self.out_channels else self.out_index
        geometry = (self.stride, self.padding, self.dilation)
        return self.weight, self.bias, in_index, out_index, self.out_channels, *geometry

    def tile_mask(self) -> Tensor:
        """bool ``[O, C, kh, kw]`` of the weights that there are, over the channels that input and output have: the kept
        ones where they are compact."""
        outputs = len(self.out_index) if self.compact_out else self.out_channels
        inputs = len(self.in_index) if self.compact_in else self.in_channels
        mask = torch.zeros(outputs, inputs, *self.kernel_size, dtype=torch.bool, device=self.weight.device)
        rows = slice(None) if self.compact_out else self.out_index[:, None]
        mask[rows, slice(None) if self.compact_in else self.in_index] = True
        return mask

    def tile_bias(self) -> Tensor | None:
        """The bias over the same outputs, zero where a filter was removed."""
        if self.bias is None or self.compact_out or len(self.out_index) == self.out_channels:
            return self.bias
        return self.bias.new_zeros(self.out_channels).index_copy(0, self.out_index, self.bias)

    def macs(self, _, output: Tensor) -> int:
        """Multiply-adds of one forward pass over the whole batch."""
        return output.shape[0] * output.shape[2] * output.shape[3] * self.weight.numel()

    def to_dense(self) -> nn.Conv2d:
        """A plain convolution over all channels, zero where nothing survived."""
        return self.fill(plain_conv2d(self, self.weight))

    def _dense_slots(self):
        shape = (self.out_channels, self.in_channels, *self.kernel_size)
        slots = {"weight": (shape, (self.out_index, self.in_index), 0.0)}
        if self.bias is not None:
            slots["bias"] = ((self.out_channels,), (self.out_index,), 0.0)
        return slots

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels} -> {self.out_channels}, kept {len(self.in_index)} -> {len(self.out_index)}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, format={self.format}"
        )


class CompactBatchNorm2d(DenseState, nn.BatchNorm2d):
    """The surviving channels of a BatchNorm2d; its state_dict has the dense shapes, removed channels normalise to 0."""

    @classmethod
    def from_dense(cls, norm: nn.BatchNorm2d, keep: Tensor) -> CompactBatchNorm2d:
        """keep bool [C]."""
        keep = keep_mask(keep, norm.num_features, "keep").to(norm.weight.device if norm.affine else keep.device)
        compact = cls(
            int(keep.sum()),
            norm.eps,
            norm.momentum,
            norm.affine,
            norm.track_running_stats,
            device=norm.weight.device if norm.affine else None,
            dtype=norm.weight.dtype if norm.affine else None,
        )
        compact.dense_features = norm.num_features
        compact.register_buffer("index", keep.nonzero().flatten(), persistent=False)
        return copied(norm, compact)

    def to_dense(self) -> nn.BatchNorm2d:
        like = self.weight if self.affine else self.running_mean
        norm = nn.BatchNorm2d(self.dense_features, self.eps, self.momentum, self.affine, self.track_running_stats)
        norm.to(like)
        return self.fill(norm)

    def _dense_slots(self):
        if not hasattr(self, "index"):  # while __init__ runs
            return {}
        fills = {"weight": 0.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
        return {n: ((self.dense_features,), (self.index,), f) for n, f in fills.items() if getattr(self, n) is not None}
