"""Training steps of ResNets with tickets of weights, in the chain of tiles, and of filters; random pieces.

    python benchmarks/bench_resnet_step.py [--compile] [--bf16] [--sparsity 0.8 0.9] [--shape "resnet20 32x32"]

Forward, cross entropy, backward, SGD with momentum. The filter ticket removes half of the filters that can go (of
every block's first convolution), with their input channels in the next; its sparsity is that half.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator

import torch
from harness import Case, main
from networks import dense_rivals, filter_ticket, network_arm, step_flops, to_channels_last

import pysparse_ticket as pst
from pysparse_ticket.models import build

BATCH = 128
SHAPES = {"resnet20 32x32": ("resnet20", 32), "resnet32 16x16": ("resnet32", 16)}


def cases(shape: str, options: argparse.Namespace) -> Iterator[Case]:
    name, size = SHAPES[shape]
    torch.manual_seed(0)
    dense = build(name, 10, (3, size, size))
    x, labels = torch.randn(BATCH, 3, size, size), torch.randint(10, (BATCH,))
    rivals = dense_rivals(dense, x, labels, options)
    case = Case(f"{shape}, batch {BATCH}", rivals, {"step": step_flops(dense, dense.stem, x)})
    dense, x = to_channels_last(dense, x)
    tickets = [
        ("weights", s, pst.at_init(dense, score="random", granularity="weight", sparsity=s)) for s in options.sparsity
    ]
    tickets.append(("half of the filters", 0.5, filter_ticket(dense, 0.5)))
    for arm, sparsity, ticket in tickets:
        model = pst.sparsify(copy.deepcopy(dense), ticket, plan="tiled")
        flops = step_flops(model, model.stem, x)
        case.arms.append(network_arm(arm, sparsity, model, x, labels, flops, options))
    yield case


if __name__ == "__main__":
    main(__doc__, __file__, cases, list(SHAPES))
