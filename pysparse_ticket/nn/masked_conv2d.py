"""``nn.Conv2d`` with a mask."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from ..ops.conv_tiles import ConvTiles
from ..ops.masked_conv2d import LAYOUTS, default_layout, masked_conv2d, output_size
from ..ops.masked_conv2d_tiles import masked_conv2d_tiles
from .masked import Layout, MaskedModule
from .plain_conv2d import plain_conv2d


def resolve_padding(conv: nn.Module) -> tuple[int, int] | None:
    """Padding as numbers; None for a "same" that pads its sides differently."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)
    return tuple(conv.padding)


class MaskedConv2d(MaskedModule):
    """Equal to ``F.conv2d(x, weight * mask, bias, stride, padding, dilation, groups)``, ``padding_mode`` included.

    format "tiles"   packed, 16 samples innermost
    format "pixels"  packed, the pixels of one image innermost
    format "packed"  the one of the two that ``ops.masked_conv2d.default_layout`` takes for the input
    format "blocks"  the Parameter ``values`` ``[tiles, bn, bk]`` holds the tiles of output by input channels at one tap
                     with a survivor, zeros where pruned; GPU kernels

    Grouped convolutions, padding modes other than zeros, and a "same" padding that is not symmetric stay in format
    "dense"; ``why_dense`` says so.
    """

    FORMATS = ("packed", *LAYOUTS, "blocks", "dense")
    OP = "masked_conv2d"

    def __init__(self, module: nn.Conv2d, mask: Tensor) -> None:
        super().__init__(module, mask)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            setattr(self, name, getattr(module, name))
        self.padding_mode = module.padding_mode
        self.padding_pair = resolve_padding(module)
        if module.groups > 1:
            self.why_dense = f"groups={module.groups}; the packed kernels take ungrouped convolutions"
        elif module.padding_mode != "zeros":
            self.why_dense = f"padding_mode={module.padding_mode!r}; the packed kernels pad with zeros"
        elif self.padding_pair is None:
            self.why_dense = f"padding={module.padding!r} is not the same on both sides"
        self._reversed_padding_repeated_twice = module._reversed_padding_repeated_twice  # nn.Conv2d's own, see forward
        self._pack_if_possible()

    @classmethod
    def from_dense(cls, module: nn.Conv2d, mask: Tensor) -> MaskedConv2d:
        """A packed copy of ``module`` with the weights under the bool ``mask`` of the weight's shape kept, or a dense
        one where ``why_dense`` says so. ValueError for a mask of another shape or dtype."""
        return cls(module, mask)

    def to_dense(self) -> nn.Conv2d:
        """A plain copy, zeros where pruned."""
        return self._to_dense(plain_conv2d(self, self.weight_parameter, self.groups, self.padding_mode))

    def forward(self, x: Tensor) -> Tensor:
        if self.format == "dense":
            # torch's own code for all paddings; it reads the attributes that both classes have
            return nn.Conv2d._conv_forward(self, x, self.masked_weight(), self.bias)
        if self.format == "blocks":
            return masked_conv2d_tiles(x, self.values, self.bias, self.layout, clean=True)
        layout = None if self.format == "packed" else self.format
        geometry = (self.stride, self.padding_pair, self.dilation)
        return masked_conv2d(x, self.values, self.bias, self.pattern, *geometry, layout=layout)

    def rival_formats(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        if self.on_gpu:
            return self.tiled_formats()
        if not self.col.is_cpu:  # the layouts are the C++ kernels'
            return ()
        output = output_size(shape[2:], self.kernel_size, self.stride, self.padding_pair, self.dilation)
        return tuple(layout for layout in LAYOUTS if layout != default_layout(shape, output))

    def _cut(self, format: str) -> Layout:
        return ConvTiles.from_mask(self.mask, self.tile, self.stride, self.padding_pair, self.dilation)

    def dense_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        if x.dim() == 3:
            x, grad = x[None], grad[None]
        padding = self.padding_pair
        if self.padding_mode != "zeros" or padding is None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=mode), 0
        return conv2d_weight(x, self._shape, grad, self.stride, padding, self.dilation, self.groups)

    def macs(self, input: Tensor, output: Tensor) -> int:
        """Multiply-adds of the surviving weights for the whole batch."""
        return self.nnz * (output.numel() // self.out_channels if self.out_channels else 0)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            + super().extra_repr()
        )
