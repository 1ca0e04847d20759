"""FilterSparseConv2d against the dense convolution, shares of the filters in and out removed at random.

    python benchmarks/bench_filter_sparse_conv2d.py [--compile] [--bf16] [--sparsity 0.5] [--shape "3x3 64ch 8x8" ...]

The sparsity is the share of the channels removed, in and out alike: half of both leaves a quarter of the products.
compact: only kept channels in and out; full: all channels, removed ones zero. A chain is a network of four such
convolutions with their norms and ReLUs between thin ends, its step with loss and SGD, as sparsify runs it.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from itertools import pairwise

import networks
import torch
from harness import Arm, Case, layer_flops, main
from layers import checked, conv_site, dense_rivals, oracle, passes
from torch import Tensor, nn

import pysparse_ticket as pst
from pysparse_ticket.nn import FilterSparseConv2d

SHAPES = {"3x3 64ch 8x8": (128, 64, 8), "3x3 16ch 32x32": (128, 16, 32), "3x3 128ch 28x28": (32, 128, 28)}
CHAINS = {f"chain of {shape}": sizes for shape, sizes in list(SHAPES.items())[:2]}
SPARSITIES = (0.1, 0.25, 0.5, 0.75)
ENDS = 8  # channels into the first and out of the last convolution of a chain


def module_arm(
    name: str, module: FilterSparseConv2d, sparsity: float, x: Tensor, grad: Tensor, macs: float, options
) -> Arm:
    """The module on contiguous or channels_last tensors with the channels that it takes."""
    dense = module.to_dense().requires_grad_()
    want = oracle(dense, x, grad)
    want["dW"] = want["dW"] * (dense.weight != 0)
    given, cotangent = x, grad
    if module.compact_in:
        given, cotangent = x[:, module.in_index], grad[:, module.out_index]
    if "channels_last" in name:
        given, cotangent = (t.contiguous(memory_format=torch.channels_last) for t in (given, cotangent))

    def plain(what: str, tensor: Tensor) -> Tensor:
        if what == "dW":
            return module.expand_like("weight", tensor)
        if not module.compact_in:
            return tensor
        index = module.out_index if what == "y" else module.in_index
        return torch.zeros_like(want[what]).index_copy(1, index, tensor.float())

    calls = passes(module, given, list(module.parameters()), cotangent, options)
    checked(f"{name} {sparsity:.0%}", calls, want, plain)
    return Arm(name, sparsity, calls, layer_flops(macs * module.weight.numel() / dense.weight.numel()))


def layer_case(shape: str, options: argparse.Namespace) -> Case:
    batch, channels, side = SHAPES[shape]
    layer, x, grad, macs = conv_site(batch, channels, side)
    case = Case(f"{shape}, batch {batch}", dense_rivals(layer, x, grad, options), layer_flops(macs))
    for sparsity in options.sparsity:
        kept = networks.keep(channels, sparsity), networks.keep(channels, sparsity)
        for name in ("compact", "compact, channels_last", "full", "full, channels_last"):
            compact = name.startswith("compact")
            module = FilterSparseConv2d.from_dense(layer, *kept, compact_in=compact, compact_out=compact)
            case.arms.append(module_arm(name, module, sparsity, x, grad, macs, options))
    return case


def plain_chain(channels: int) -> nn.Sequential:
    """ENDS -> channels x 5 -> ENDS logits, batch norm and ReLU behind each convolution but the last."""
    widths = [ENDS, *[channels] * 5]
    layers = []
    for i, o in pairwise(widths):
        layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    last = nn.Conv2d(channels, ENDS, 3, padding=1, bias=False)
    return nn.Sequential(*layers, last, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def chain_case(shape: str, options: argparse.Namespace) -> Case:
    batch, channels, side = CHAINS[shape]
    dense = plain_chain(channels)
    x, labels = torch.randn(batch, ENDS, side, side), torch.randint(ENDS, (batch,))
    rivals = networks.dense_rivals(dense, x, labels, options)
    case = Case(f"{shape}, batch {batch}", rivals, {"step": networks.step_flops(dense, dense[0], x)})
    dense, x = networks.to_channels_last(dense, x)
    for sparsity in options.sparsity:
        ticket = networks.filter_ticket(dense, sparsity)
        model = pst.sparsify(copy.deepcopy(dense), ticket, x, plan="tiled")
        flops = networks.step_flops(model, model[0], x)
        case.arms.append(networks.network_arm("chain", sparsity, model, x, labels, flops, options))
    return case


def cases(shape: str, options: argparse.Namespace) -> Iterator[Case]:
    torch.manual_seed(0)
    yield layer_case(shape, options) if shape in SHAPES else chain_case(shape, options)


if __name__ == "__main__":
    main(__doc__, __file__, cases, [*SHAPES, *CHAINS], SPARSITIES)
