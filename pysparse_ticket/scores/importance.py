"""Layerwise importances: what a weight is worth beside the other unpruned weights of its own layer.

All are functions of magnitudes alone that rise with them inside a layer, so an importance only decides how much each
layer loses; which of its weights go is decided by magnitude (Vandersmissen et al. 2023, section 3). "lamp" is the
score of Lee et al. 2021, which that paper equates with its L2 though their denominators differ.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .magnitude import prunable


def identity(magnitudes: Tensor) -> Tensor:
    """|w|, one scale for all layers."""
    return magnitudes


def l1(magnitudes: Tensor) -> Tensor:
    """|w| / sum |w|; zeros in a layer of zeros."""
    return _share(magnitudes)


def l2(magnitudes: Tensor) -> Tensor:
    """w^2 / sum w^2, over the whole layer; zeros in a layer of zeros."""
    return _share(magnitudes.square())


def softmax(magnitudes: Tensor) -> Tensor:
    """exp |w| / sum exp |w|: close to 1 / n for small weights, so it prunes by the size of a layer."""
    return torch.softmax(magnitudes, 0)


def minmax(magnitudes: Tensor) -> Tensor:
    """(|w| - min) / (max - min); where all are equal 1, so that a layer's last weights stay, or 0 if they are zeros."""
    low, high = magnitudes.aminmax()
    if low == high:
        return torch.full_like(magnitudes, float(high > 0))
    return (magnitudes - low) / (high - low)


def lamp(magnitudes: Tensor) -> Tensor:
    """w^2 over the sum of the squares that are no smaller; of equal weights the earlier counts as the larger.

    The largest weight of a layer scores 1, so no layer can be emptied before all the others are down to one weight.
    """
    order = magnitudes.argsort(descending=True, stable=True)
    squares = magnitudes[order].square()
    sums = squares.cumsum(0)
    scores = torch.empty_like(squares)
    scores[order] = torch.where(sums > 0, squares / sums.clamp_min(torch.finfo(sums.dtype).tiny), 0)
    return scores


IMPORTANCES = {"magnitude": identity, "l1": l1, "l2": l2, "softmax": softmax, "minmax": minmax, "lamp": lamp}


def layerwise(name: str, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """{parameter name: float64 of the weight's shape}, the importance ``name`` over the unpruned weights of each layer
    and -inf where pruned.

    masks  {parameter name: bool}, True where unpruned; a weight without one is whole. What lies under the mask is
           never read.

    Raises ValueError for an unknown importance, and for NaN or inf in an unpruned weight.
    """
    if name not in IMPORTANCES:
        raise ValueError(f"unknown importance {name!r}; known: {', '.join(IMPORTANCES)}")
    scores = {}
    for key, weight in weights.items():
        weight = weight.detach()
        mask = torch.ones_like(weight, dtype=torch.bool) if masks is None or key not in masks else masks[key]
        unpruned = weight[mask.to(weight.device)].double().abs()
        if not unpruned.isfinite().all():
            raise ValueError(f"{key} holds NaN or inf; train or initialise the model before scoring it")
        score = torch.full(weight.shape, -torch.inf, dtype=torch.float64, device=weight.device)
        if unpruned.numel():
            score[mask.to(weight.device)] = IMPORTANCES[name](unpruned)
        scores[key] = score
    return scores


def as_score(name: str):
    """The importance as a score of a whole model, for :func:`pysparse_ticket.at_init`."""

    def score(model: nn.Module, batches=None, **_) -> dict[str, Tensor]:
        return layerwise(name, prunable(model))

    score.__name__, score.__doc__ = name, IMPORTANCES[name].__doc__
    return score


def _share(values: Tensor) -> Tensor:
    total = values.sum()
    return values / total if total > 0 else torch.zeros_like(values)
