"""MaskedConv2d against F.conv2d, random masks: alone (in the layout that it takes unasked, and in the other one), and
in a chain of batch tiles without batch norm.

python benchmarks/bench_masked_conv2d.py [--compile] [--bf16] [--sparsity 0.8 0.9] [--shape "3x3 64ch 8x8" ...]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator

import torch
from harness import Arm, Case, layer_flops, main
from layers import checked, dense_rivals, masked_oracle, module_arm, passes
from torch import Tensor, nn

from pysparse_ticket.nn import MaskedConv2d
from pysparse_ticket.ops.tiled_conv2d import tile_pack, tile_unpack, tiled_conv2d

# batch, channels in and out, image side, kernel side, stride
SHAPES = {
    "3x3 64ch 8x8": (128, 64, 64, 8, 3, 1),
    "3x3 32ch 16x16": (128, 32, 32, 16, 3, 1),
    "3x3 16ch 32x32": (128, 16, 16, 32, 3, 1),
    "3x3 16-32ch 32x32 stride 2": (128, 16, 32, 32, 3, 2),
    "3x3 32-64ch 16x16 stride 2": (128, 32, 64, 16, 3, 2),
    "1x1 16-32ch 32x32 stride 2": (128, 16, 32, 32, 1, 2),
    "1x1 64-256ch 56x56": (8, 64, 256, 56, 1, 1),
    "3x3 128ch 28x28": (32, 128, 128, 28, 3, 1),
}
SMALL = {  # too few samples to fill batch tiles: alone only
    f"3x3 {channels}ch {side}x{side}, batch {batch}": (batch, channels, channels, side, 3, 1)
    for channels, side in ((64, 8), (128, 28))
    for batch in (1, 4, 16)
}


def chain_arm(module: MaskedConv2d, sparsity: float, x: Tensor, grad: Tensor, macs: float, options) -> Arm:
    """The layer on batch tiles."""
    n, halo, pattern = len(x), 1, module.pattern
    values = module.packed_values().detach().clone()
    geometry = (module.stride, module.padding_pair, module.dilation)

    def function(tiles: Tensor) -> Tensor:
        return tiled_conv2d(tiles, n, halo, values, pattern, *geometry)[0]

    def plain(name: str, tensor: Tensor) -> Tensor:
        return pattern.scatter(tensor) if name == "dW" else tile_unpack(tensor, n, halo)

    calls = passes(function, tile_pack(x, halo), [values], tile_pack(grad, halo), options)
    checked(f"chain {sparsity:.0%}", calls, masked_oracle(module, x, grad), plain)
    return Arm("chain", sparsity, calls, layer_flops(macs * (1 - module.sparsity)))


def cases(name: str, options: argparse.Namespace) -> Iterator[Case]:
    batch, channels, outputs, side, kernel, stride = (SHAPES | SMALL)[name]
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, outputs, kernel, stride, kernel // 2, bias=False)
    x = torch.randn(batch, channels, side, side)
    grad = torch.randn_like(layer(x).detach())
    macs = grad.numel() * channels * kernel**2
    shape = name if name in SMALL else f"{name}, batch {batch}"
    case = Case(shape, dense_rivals(layer, x, grad, options), layer_flops(macs))
    for sparsity in options.sparsity:
        module = MaskedConv2d.from_dense(layer, torch.rand(layer.weight.shape) >= sparsity)
        case.arms.append(module_arm("alone", module, sparsity, x, grad, macs, options))
        for layout in module.rival_formats(tuple(x.shape)):
            rival = copy.deepcopy(module)
            rival.set_format(layout)
            case.arms.append(module_arm(f"alone, {layout}", rival, sparsity, x, grad, macs, options))
        if name in SHAPES:
            case.arms.append(chain_arm(module, sparsity, x, grad, macs, options))
    yield case


if __name__ == "__main__":
    main(__doc__, __file__, cases, [*SHAPES, *SMALL])
