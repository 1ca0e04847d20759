"""sparsify with the plan's race, on small models and many tickets: the step must take at most 1.03 of the dense one's.

    python benchmarks/bench_never_slower.py [--shape resnet20 ...]

The races are run anew; an arm names the formats that they chose. The sample has the layout in which the dense model is
faster. The race knows no compiled model, so the rivals are eager even with --compile.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Iterator

import torch
from harness import Case, main, timed
from networks import dense_rivals, filter_ticket, network_arm, step_flops, to_channels_last
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.models import build

SHAPES = {  # model, image, batch, tickets
    "resnet20 32x32": ("resnet20", (3, 32, 32), 128, ("weight 50%", "filter 10%")),
    "resnet20 16x16": (
        "resnet20",
        (3, 16, 16),
        64,
        ("weight 20%", "weight 50%", "weight 90%", "filter 10%", "layer 2"),
    ),
    "lenet-300-100": ("lenet-300-100", (1, 28, 28), 128, ("weight 30%", "weight 60%")),
    "mlp-3": ("mlp-3", (3, 32, 32), 256, ("weight 30%", "weight 60%")),
}


def find(model: nn.Module, x: torch.Tensor, kind: str) -> pst.Ticket:
    """A random ticket of such a kind as ``weight 50%``, ``filter 10%`` or ``layer 2``."""
    granularity, _, amount = kind.partition(" ")
    if granularity == "layer":
        return pst.at_init(model, x, score="random", granularity="layer", remove=int(amount))
    share = float(amount.rstrip("%")) / 100
    if granularity == "filter":
        return filter_ticket(model, share)
    return pst.at_init(model, score="random", granularity="weight", sparsity=share)


def cases(shape: str, options: argparse.Namespace) -> Iterator[Case]:
    name, image, batch, kinds = SHAPES[shape]
    torch.manual_seed(0)
    dense = build(name, 10, image)
    x, labels = torch.randn(batch, *image), torch.randint(10, (batch,))
    eager = argparse.Namespace(**(vars(options) | {"compile": False}))
    rivals = dense_rivals(dense, x, labels, eager)
    first = next(n for n, m in dense.named_modules() if isinstance(m, nn.Conv2d | nn.Linear))
    case = Case(f"{shape}, batch {batch}", rivals, {"step": step_flops(dense, dense.get_submodule(first), x)})
    times = timed({layout: calls["step"] for layout, calls in rivals.items()}, options.seconds, options.repeats)
    if min(times, key=lambda layout: times[layout].median) == "channels_last":
        dense, x = to_channels_last(dense, x)
    for kind in kinds:
        ticket = find(dense, x, kind)
        with tempfile.TemporaryDirectory() as folder:
            os.environ["PYSPARSE_TICKET_CACHE"] = folder
            model = pst.sparsify(copy.deepcopy(dense), ticket, x)
        flops = step_flops(model, model.get_submodule(first), x)
        formats = sorted({layer.format for layer in pst.plan(model).layers})
        case.arms.append(
            network_arm(f"{kind}: {', '.join(formats)}", ticket.sparsity, model, x, labels, flops, options)
        )
    yield case


if __name__ == "__main__":
    main(__doc__, __file__, cases, list(SHAPES))
