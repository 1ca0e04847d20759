"""From a dense model and a ticket to a model that runs sparse, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..planner import LayerPlan, Plan, PlanCache, find_sites
from ..scores import prunable
from ..structure import FilterChain, filter_chains
from ..ticket import Ticket
from .chain import untile
from .choose import FORMATS, choose_layer, choose_model, run_dense
from .filter_sparse_conv2d import CompactBatchNorm2d, FilterSparseConv2d
from .layer_skip import LayerSkip
from .masked import MaskedModule
from .swaps import Swaps

COMPACT_FORMATS = ("compact", "tiled", "dense", "auto")  # of a layer that loses filters


def sparsify(
    model: nn.Module,
    ticket: Ticket,
    sample: Tensor | tuple | list | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    plan: str | Mapping[str, str] = "auto",
) -> nn.Module:
    """Turn the model into the ticket's network, in place, and return it. Its present weights are kept.

    sample     an input batch (or a batch whose first entry is the input), of the shape and memory format that
               training will have. With it each masked layer's formats are raced and the fastest kept; then the
               whole step is raced dense, layer by layer, and with the sparse convolutions in one chain of batch tiles
               (``nn/chain.py``), and the fastest kept. Without it every masked layer is packed.
    optimizer  its parameters are replaced by the surviving ones, momentum and moments included
    plan       "auto", or "packed", "dense" or "tiled" for all masked layers that can (a grouped one runs dense),
               "tiles" or "pixels" for the layout of the convolutions; or {layer name: format}, as for a rerun that
               must take the same kernels to end with the same bits. Layers that lose filters are "compact",
               "tiled" or, all of them, "dense"

    Raises TicketError when the ticket is for another architecture, ValueError for a layer that cannot be sparse or
    NaN in the weights; the model is then unchanged.
    """
    ticket.check(model)
    for name, parameter in model.named_parameters():
        if torch.isnan(parameter).any():
            raise ValueError(f"{name} holds NaN; a ticket of broken weights would train to nothing")
    x = sample[0] if isinstance(sample, tuple | list) else sample
    owners = _mask_owners(model, ticket)
    chains = _chains(model, ticket)
    insisted = {} if isinstance(plan, str) else dict(plan)
    compact = dict.fromkeys([*chains, *(chain.consumer for chain in chains.values())])
    forced = dict.fromkeys([*owners, *compact], plan) if isinstance(plan, str) else insisted
    for name, fmt in forced.items():
        if name not in owners and name not in compact:
            raise ValueError(f"the plan names {name}, which the ticket does not mask")
        known = (*FORMATS, "auto") if name in owners or isinstance(plan, str) else COMPACT_FORMATS
        if fmt not in known:
            raise ValueError(f"unknown format {fmt!r} for {name}; known: {', '.join(known)}")
    auto = plan == "auto" and x is not None and bool(owners or compact)
    dense = copy.deepcopy(model) if auto else None
    sites = find_sites(model, x, list(owners)) if auto else {}

    swaps, result, cache = Swaps(model), Plan(), PlanCache()
    for name in ticket.removed_blocks:
        swaps.replace(name, LayerSkip())
        result.layers.append(LayerPlan(name, "block", (), 1.0, "skipped", chosen_us=0.0))
    _compact_filters(model, ticket, chains, swaps, result)
    for name, mask in owners.items():
        masked, row = choose_layer(
            name, model.get_submodule(name), mask, forced.get(name, "auto"), sites.get(name), cache, name in insisted
        )
        swaps.replace(name, masked)
        result.layers.append(row)
    model = swaps.commit()
    if "dense" in (forced.get(name) for name in compact):
        run_dense(model, swaps, result, "asked for")
    choose_model(dense, model, x, forced, swaps, result, cache)
    cache.save()
    swaps.carry(optimizer)  # last, since a change of format makes new parameters
    model._pysparse_plan = result
    return model


def densify(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Back to plain torch modules, in place: pruned weights are zeros, a removed block is an ``nn.Identity``."""
    swaps = Swaps(untile(model))
    for name, module in list(model.named_modules()):
        if isinstance(module, LayerSkip):
            swaps.replace(name, nn.Identity())
        elif isinstance(module, MaskedModule | FilterSparseConv2d | CompactBatchNorm2d):
            swaps.replace(name, module.to_dense())
    model = swaps.commit()
    swaps.carry(optimizer)
    if hasattr(model, "_pysparse_plan"):
        del model._pysparse_plan
    return model


def _mask_owners(model: nn.Module, ticket: Ticket) -> dict[str, Tensor]:
    """{module name: mask} of the masked layers that stay and lose a weight."""
    owners = {}
    known = prunable(model) if ticket.masks else {}
    for parameter, mask in ticket.masks.items():
        name = parameter.rpartition(".")[0]
        if parameter not in known:
            raise ValueError(
                f"{parameter} of a {type(model.get_submodule(name)).__name__} cannot be sparse; only the weights of "
                "Linear and Conv2d that no other module shares can"
            )
        if any(name == b or name.startswith(f"{b}.") for b in ticket.removed_blocks) or mask.all():
            continue
        if name in ticket.filters:
            raise ValueError(f"the ticket gives {name} both a mask and filters; only one of them can be run")
        owners[name] = mask
    return owners


def _chains(model: nn.Module, ticket: Ticket) -> dict[str, FilterChain]:
    wanted = [name for name, kept in ticket.filters.items() if not kept.all()]
    if not wanted:
        return {}
    chains = {chain.producer: chain for chain in filter_chains(model)}
    for name in wanted:
        if name not in chains:
            raise ValueError(
                f"the filters of {name} do not feed one other convolution alone, so they cannot be removed"
            )
    return {name: chains[name] for name in wanted}


def _compact_filters(
    model: nn.Module, ticket: Ticket, chains: dict[str, FilterChain], swaps: Swaps, result: Plan
) -> None:
    keep_in = {chain.consumer: ticket.filters[name] for name, chain in chains.items()}
    for name in dict.fromkeys([*chains, *keep_in]):
        conv = model.get_submodule(name)
        kept = ticket.filters[name] if name in chains else torch.ones(conv.out_channels, dtype=torch.bool)
        compact = FilterSparseConv2d.from_dense(
            conv, kept, keep_in.get(name), compact_in=name in keep_in, compact_out=name in chains
        )
        swaps.replace(name, compact)
        removed = 1 - compact.weight.numel() / conv.weight.numel()
        result.layers.append(LayerPlan(name, "conv2d", (), removed, "compact"))
    for name, chain in chains.items():
        for norm in chain.norms:
            swaps.replace(norm, CompactBatchNorm2d.from_dense(model.get_submodule(norm), ticket.filters[name]))
