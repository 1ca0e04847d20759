"""MaskedLinear against F.linear, random masks: alone, in a chain of tiles, and torch's own CSR products.

    python benchmarks/bench_masked_linear.py [--compile] [--bf16] [--sparsity 0.8 0.9] [--shape 1024x1024]

torch's CSR tensors have no bias here, and no activation to pack.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from harness import Arm, Case, layer_flops, main
from layers import checked, dense_rivals, masked_oracle, module_arm, passes, sparse_tensor_arm
from torch import Tensor, nn

from pysparse_ticket.nn import MaskedLinear
from pysparse_ticket.ops.masked_linear import linear_schedule
from pysparse_ticket.ops.tiled_linear import linear_pack, linear_unpack, tiled_linear

SHAPES = {"1024x1024": (512, 1024, 1024), "768x3072": (2048, 768, 3072)}  # batch, in, out


def chain_arm(module: MaskedLinear, sparsity: float, x: Tensor, grad: Tensor, macs: float, options) -> Arm:
    """The layer on tiles of samples."""
    n, pattern = len(x), module.pattern
    schedules = linear_schedule(pattern)
    values, bias = module.packed_values().detach().clone(), module.bias.detach().clone()

    def function(tiles: Tensor) -> Tensor:
        return tiled_linear(tiles, n, values, bias, pattern, schedules=schedules)

    def plain(name: str, tensor: Tensor) -> Tensor:
        if name == "dW":
            return pattern.scatter(tensor)
        features = {"y": module.out_features, "dX": module.in_features}
        return linear_unpack(tensor, n, features[name]) if name in features else tensor

    calls = passes(function, linear_pack(x), [values, bias], linear_pack(grad), options)
    checked(f"chain {sparsity:.0%}", calls, masked_oracle(module, x, grad), plain)
    return Arm("chain", sparsity, calls, layer_flops(macs * (1 - module.sparsity)))


def cases(name: str, options: argparse.Namespace) -> Iterator[Case]:
    batch, in_features, out_features = SHAPES[name]
    torch.manual_seed(0)
    layer = nn.Linear(in_features, out_features)
    x, grad = torch.randn(batch, in_features), torch.randn(batch, out_features)
    macs = batch * in_features * out_features
    case = Case(f"{name}, batch {batch}", dense_rivals(layer, x, grad, options), layer_flops(macs))
    for sparsity in options.sparsity:
        module = MaskedLinear.from_dense(layer, torch.rand(out_features, in_features) >= sparsity)
        case.arms += [
            module_arm("alone", module, sparsity, x, grad, macs, options),
            chain_arm(module, sparsity, x, grad, macs, options),
            sparse_tensor_arm("torch CSR", module, sparsity, x, grad, macs, None),
        ]
    yield case


if __name__ == "__main__":
    main(__doc__, __file__, cases, list(SHAPES))
