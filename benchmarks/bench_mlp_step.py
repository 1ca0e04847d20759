"""A training step of an MLP with AdamW, ours tiled and layer by layer against eager nn.Sequential.

    python benchmarks/bench_mlp_step.py [--threads N] [--repeats N] [--batch N] [--sparsity 0.8 0.9]

Forward, cross entropy, backward, AdamW; random masks, fp32. Gradients are checked against the dense model's first. The
optimizer is the faster of fused and foreach, for dense and for ours each.
"""

from __future__ import annotations

import argparse
import copy
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.measure import interleave
from pysparse_ticket.ops.library import cpu_isa

SIZES = (784, 1024, 1024, 10)
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
OPTIMIZERS = ("fused", "foreach")


def mlp() -> nn.Sequential:
    layers = []
    for i, o in pairwise(SIZES):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def check(ours: nn.Module, dense: nn.Module, ticket: pst.Ticket, x: torch.Tensor, labels: torch.Tensor) -> None:
    """SystemExit unless logits and all gradients of the surviving weights agree."""
    results = []
    for model in (ours, dense):
        logits = model(x)
        results.append([logits, *torch.autograd.grad(F.cross_entropy(logits, labels), list(model.parameters()))])
    shapes = dict(dense.named_parameters())
    for name, a, b in zip(("logits", *shapes), *results, strict=True):
        b = b[ticket.masks[name]] if name in ticket.masks else b
        error = ((a - b).norm() / b.norm()).item()
        if not error < 1e-5:
            raise SystemExit(f"{name} is wrong by {error:.1e}")


def stepper(model: nn.Module, kind: str, x: torch.Tensor, labels: torch.Tensor):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **{kind: True})

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--sparsity", type=float, nargs="+", default=SPARSITIES)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"MLP {'-'.join(map(str, SIZES))}, batch {args.batch}, AdamW; {args.threads} threads, {cpu_isa()}")
    print("sparsity | tiled | layer by layer | tiled ms | dense ms (medians of a step)")
    for sparsity in args.sparsity:
        torch.manual_seed(0)
        dense = mlp()
        x, labels = torch.randn(args.batch, SIZES[0]), torch.randint(SIZES[-1], (args.batch,))
        ticket = pst.at_init(dense, score="random", granularity="weight", sparsity=sparsity)
        tiled = pst.sparsify(copy.deepcopy(dense), ticket, plan="tiled")
        layers = pst.sparsify(copy.deepcopy(dense), ticket, plan="packed")
        with torch.no_grad():
            for name, mask in ticket.masks.items():
                dense.get_parameter(name).mul_(mask)
        check(tiled, dense, ticket, x, labels)
        arms = {
            f"{arm} {kind}": stepper(copy.deepcopy(model), kind, x, labels)
            for arm, model in (("dense", dense), ("tiled", tiled), ("layers", layers))
            for kind in OPTIMIZERS
        }
        times = {name: timing.median for name, timing in interleave(arms, args.repeats).items()}
        best = {arm: min(times[f"{arm} {kind}"] for kind in OPTIMIZERS) for arm in ("dense", "tiled", "layers")}
        print(
            f"{sparsity:.0%} | {best['dense'] / best['tiled']:.1f}x | {best['dense'] / best['layers']:.1f}x | "
            f"{best['tiled'] * 1e3:.2f} | {best['dense'] * 1e3:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
