"""Modules that run a ticket. A module's name says the mathematics; its ``format`` says how it runs."""

from .compact_layers import CompactDepthwiseConv2d, CompactLinear
from .convert import densify, sparsify
from .filter_sparse_conv2d import CompactBatchNorm2d, FilterSparseConv2d
from .layer_skip import LayerSkip
from .masked_conv2d import MaskedConv2d
from .masked_linear import MaskedLinear

__all__ = [
    "CompactBatchNorm2d",
    "CompactDepthwiseConv2d",
    "CompactLinear",
    "FilterSparseConv2d",
    "LayerSkip",
    "MaskedConv2d",
    "MaskedLinear",
    "densify",
    "sparsify",
]
