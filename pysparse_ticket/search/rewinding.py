"""The state of a training run at one step, by copy: weights, buffers, optimizer, schedule, random generators."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoint import rng_state, set_rng_state
from ..ticket import clone_state


def check_carry(carry: Sequence[Any]) -> None:
    """ValueError naming the first object whose state can be neither kept nor put back."""
    for thing in carry:
        if not (isinstance(thing, torch.Generator | np.random.Generator) or _has_state_dict(thing)):
            raise ValueError(
                f"carry= holds a {type(thing).__name__}; it takes a torch or numpy Generator, or anything with "
                "state_dict() and load_state_dict(): a scheduler, a sampler, a gradient scaler"
            )


def group_names(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[list[str]]:
    """The model's parameter names in each of the optimizer's groups, in order; ValueError for a foreign parameter."""
    names = {p: n for n, p in model.named_parameters()}
    groups = optimizer.param_groups if optimizer is not None else ()
    for group in groups:
        for p in group["params"]:
            if p not in names:
                raise ValueError(
                    f"the optimizer holds a parameter of shape {tuple(p.shape)} that the model does not have, so it "
                    "could not be rewound; give that parameter an optimizer of its own"
                )
    return [[names[p] for p in group["params"]] for group in groups]


def capture(model: nn.Module, optimizer: torch.optim.Optimizer | None, carry: Sequence[Any], step: int) -> dict:
    """Everything that training goes on from, of a dense model. Nothing in it is shared with what goes on training."""
    state: dict[str, Any] = {"step": step, "model": clone_state(model)}
    if optimizer is not None:
        state["moments"] = {
            name: _copied(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state
        }
        state["groups"] = [_copied({k: v for k, v in g.items() if k != "params"}) for g in optimizer.param_groups]
    state["carry"] = [_state_of(thing) for thing in carry]
    state["rng"] = rng_state(_device(model))
    return state


def restore_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a dense state by copy, in the memory format in which it was kept: kernels and so bits depend on it."""
    for name, p in model.named_parameters():
        if name in state and state[name].stride() != p.stride() and state[name].shape == p.shape:
            p.data = torch.empty_strided(p.shape, state[name].stride(), dtype=p.dtype, device=p.device)
    model.load_state_dict(dict(state))


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, names: Sequence[Sequence[str]], state: Mapping, moments: bool
) -> None:
    """Parameters of the dense model in their first order, settings as kept; moments too, or none at all."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for group, members, kept in zip(optimizer.param_groups, names, state["groups"], strict=True):
        group.clear()
        group.update(params=[parameters[name] for name in members], **_copied(kept))
        for name in members:
            if not moments or name not in state["moments"]:
                continue
            p = parameters[name]
            on_device = bool(kept.get("capturable") or kept.get("fused"))
            optimizer.state[p] = {
                key: value.to(p.device, copy=True)
                if isinstance(value, Tensor) and (on_device or value.shape == p.shape)
                else copy.deepcopy(value)
                for key, value in state["moments"][name].items()
            }


def restore_carry(carry: Sequence[Any], state: Mapping) -> None:
    for thing, kept in zip(carry, state["carry"], strict=True):
        if isinstance(thing, torch.Generator):
            thing.set_state(kept["state"])
        elif isinstance(thing, np.random.Generator):
            thing.bit_generator.state = _numpy_typed(kept)
        else:
            thing.load_state_dict(_typed_like(copy.deepcopy(kept), thing.state_dict()))


def restore_rng(model: nn.Module, state: Mapping) -> None:
    set_rng_state(state["rng"], _device(model))


def digest(state: Mapping[str, Tensor]) -> str:
    """A short hash of every tensor's name and bits."""
    found = hashlib.sha256()
    for name, tensor in state.items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _has_state_dict(thing: Any) -> bool:
    return callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))


def _copied(values: Mapping) -> dict:
    return {k: v.detach().clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in values.items()}


def _state_of(thing: Any) -> dict:
    if isinstance(thing, torch.Generator):
        return {"state": thing.get_state()}
    if isinstance(thing, np.random.Generator):
        return _numpy_plain(thing.bit_generator.state)
    return copy.deepcopy(thing.state_dict())


def _numpy_plain(node: Any) -> Any:
    """A bit generator's state without arrays, which a checkpoint cannot hold."""
    if isinstance(node, dict):
        return {key: _numpy_plain(value) for key, value in node.items()}
    return {"array": node.tolist(), "dtype": str(node.dtype)} if isinstance(node, np.ndarray) else node


def _numpy_typed(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if node.keys() == {"array", "dtype"}:
        return np.array(node["array"], node["dtype"])
    return {key: _numpy_typed(value) for key, value in node.items()}


def _typed_like(stored: Any, live: Any) -> Any:
    """A Counter that came back from a file as a dict (MultiStepLR's milestones) is one again."""
    if isinstance(live, Counter):
        return Counter(stored)
    if isinstance(live, dict) and isinstance(stored, dict):
        return {key: _typed_like(value, live.get(key)) for key, value in stored.items()}
    if isinstance(live, list) and isinstance(stored, list) and len(live) == len(stored):
        return [_typed_like(s, v) for s, v in zip(stored, live, strict=True)]
    return stored
