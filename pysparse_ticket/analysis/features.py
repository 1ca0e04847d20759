"""How alike the features of two networks are: linear CKA (Kornblith et al. 2019, 3)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..scores.activation import bypassed, outputs_of
from ..scores.batches import pairs_of
from ..scores.similarity import linear_cka
from ..structure import find_blocks
from ..ticket import Ticket, TicketError

cka = linear_cka


def cka_between(
    model_a: nn.Module, model_b: nn.Module, batches, layers: Sequence[str] | Mapping[str, str]
) -> dict[str, float]:
    """{layer of model_a: linear CKA of its output with the same layer's in model_b}, both in evaluation mode.

    layers   names of modules that both have, or {name in a: name in b}
    batches  x, (x, y) or a list of either; the outputs of every sample and layer are held at once

    Raises ValueError for a name that a model lacks. Neither model changes.
    """
    pairs = layers if isinstance(layers, Mapping) else {name: name for name in layers}
    features_a = outputs_of(model_a, batches, list(pairs), lambda out: out.flatten(1))
    features_b = outputs_of(model_b, batches, list(dict.fromkeys(pairs.values())), lambda out: out.flatten(1))
    return {a: linear_cka(features_a[a], features_b[b]) for a, b in pairs.items()}


def ticket_cka(model: nn.Module, ticket: Ticket, batches, layers: Sequence[str] | None = None) -> dict[str, float]:
    """Linear CKA between the dense network and the same weights with the ticket applied, layer by layer.

    ``layers`` defaults to the blocks that the ticket leaves. Between a dense and a ticket's network that were trained
    apart, as Jordao et al. 2023 report it, use :func:`cka_between`. Raises TicketError for a ticket of filters, whose
    compact network :func:`cka_between` compares too, and for one of another architecture.
    """
    ticket.check(model)
    if any(not kept.all() for kept in ticket.filters.values()):
        raise TicketError("this ticket removes filters: sparsify a copy of the model and compare by cka_between")
    if layers is None:
        removed = set(ticket.removed_blocks)
        layers = [b.name for b in find_blocks(model, pairs_of(batches)[0][0]).all if b.name not in removed]
        if not layers:
            raise ValueError(f"{type(model).__name__} has no blocks; pass layers=, the names of modules")
    twin = copy.deepcopy(model)
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for name, mask in ticket.masks.items():
            parameters[name].mul_(mask.to(parameters[name].device))
        with bypassed(twin, ticket.removed_blocks):
            return cka_between(model, twin, batches, layers)
