"""Random tickets of each size of piece, and a stack of a vision transformer's multilayer perceptrons."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pysparse_ticket as pst
from pysparse_ticket.measure import macs
from pysparse_ticket.structure import filter_chains, find_blocks
from pysparse_ticket.ticket import fingerprint

SMALLEST_BLOCK = 16


@dataclass(frozen=True)
class Kind:
    """ "layer", "filter", "weight" or "block 64", and the share removed: of blocks, multiply-adds or weights."""

    name: str
    share: float

    @property
    def arm(self) -> str:
        return self.name if not self.name.startswith("block") else f"{self.name} {self.share:.0%}"


def random_ticket(model: nn.Module, kind: Kind, sample: Tensor) -> pst.Ticket:
    """A ticket of the kind, from a fixed seed; the sample is one input of the model."""
    if kind.name == "layer":
        blocks = find_blocks(model, sample)
        remove = min(len(blocks.candidates), max(1, round(kind.share * len(blocks.all))))
        return pst.at_init(model, sample, score="random", granularity="layer", remove=remove)
    if kind.name.startswith("filter"):
        return filter_ticket(model, kind.share, sample)
    if kind.name.startswith("block"):
        return block_ticket(model, kind.share, int(kind.name.partition(" ")[2]))
    return pst.at_init(model, score="random", granularity="weight", sparsity=kind.share, scope="layer")


def block_ticket(model: nn.Module, share: float, side: int) -> pst.Ticket:
    """That share of the blocks of ``side`` x ``side`` removed at random from each linear layer and convolution, of a
    convolution blocks of output by input channels at one tap; of smaller blocks where a layer has fewer channels, and
    none of a layer with fewer than 16."""
    generator = torch.Generator().manual_seed(0)
    masks = {
        f"{name}.weight": block_mask(tuple(module.weight.shape), side, share, generator)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and min(module.weight.shape[:2]) >= SMALLEST_BLOCK
    }
    return pst.Ticket(masks=masks, architecture=fingerprint(model))


def block_mask(shape: tuple[int, ...], side: int, share: float, generator: torch.Generator | None = None) -> Tensor:
    """bool ``[O, C]`` or ``[O, C, kh, kw]``, exactly that share of the blocks removed, up to one; ``side`` is halved
    until it is not more than the layer's channels."""
    while side > SMALLEST_BLOCK and side > min(shape[:2]):
        side //= 2
    grid = (-(-shape[0] // side), -(-shape[1] // side), *shape[2:])
    count = torch.Size(grid).numel()
    kept = (torch.randperm(count, generator=generator) >= round(share * count)).view(grid)
    return kept.repeat_interleave(side, 0).repeat_interleave(side, 1)[: shape[0], : shape[1]]


def filter_ticket(model: nn.Module, share: float, sample: Tensor) -> pst.Ticket:
    """Filters removed at random from every convolution that can lose some, the same share of each, until that share of
    the multiply-adds is gone. What is kept of a convolution is a multiple of 8, which is what matrix units take."""
    producers = [chain.producer for chain in filter_chains(model)]
    whole = macs(model, sample)
    best = None
    for step in range(1, 19):
        generator = torch.Generator().manual_seed(0)
        filters = {}
        for name in producers:
            count = model.get_submodule(name).out_channels
            stay = max(8, round((1 - step / 20) * count / 8) * 8) if count >= 16 else max(1, count // 2)
            filters[name] = torch.randperm(count, generator=generator) < min(stay, count)
        best = pst.Ticket(filters=filters, architecture=fingerprint(model))
        if macs(pst.sparsify(copy.deepcopy(model), best), sample) <= (1 - share) * whole:
            break
    return best


class ViTStack(nn.Module):
    """Residual blocks of norm, linear, GELU, linear on tokens ``[N, T, width]``; the mean token is classified."""

    def __init__(self, width: int, hidden: int, depth: int, classes: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(MlpBlock(width, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x)).mean(1))


class MlpBlock(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))
