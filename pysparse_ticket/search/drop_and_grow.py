"""One update of dynamic sparse training: which weights of a layer go and which come."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
    active = mask.reshape(-1)
    alive = int(active.sum())
    if regrow == "never":
        count = min(count, active.numel() - alive)
    size = weight.detach().reshape(-1).double().abs().masked_fill(~active, -torch.inf)
    kept = _highest(size, alive - count)
    barred = active if regrow == "never" else kept
    new = kept | _highest(growth.reshape(-1).double().masked_fill(barred, -torch.inf), count)
    stays = new & active if regrow == "keep" else kept
    return new.reshape(mask.shape), stays.reshape(mask.shape)


def _highest(score: Tensor, count: int) -> Tensor:
    """bool, True at the ``count`` highest; of equal ones the earlier. Selecting takes a fraction of sorting."""
    if not count:
        return torch.zeros_like(score, dtype=torch.bool)
    last = score.topk(count, sorted=False).values.min()
    chosen = score > last
    ties = (score == last).nonzero().flatten()
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen
