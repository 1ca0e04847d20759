"""Controls that tell what of a ticket matters: its counts, its places or its weights (Chen et al. 2021, section 4)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ticket import Ticket, TicketError, clone_state
from .randomness import seeded


def shuffle_masks(ticket: Ticket, seed: int = 0) -> Ticket:
    """The ticket with each tensor's mask (or each convolution's filters) permuted: the same count in every layer, the
    same rewind state. TicketError for a ticket of layers, which has nothing within a layer to permute."""
    _check_maskable(ticket)
    generator = torch.Generator().manual_seed(seed)
    return replace(
        ticket,
        masks={name: shuffled(mask, generator) for name, mask in ticket.masks.items()},
        filters={name: shuffled(mask, generator) for name, mask in ticket.filters.items()},
        provenance=ticket.provenance | {"control": "shuffle", "control seed": seed},
    )


def shuffled(mask: Tensor, generator: torch.Generator) -> Tensor:
    """The mask with its entries permuted."""
    order = torch.randperm(mask.numel(), generator=generator)
    return mask.reshape(-1)[order].reshape(mask.shape)


def random_mask(ticket: Ticket, seed: int = 0) -> Ticket:
    """The ticket with as many weights in all, drawn at random from all masked tensors together; the same rewind state.

    TicketError for a ticket without masks: filters or blocks drawn at random are ``at_init(score="random")``.
    """
    if not ticket.masks:
        raise TicketError("only a ticket of masks can be drawn at random; use at_init(score='random') for pieces")
    masks = list(ticket.masks.values())
    sizes = [mask.numel() for mask in masks]
    drawn = torch.zeros(sum(sizes), dtype=torch.bool)
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))
    drawn[order[: sum(int(mask.sum()) for mask in masks)]] = True
    parts = zip(ticket.masks.items(), drawn.split(sizes), strict=True)
    return replace(
        ticket,
        masks={name: part.reshape(mask.shape) for (name, mask), part in parts},
        provenance=ticket.provenance | {"control": "random", "control seed": seed},
    )


def reinitialise(
    ticket: Ticket, model: nn.Module, seed: int = 0, init: Callable[[nn.Module], Any] | None = None
) -> Ticket:
    """The ticket with weights drawn anew in place of its rewind state (Liu et al. 2019; "Reinit" of Chen et al. 2021).

    ``model``, dense, is not touched: a copy is drawn by ``init(copy)``, or by every module's ``reset_parameters``,
    which are torch's defaults and not always what the model's own constructor draws.
    """
    ticket.check(model)
    return replace(
        ticket,
        rewind=fresh_state(model, seed, init),
        provenance=ticket.provenance | {"control": "reinit", "control seed": seed},
    )


def fresh_state(model: nn.Module, seed: int, init: Callable[[nn.Module], Any] | None = None) -> dict[str, Tensor]:
    """A state drawn on a copy of the model, with torch's generator seeded and then put back.

    ValueError for a module that holds parameters of its own and cannot draw them.
    """
    twin = copy.deepcopy(model)
    with seeded(twin, seed):
        if init is not None:
            init(twin)
        for name, module in twin.named_modules() if init is None else ():
            if callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()
            elif next(module.parameters(recurse=False), None) is not None:
                raise ValueError(
                    f"{name or 'the model'}, a {type(module).__name__}, has parameters and no reset_parameters(); pass "
                    "a function that draws the model's weights in place"
                )
    return clone_state(twin)


def _check_maskable(ticket: Ticket) -> None:
    if not ticket.masks and not ticket.filters:
        raise TicketError("the ticket has neither masks nor filters, so there is nothing within a layer to permute")
