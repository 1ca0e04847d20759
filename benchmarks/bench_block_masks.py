"""Block and n:m masks: MaskedLinear and MaskedConv2d alone against F.linear and F.conv2d, and torch's own BSR products.

    python benchmarks/bench_block_masks.py [--compile] [--bf16] [--sparsity 0.8 0.9] [--shape "linear 1024x1024" ...]

A block is rows x columns of the weight; one of a convolution is output filters x input channels with all their taps.
torch's BSR products take square blocks and make neither dW nor a step.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from harness import SPARSITIES, Case, layer_flops, main
from layers import conv_site, dense_rivals, module_arm, sparse_tensor_arm
from torch import Tensor, nn

from pysparse_ticket.granularity import expand_blocks, keep_n_of_m
from pysparse_ticket.nn import MaskedConv2d, MaskedLinear

BATCH, FEATURES = 512, 1024
BLOCKS = ((8, 1), (16, 16), (32, 32))
N_OF_M = ((2, 4), (1, 4), (1, 8), (1, 16))
CONV = (128, 64, 8)  # batch, channels in and out, image side
CONV_BLOCKS = ((8, 8), (16, 8))
SHAPES = ("linear 1024x1024", "3x3 64ch 8x8")


def block_mask(shape: tuple[int, ...], height: int, width: int, sparsity: float) -> Tensor:
    """Random blocks, exactly the sparsity's share of them removed, up to one block."""
    matrix = (shape[0], torch.Size(shape[1:]).numel())
    grid = (-(-matrix[0] // height), -(-matrix[1] // width))
    kept = torch.rand(grid).flatten().argsort() >= round(sparsity * grid[0] * grid[1])
    return expand_blocks(kept.view(grid), shape, height, width)


def linear(options: argparse.Namespace) -> Case:
    layer = nn.Linear(FEATURES, FEATURES)
    x, grad = torch.randn(BATCH, FEATURES), torch.randn(BATCH, FEATURES)
    macs = BATCH * FEATURES * FEATURES
    case = Case(f"linear 1024x1024, batch {BATCH}", dense_rivals(layer, x, grad, options), layer_flops(macs))
    for sparsity in options.sparsity:
        for height, width in BLOCKS:
            mask = block_mask(layer.weight.shape, height, width, sparsity)
            module = MaskedLinear.from_dense(layer, mask)
            case.arms.append(module_arm(f"blocks {height}x{width}", module, sparsity, x, grad, macs, options))
            if height == width:
                name = f"torch BSR {height}x{width}"
                case.arms.append(sparse_tensor_arm(name, module, sparsity, x, grad, macs, (height, width)))
    for n, m in N_OF_M:
        module = MaskedLinear.from_dense(layer, keep_n_of_m(torch.rand(layer.weight.shape), n, m))
        case.arms.append(module_arm("n:m, 2:4 1:4 1:8 1:16", module, 1 - n / m, x, grad, macs, options))
    return case


def conv(options: argparse.Namespace) -> Case:
    layer, x, grad, macs = conv_site(*CONV)
    case = Case(f"3x3 64ch 8x8, batch {CONV[0]}", dense_rivals(layer, x, grad, options), layer_flops(macs))
    for sparsity in options.sparsity:
        for height, width in CONV_BLOCKS:
            mask = block_mask(layer.weight.shape, height, width * 9, sparsity)
            module = MaskedConv2d.from_dense(layer, mask)
            case.arms.append(module_arm(f"blocks {height}x{width}", module, sparsity, x, grad, macs, options))
    return case


def cases(name: str, options: argparse.Namespace) -> Iterator[Case]:
    torch.manual_seed(0)
    yield linear(options) if name == SHAPES[0] else conv(options)


if __name__ == "__main__":
    main(__doc__, __file__, cases, SHAPES, (0.2, *SPARSITIES))
