"""Exchange modules of a model, and what an optimizer knows of their parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .dense_state import DenseState
from .layer_skip import LayerSkip
from .masked import MaskedModule

Moves = dict[nn.Parameter, tuple[nn.Parameter | None, Callable[[Tensor], Tensor]]]


class Swaps:
    """Replacements collected first and made together, so that an error on the way leaves the model as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.old: dict[str, nn.Module] = {}
        self.new: dict[str, nn.Module] = {}

    def replace(self, name: str, module: nn.Module) -> None:
        self.old[name] = self.model.get_submodule(name)
        self.new[name] = module.train(self.old[name].training)

    def commit(self) -> nn.Module:
        for name, new in self.new.items():
            if name:
                self.model.set_submodule(name, new)
        return self.new.get("", self.model)

    def exchange(self, name: str, module: nn.Module) -> None:
        """Another replacement for a module whose first one is in the model already."""
        self.new[name] = module.train(self.new[name].training)
        self.model.set_submodule(name, self.new[name])

    def carry(self, optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is not None:
            carry(optimizer, {k: v for name, new in self.new.items() for k, v in _moves(self.old[name], new).items()})


def _moves(old: nn.Module, new: nn.Module) -> Moves:
    """{old parameter: (its successor or None, how a tensor of the old shape becomes one of the new)}."""
    if isinstance(new, LayerSkip | nn.Identity):
        return {p: (None, lambda t: t) for p in old.parameters()}
    moves = {}
    for name, parameter in old.named_parameters(recurse=False):
        successor = "weight" if name == "values" else name
        if isinstance(new, MaskedModule) and successor == "weight":
            moves[parameter] = (new.weight_parameter, new.compact_like)
        elif isinstance(old, MaskedModule) and successor == "weight":
            moves[parameter] = (new.weight, old.dense_like)
        elif isinstance(new, DenseState):
            moves[parameter] = (getattr(new, name), lambda t, name=name: new.compact_like(name, t))
        elif isinstance(old, DenseState):
            moves[parameter] = (getattr(new, name), lambda t, name=name: old.expand_like(name, t))
        else:
            moves[parameter] = (getattr(new, name), lambda t: t)
    return moves


def carry(optimizer: torch.optim.Optimizer, moves: Moves) -> None:
    """Swap parameters in the groups; per-parameter state of the parameter's shape is cut or spread with it."""
    for group in optimizer.param_groups:
        group["params"] = [
            moves[p][0] if p in moves else p for p in group["params"] if p not in moves or moves[p][0] is not None
        ]
    for old, (new, convert) in moves.items():
        state = optimizer.state.pop(old, None)
        if state is None or new is None:
            continue
        optimizer.state[new] = {
            key: convert(value).clone() if isinstance(value, Tensor) and value.shape == old.shape else value
            for key, value in state.items()
        }
