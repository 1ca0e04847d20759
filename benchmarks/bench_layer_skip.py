"""A layer ticket's training step against the dense one, beside the ratio of their multiply-adds.

    python benchmarks/bench_layer_skip.py [--model resnet56] [--remove 12] [--size 32] [--batch 128] [--repeats N]

Both run in the faster of contiguous and channels_last, interleaved in one process: forward, backward and SGD step.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F

import pysparse_ticket as pst
from pysparse_ticket.measure import interleave, macs
from pysparse_ticket.models import build
from pysparse_ticket.report import machine_line


def training_step(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor):
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--remove", type=int, default=12)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    x, y = torch.randn(args.batch, 3, args.size, args.size), torch.randint(10, (args.batch,))
    dense = build(args.model, 10, x.shape[1:])
    ticket = pst.at_init(dense, x, score="random", granularity="layer", remove=args.remove)
    skipped = pst.sparsify(copy.deepcopy(dense), ticket)
    blocks = dict(skipped.named_modules())
    if not all(isinstance(blocks[name], pst.nn.LayerSkip) for name in ticket.removed_blocks):
        raise SystemExit("a removed block is still there")
    ratio = macs(dense, x[:1]) / macs(skipped, x[:1])
    arms = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        data = x.contiguous(memory_format=layout)
        for name, model in (("dense", dense), ("ticket", skipped)):
            arms[name, layout] = training_step(copy.deepcopy(model).to(memory_format=layout).train(), data, y)
    times = {name: timing.median for name, timing in interleave(arms, args.repeats).items()}
    best = {name: min(t for (arm, _), t in times.items() if arm == name) for name in ("dense", "ticket")}
    speedup = best["dense"] / best["ticket"]
    print(machine_line())
    print(f"{args.model}, {args.remove} blocks removed, {args.size}x{args.size}, batch {args.batch}: ", end="")
    print(
        f"dense {1e3 * best['dense']:.0f} ms, ticket {1e3 * best['ticket']:.0f} ms, speed-up {speedup:.2f}x, ", end=""
    )
    print(f"ratio of multiply-adds {ratio:.2f}, share reached {speedup / ratio:.2f}")


if __name__ == "__main__":
    main()
