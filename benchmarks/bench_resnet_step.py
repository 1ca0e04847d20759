"""A weight ticket's training step in the chain of tiles against the dense one: correct first, then interleaved times.

    python benchmarks/bench_resnet_step.py [--batch 128] [--repeats N] [--sparsity 0.8 0.9]

Forward and all gradients in training mode, random masks. Dense is the faster of contiguous and channels_last.
"""

from __future__ import annotations

import argparse
import copy

import torch

import pysparse_ticket as pst
from pysparse_ticket.measure import interleave
from pysparse_ticket.models import build
from pysparse_ticket.planner import step

NETWORKS = (("resnet20", 32), ("resnet32", 16))
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)


def ticket_step(dense: torch.nn.Module, x: torch.Tensor, sparsity: float):
    """The sparsified copy's step, once its output is that of the dense network with zeros."""
    ticket = pst.at_init(dense, score="random", granularity="weight", sparsity=sparsity)
    sparse = pst.sparsify(copy.deepcopy(dense), ticket, plan="tiled")
    zeroed = copy.deepcopy(dense)
    with torch.no_grad():
        for name, mask in ticket.masks.items():
            zeroed.get_parameter(name).mul_(mask)
        expected, actual = zeroed.train()(x), sparse.train()(x)
    error = ((actual - expected).norm() / expected.norm()).item()
    if not error < 1e-4:
        raise SystemExit(f"the output is wrong by {error:.1e} at {sparsity:.0%}")
    return step(sparse, x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sparsity", type=float, nargs="+", default=SPARSITIES)
    args = parser.parse_args()
    for name, size in NETWORKS:
        torch.manual_seed(0)
        dense = build(name, 10, (3, size, size)).train()
        x = torch.randn(args.batch, 3, size, size)
        last = x.contiguous(memory_format=torch.channels_last)
        arms = {
            "contiguous": step(copy.deepcopy(dense), x),
            "channels_last": step(copy.deepcopy(dense).to(memory_format=torch.channels_last), last),
        }
        arms |= {f"{s:.0%}": ticket_step(dense, last, s) for s in args.sparsity}
        times = {arm: timing.median for arm, timing in interleave(arms, args.repeats).items()}
        best = min(times.pop("contiguous"), times.pop("channels_last"))
        print(
            f"\n{name}, {size}x{size}, batch {args.batch}, {torch.get_num_threads()} threads: dense {1e3 * best:.0f} ms"
        )
        print("sparsity | speed-up | ms")
        for arm, seconds in times.items():
            print(f"{arm} | {best / seconds:.2f}x | {1e3 * seconds:.0f}")


if __name__ == "__main__":
    main()
