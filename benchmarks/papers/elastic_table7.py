"""Chen et al. 2021, Table 7: ImageNet's tickets trained on CIFAR-10, whose images are upsampled to the source's size.

The row labels and the text of the paper disagree on what was transferred to what. Run is the reading by the labels:
every row is ResNet-18 on CIFAR-10. "IMP" is found there by its own search; "ETT from Res-18" is the source data's own
ticket of ResNet-18, carried over as it is, data to data; "ETT from Res-26" is that of ResNet-26, squeezed as well.

The source is TinyImageNet in place of ImageNet, so that images go from 32x32 to 64x64, bilinearly. The sparsity is not
stated; 73.79% (six levels) is taken, that of the paper's ImageNet tables. A ticket brings its masks and rewound weights
but for the classifier: other classes need one of their own, which starts whole at its initialisation. Targets are
trained as the paper trains CIFAR-10, from that search's rewind step. One search on the source serves every seed.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from elastic_setup import DIGITS, DIGITS_16, IMAGENET, RESNET, quick
from recipe import Recipe, main
from torch import Tensor, nn

import pysparse_ticket as pst
from pysparse_ticket.data import ImageData
from pysparse_ticket.ticket import fingerprint

LEVEL = 6
SOURCES = (18, 26)
ROWS = {"Full": 95.21, "IMP": 95.42, "ETT from Res-18": 95.40, "ETT from Res-26": 95.16}
PAPER = {row: {"Res-18": value} for row, value in ROWS.items()}


def measure(runs, part, seed):
    source = runs.beside("source")
    found = {d: source.search(f"imp-{d}-0", 0, f"tiny-resnet{d}")[LEVEL] for d in SOURCES}
    if part == "source":
        for depth in SOURCES:
            yield "IMP on the source", f"Res-{depth}", found[depth]["accuracy"]
        return
    if runs.data.shape != source.data.shape:
        runs.data = upsampled(runs.data, source.data.shape[-1])
    own = runs.search(f"imp-18-{seed}", seed)
    yield "Full", "Res-18", own[0]["accuracy"]
    yield "IMP", "Res-18", own[LEVEL]["accuracy"]
    model = runs.network(seed)
    for depth in SOURCES:
        ticket = pst.Ticket.load(found[depth]["ticket"])
        find = partial(pst.elastic, with_classifier(ticket, model), None, model)
        result = runs.ticket(f"ett-{depth}-{seed}", seed, find, own[LEVEL]["place"])
        yield f"ETT from Res-{depth}", "Res-18", result["accuracy"]


def with_classifier(ticket: pst.Ticket, model: nn.Module) -> pst.Ticket:
    """The ticket with the model's own classifier, whole, in place of the one it has for other classes."""
    fresh = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items() if name.startswith("fc.")}
    shapes = dict(fingerprint(model))
    result = copy.copy(ticket)
    result.masks = ticket.masks | {"fc.weight": torch.ones(shapes["fc.weight"], dtype=torch.bool)}
    result.rewind = ticket.rewind | fresh
    result.architecture = tuple((n, shapes[n] if n.startswith("fc.") else shape) for n, shape in ticket.architecture)
    return result


def upsampled(data: ImageData, size: int) -> ImageData:
    """The set with its images ``[3, size, size]``; shifts grow with them, mean and std stay."""

    def larger(images: Tensor) -> Tensor:
        result = images.new_empty(*images.shape[:2], size, size)
        for small, large in zip(images.split(1000), result.split(1000), strict=True):
            pixels = F.interpolate(small.float(), size=(size, size), mode="bilinear", align_corners=False)
            large.copy_(pixels.round())
        return result

    crop = data.crop * size // data.shape[-1]
    return replace(data, train_images=larger(data.train_images), test_images=larger(data.test_images), crop=crop)


rounds = tuple(range(1, LEVEL + 1))
full = {
    "source": replace(IMAGENET, rounds=rounds),
    "target": replace(RESNET, network="tiny-resnet18", rounds=rounds),
}
RECIPE = Recipe(
    "elastic_table7",
    "Chen et al. 2021, Table 7: accuracy in % on upsampled CIFAR-10 (from ImageNet, ours from TinyImageNet)",
    PAPER,
    full,
    {
        "source": quick(full["source"], (LEVEL,), **DIGITS_16 | {"load": {"size": 16, "seed": 1}}),
        "target": quick(full["target"], (LEVEL,), **DIGITS),
    },
    measure,
)

if __name__ == "__main__":
    main(RECIPE)
