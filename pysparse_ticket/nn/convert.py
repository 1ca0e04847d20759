"""From a dense model and a ticket to a model that runs sparse, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..planner import SLOWER_AT_MOST, LayerPlan, Plan, PlanCache, Site, find_sites, race, race_steps
from ..structure import FilterChain, filter_chains
from ..ticket import Ticket
from .filter_sparse_conv2d import CompactBatchNorm2d, FilterSparseConv2d
from .layer_skip import LayerSkip
from .masked import FORMATS, MaskedModule
from .masked_conv2d import MaskedConv2d
from .masked_linear import MaskedLinear

MASKED = {nn.Linear: MaskedLinear, nn.Conv2d: MaskedConv2d}


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
               training will have. With it each masked layer's formats are raced and the fastest kept, and the whole
               step is compared with the dense one. Without it every masked layer is packed.
    optimizer  its parameters are replaced by the surviving ones, momentum and moments included
    plan       "auto", "packed" or "dense" for all masked layers, or {layer name: format}, as for a rerun that must
               take the same kernels to end with the same bits

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
    forced = dict.fromkeys(owners, plan) if isinstance(plan, str) else dict(plan)
    for name, fmt in forced.items():
        if name not in owners:
            raise ValueError(f"the plan names {name}, which the ticket does not mask")
        if fmt not in (*FORMATS, "auto"):
            raise ValueError(f"unknown format {fmt!r} for {name}; known: {', '.join(FORMATS)}")
    auto = x is not None and (isinstance(plan, str) and plan == "auto")
    dense = copy.deepcopy(model) if auto and owners else None
    sites = find_sites(model, x, list(owners)) if x is not None else {}

    swaps = _Swaps(model)
    result = Plan()
    for name in ticket.removed_blocks:
        swaps.replace(name, LayerSkip())
        result.layers.append(LayerPlan(name, "block", (), 1.0, "skipped", chosen_us=0.0))
    _compact_filters(model, ticket, chains, swaps, result)
    cache = PlanCache()
    for name, mask in owners.items():
        fmt = forced.get(name, "auto")
        site = sites.get(name)
        masked, row = _masked(name, model.get_submodule(name), mask, fmt, site if auto else None, cache)
        row.shape = site.shape if site else ()
        swaps.replace(name, masked)
        result.layers.append(row)
    model = swaps.commit()
    cache.save()
    if dense is not None:
        _never_slower(dense, model, x, result)
    swaps.carry(optimizer)  # last, since going back to a dense format makes new parameters
    model._pysparse_plan = result
    return model


def densify(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Back to plain torch modules, in place: pruned weights are zeros, a removed block is an ``nn.Identity``."""
    swaps = _Swaps(model)
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
    for parameter, mask in ticket.masks.items():
        name, _, leaf = parameter.rpartition(".")
        module = model.get_submodule(name)
        if leaf != "weight" or type(module) not in MASKED:
            raise ValueError(
                f"{parameter} of a {type(module).__name__} cannot be sparse; only Linear and Conv2d weights can"
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
    model: nn.Module, ticket: Ticket, chains: dict[str, FilterChain], swaps: _Swaps, result: Plan
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


def _masked(
    name: str, module: nn.Module, mask: Tensor, fmt: str, site: Site | None, cache: PlanCache
) -> tuple[MaskedModule, LayerPlan]:
    masked = MASKED[type(module)].from_dense(module, mask)
    row = LayerPlan(name, type(module).__name__.lower(), (), 1 - float(mask.float().mean()), masked.format)
    if fmt != "auto":
        masked.set_format(fmt)
        row.format, row.why = masked.format, masked.why_dense or "asked for"
        return masked, row
    if masked.why_dense or site is None:
        row.why = masked.why_dense or "no sample to time it with"
        return masked, row

    def measure() -> dict[str, float]:
        packed, dense = copy.deepcopy(masked), copy.deepcopy(masked)
        dense.set_format("dense")
        return race({"plain": module, "dense": dense, "packed": packed}, site, module.weight.device)

    times = cache.get_or_race(cache.key(site, masked, "masked"), measure)
    row.dense_us = times["plain"]
    row.format = "packed" if times["packed"] <= times["plain"] else "dense"
    row.chosen_us = times[row.format]
    row.why = "fastest here" if row.format == "packed" else f"packed takes {times['packed'] / times['plain']:.2f} of it"
    masked.set_format(row.format)
    return masked, row


def _never_slower(dense: nn.Module, model: nn.Module, x: Tensor, result: Plan) -> None:
    """Compare whole steps; where the sparse one loses, every masked layer goes back to its dense format."""
    try:
        result.step_ratio = race_steps(dense, model, x)
    except (TypeError, AttributeError, RuntimeError) as error:  # an output that is no tensor, a frozen model
        result.notes.append(f"whole training step: not timed ({error})")
        return
    packed = {row.layer: row for row in result.layers if row.format == "packed"}
    if result.step_ratio <= SLOWER_AT_MOST or not packed:
        return
    for name, row in packed.items():
        model.get_submodule(name).set_format("dense")
        row.format, row.chosen_us = "dense", None
        row.why = f"the whole step took {result.step_ratio:.2f} of the dense step with packed layers"
    result.step_ratio = race_steps(dense, model, x)


class _Swaps:
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

    def carry(self, optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is not None:
            _carry(optimizer, {k: v for name, new in self.new.items() for k, v in _moves(self.old[name], new).items()})


def _moves(old: nn.Module, new: nn.Module) -> dict:
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
        elif isinstance(new, FilterSparseConv2d | CompactBatchNorm2d):
            moves[parameter] = (getattr(new, name), lambda t, name=name: new.compact_like(name, t))
        elif isinstance(old, FilterSparseConv2d | CompactBatchNorm2d):
            moves[parameter] = (getattr(new, name), lambda t, name=name: old.expand_like(name, t))
        else:
            moves[parameter] = (getattr(new, name), lambda t: t)
    return moves


def _carry(optimizer: torch.optim.Optimizer, moves: Mapping) -> None:
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
