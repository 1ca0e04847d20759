"""What commands read of the user's files: states of weights, and networks like a ticket's."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .. import checkpoint as checkpoints
from .. import models
from ..ticket import FORMAT, Ticket


def read_states(paths: list[Path]) -> list[tuple[str, dict[str, Tensor]]]:
    """(name, dense state_dict) of each file; a folder of an iterated search gives the trained state of each level."""
    found = []
    for path in paths:
        files = sorted(path.glob("**/level-*/trained.safetensors")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"{path} holds no level of an iterated search; give that folder, or files")
        found += [(str(file), _read_state(file)) for file in files]
    return found


def _read_state(path: Path) -> dict[str, Tensor]:
    """A ticket's rewind state, a training checkpoint's weights, or the state that a search kept."""
    try:
        with safe_open(path, "pt") as file:
            is_ticket = (file.metadata() or {}).get("format") == FORMAT
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is neither a ticket nor a checkpoint: {error}") from None
    if is_ticket:
        state = Ticket.load(path).rewind
        if state is None:
            raise ValueError(f"the ticket {path} has no rewind state; find it with rewind=True")
        return state
    tree = checkpoints.load(path)
    state = tree["model"] if isinstance(tree, dict) and "model" in tree else tree
    if not (isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values())):
        raise ValueError(f"{path} holds no network's weights")
    return state


def network_like(name: str, ticket: Ticket, seed: int) -> tuple[nn.Module, Tensor]:
    """The named network, freshly drawn, with the inputs and classes of the ticket's, and an input of ones for it."""
    weights = [shape for _, shape in ticket.architecture if len(shape) > 1]
    if not weights:
        raise ValueError("this ticket does not record its network, so none can be built like it")
    first, classes = weights[0], weights[-1][0]
    flat = len(first) == 2
    # only the channels of a convolution's input show in its weights; 32x32 is enough for every network
    shape = (first[1], 1, 1) if flat and name.startswith(("mlp", "lenet")) else (1 if flat else first[1], 32, 32)
    return models.fresh(name, classes, shape, seed), torch.ones(1, *shape)
