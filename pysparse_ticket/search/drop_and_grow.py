"""One update of dynamic sparse training: which weights of a layer go and which come."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..select import highest

REGROW = ("keep", "zero", "never")


def drop_fraction(step: int, drop: float, decay: str, until: int | None) -> float:
    """Share of the active weights that go at an update: ``drop`` or, for decay "cosine",
    ``drop / 2 (1 + cos(pi step / until))`` (Evci et al. 2020, section 3, "update schedule")."""
    return drop if decay == "constant" else drop / 2 * (1 + math.cos(math.pi * step / until))


def drop_and_grow(
    weight: Tensor, mask: Tensor, growth: Tensor, count: int, regrow: str = "keep"
) -> tuple[Tensor, Tensor]:
    """One layer's update: exactly ``count`` weights go and ``count`` come.

    weight  the weights, zero where absent
    mask    bool, True where active
    growth  what an inactive weight would be worth
    regrow  whether a weight may come back in the update that dropped it: "keep", with its value, as in the authors'
            code; "zero", from zero, as in Evci et al. 2020, algorithm 1; or "never", and then at most as many weights
            go as are absent

    The active weights of the smallest magnitude go, then those that are worth most come, of all that are not active by
    then. Of equal ones the earlier survives and the earlier comes. Returns the new mask and which weights keep their
    value; all tensors of the weight's shape.
    """
    alive = int(mask.sum())
    if regrow == "never":
        count = min(count, mask.numel() - alive)
    kept = highest(weight.detach().double().abs().masked_fill(~mask, -torch.inf), alive - count)
    barred = mask if regrow == "never" else kept
    new = kept | highest(growth.double().masked_fill(barred, -torch.inf), count)
    return new, new & mask if regrow == "keep" else kept
