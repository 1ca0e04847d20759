"""A training step of an MLP with AdamW, ours tiled and layer by layer against nn.Sequential; random masks.

    python benchmarks/bench_mlp_step.py [--compile] [--bf16] [--sparsity 0.8 0.9]

Forward, cross entropy, backward, AdamW. The dense optimizer is the faster of fused and foreach, ours is fused.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from itertools import pairwise

import torch
from harness import Case, main
from networks import dense_rivals, network_arm, step_flops, training_step
from torch import nn

import pysparse_ticket as pst

SIZES, BATCH = (784, 1024, 1024, 10), 512
SHAPE = f"MLP {'-'.join(map(str, SIZES))}, AdamW, batch {BATCH}"


def mlp() -> nn.Sequential:
    layers = []
    for i, o in pairwise(SIZES):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-4, fused=True)


def foreach(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-4, foreach=True)


def cases(_: str, options: argparse.Namespace) -> Iterator[Case]:
    torch.manual_seed(0)
    dense = mlp()
    x, labels = torch.randn(BATCH, SIZES[0]), torch.randint(SIZES[-1], (BATCH,))
    rivals = dense_rivals(dense, x, labels, options, fused)
    rivals["foreach"] = training_step(dense, x, labels, foreach, options)
    case = Case(SHAPE, rivals, {"step": step_flops(dense, dense[0], x)})
    for sparsity in options.sparsity:
        ticket = pst.at_init(dense, score="random", granularity="weight", sparsity=sparsity)
        for arm, plan in (("tiled", "tiled"), ("layer by layer", "packed")):
            model = pst.sparsify(copy.deepcopy(dense), ticket, plan=plan)
            flops = step_flops(model, model[0], x)
            case.arms.append(network_arm(arm, sparsity, model, x, labels, flops, options, fused))
    yield case


if __name__ == "__main__":
    main(__doc__, __file__, cases, [SHAPE])
