"""Scores that need no data."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of convolutions and linear layers, in model order; normalisation, biases and embeddings stay whole."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    owners = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    weights = {f"{name}.weight".removeprefix("."): model.get_submodule(name).weight for name in owners}
    if not weights:
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer to prune")
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
