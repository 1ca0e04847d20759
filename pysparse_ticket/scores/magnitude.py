"""Scores that need no data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PRUNABLE = (nn.Linear, nn.Conv2d)


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights that can be sparse: those of ``nn.Linear`` and ``nn.Conv2d``, in model order.

    Everything else stays whole: normalisation, biases, embeddings, other convolutions, a weight that two modules share,
    and subclasses such as the output projection of ``nn.MultiheadAttention``, which reads the weight past the module.
    Raises ValueError when nothing is left, or for NaN.
    """
    owners: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append(f"{name}.{leaf}".removeprefix("."))
    weights = {}
    for name, module in model.named_modules():
        if type(module) in PRUNABLE and len(owners[module.weight]) == 1:
            weights[f"{name}.weight".removeprefix(".")] = module.weight
    if not weights:
        raise ValueError(f"{type(model).__name__} has no Linear or Conv2d weight of its own to prune")
    for name, weight in weights.items():
        if torch.isnan(weight).any():
            raise ValueError(f"{name} holds NaN; train or initialise the model before scoring it")
    return weights


def magnitude(model: nn.Module, batches=None, **_) -> dict[str, Tensor]:
    """|theta|."""
    return {name: w.detach().abs().double() for name, w in prunable(model).items()}


def random(model: nn.Module, batches=None, *, seed: int = 0, **_) -> dict[str, Tensor]:
    """U(0, 1), drawn from its own generator, so that no other random state moves."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(w.shape, generator=generator, dtype=torch.float64).to(w.device)
        for name, w in prunable(model).items()
    }
