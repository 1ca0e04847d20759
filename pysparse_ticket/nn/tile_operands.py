"""What the batch-tiled ops need of a convolution module, whatever its class."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.pattern import Pattern
from .filter_sparse_conv2d import FilterSparseConv2d
from .masked_conv2d import MaskedConv2d

Tileable = MaskedConv2d | FilterSparseConv2d | nn.Conv2d


def keep_pattern(conv: Tileable) -> None:
    """Compute once what :func:`operands` of this module will need at each call."""
    if isinstance(conv, MaskedConv2d):
        return
    if isinstance(conv, FilterSparseConv2d):
        conv._tile_pattern = Pattern.from_mask(conv.tile_mask())
    else:
        conv._tile_pattern = Pattern.from_mask(conv.weight.detach().new_ones(conv.weight.shape, dtype=bool))


def drop_pattern(module: nn.Module) -> None:
    """Undo :func:`keep_pattern`."""
    module.__dict__.pop("_tile_pattern", None)


def operands(conv: Tileable) -> tuple[Tensor, Pattern, Tensor | None]:
    """Values, pattern and bias over the channels that its input and output have in a chain; differentiable."""
    if isinstance(conv, MaskedConv2d):
        return conv.packed_values(), conv.pattern, conv.bias
    bias = conv.tile_bias() if isinstance(conv, FilterSparseConv2d) else conv.bias
    return conv.weight.reshape(-1), conv._tile_pattern, bias
