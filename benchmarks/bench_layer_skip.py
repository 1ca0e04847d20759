"""A layer ticket's training step against the dense one; 12 of the 27 blocks of ResNet-56 are removed.

    python benchmarks/bench_layer_skip.py [--compile] [--bf16]

Forward, cross entropy, backward, SGD with momentum. Run layer by layer what is left is plain torch: so its rivals are
eager even with --compile, which would serve both alike, and the rates of both compare the time with the ratio of
multiply-adds. Run in one chain of batch tiles it meets compiled rivals too, and beside it stands the dense network in
such a chain: what the kernels give without removing anything.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator

import torch
from harness import Case, main
from networks import dense_rivals, network_arm, step_flops, to_channels_last

import pysparse_ticket as pst
from pysparse_ticket.models import build
from pysparse_ticket.nn.chain import tile_chain

MODEL, REMOVE, SIZE, BATCH = "resnet56", 12, 32, 128
SHAPE = f"{MODEL} {SIZE}x{SIZE}, batch {BATCH}"


def cases(_: str, options: argparse.Namespace) -> Iterator[Case]:
    torch.manual_seed(0)
    dense = build(MODEL, 10, (3, SIZE, SIZE))
    x, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(10, (BATCH,))
    eager = argparse.Namespace(**(vars(options) | {"compile": False}))
    case = Case(SHAPE, dense_rivals(dense, x, labels, eager), {"step": step_flops(dense, dense.stem, x)})
    ticket = pst.at_init(dense, x, score="random", granularity="layer", remove=REMOVE)
    for layout in ("contiguous", "channels_last"):
        model, data = (dense, x) if layout == "contiguous" else to_channels_last(dense, x)
        skipped = pst.sparsify(copy.deepcopy(model), ticket)
        blocks = dict(skipped.named_modules())
        if not all(isinstance(blocks[name], pst.nn.LayerSkip) for name in ticket.removed_blocks):
            raise SystemExit("a removed block is still there")
        flops = step_flops(skipped, skipped.stem, data)
        arm = f"{REMOVE} blocks removed, {layout}"
        case.arms.append(network_arm(arm, ticket.sparsity, skipped, data, labels, flops, options))
    yield case

    tiles = Case(f"{SHAPE}, tiles", dense_rivals(dense, x, labels, options), case.flops)
    for removed, arm in ((REMOVE, f"{REMOVE} blocks removed, one chain"), (0, "nothing removed, one chain")):
        model = pst.sparsify(copy.deepcopy(dense), ticket) if removed else copy.deepcopy(dense)
        flops = step_flops(model, model.stem, x)
        sparsity = ticket.sparsity if removed else 0.0
        tiles.arms.append(network_arm(arm, sparsity, tile_chain(model, whole=True), x, labels, flops, options))
    yield tiles


if __name__ == "__main__":
    main(__doc__, __file__, cases, [SHAPE])
