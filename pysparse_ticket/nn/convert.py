"""From a dense model and a ticket to a model that runs sparse, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..planner import LayerPlan, Plan, PlanCache, find_sites
from ..scores import prunable
from ..structure import Channels, find_channels
from ..ticket import Ticket, TicketError
from .chain import untile
from .choose import FORMATS, choose_filters, choose_layer, choose_model, run_dense
from .compact_layers import CompactDepthwiseConv2d, CompactLinear
from .dense_state import DenseState
from .filter_sparse_conv2d import CompactBatchNorm2d, FilterSparseConv2d
from .fused_norms import FUSED_NORM
from .layer_skip import LayerSkip
from .masked import MaskedModule
from .spare import spare_units, stay_zero
from .swaps import Swaps

# of a layer that loses filters or input channels
COMPACT_FORMATS = ("compact", "fused", FUSED_NORM, "tiled", "dense", "auto")


def sparsify(
    model: nn.Module,
    ticket: Ticket,
    sample: Tensor | tuple | list | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    plan: str | Mapping[str, str] = "auto",
    round_to: int | None = None,
) -> nn.Module:
    """Turn the model into the ticket's network, in place, and return it. Its present weights are kept.

    sample     an input batch (or a batch whose first entry is the input), of the shape and memory format that
               training will have. With it each masked layer's formats are raced and the fastest kept; then the
               whole step is raced: dense; layer by layer; in one chain of batch tiles (``nn/chain.py``: the sparse
               convolutions, or all of them where the ticket only removes blocks); dense linear layers as one call
               (``nn/linear_stack.py``); the norms behind "fused" convolutions in their ops (``nn/fused_norms.py``).
               The fastest is kept. Without a sample every masked layer is packed.
    optimizer  its parameters are replaced by the surviving ones, momentum and moments included
    plan       "auto", or "packed", "dense" or "tiled" for all masked layers that can (a grouped one runs dense),
               "stacked" for dense linear layers as one call, "tiles" or "pixels" for the layout of the convolutions,
               "2:4", "blocks" or "reordered" for linear layers that can; or
               {layer name: format}, as for a rerun that must take the same kernels to end with the same bits. Layers
               that lose filters are "compact", "fused", "fused norm", "tiled" or, all of them, "dense"
    round_to   filters are filled up with zeros to a multiple of this, where one step on the sample shows that they stay
               zero; None: 8 on a GPU, whose matrix units take channels by eights, else 1

    Raises TicketError when the ticket is for another architecture or removes a filter and keeps one that goes together
    with it (``structure.Channels``), ValueError for a layer that cannot be sparse or
    NaN in the weights; the model is then unchanged.
    """
    ticket.check(model)
    for name, parameter in model.named_parameters():
        if torch.isnan(parameter).any():
            raise ValueError(f"{name} holds NaN; a ticket of broken weights would train to nothing")
    x = sample[0] if isinstance(sample, tuple | list) else sample
    owners = _mask_owners(model, ticket)
    device = next((p.device.type for p in model.parameters()), "cpu")
    multiple = (8 if device == "cuda" and x is not None else 1) if round_to is None else round_to
    if multiple < 1 or (multiple > 1 and x is None):
        raise ValueError(
            f"round_to={round_to}: it is a number from 1 on, and above 1 it needs a sample to be checked on"
        )
    swaps, result, cache = Swaps(model), Plan(), PlanCache()
    compact, norms = _behind_filters(model, ticket, owners, multiple, x, result)
    insisted = {} if isinstance(plan, str) else dict(plan)
    forced = dict.fromkeys([*owners, *compact], plan) if isinstance(plan, str) else insisted
    for name, fmt in forced.items():
        if name not in owners and name not in compact:
            if fmt == "tiled" and isinstance(dict(model.named_modules()).get(name), nn.Conv2d):
                continue  # in the chain of a layer ticket
            raise ValueError(f"the plan names {name}, which the ticket does not mask")
        known = (*FORMATS, "auto") if name in owners else COMPACT_FORMATS
        known = tuple(dict.fromkeys((*FORMATS, *COMPACT_FORMATS))) if isinstance(plan, str) else known
        if fmt not in known:
            raise ValueError(f"unknown format {fmt!r} for {name}; known: {', '.join(known)}")
    only_blocks = bool(ticket.removed_blocks) and not owners and not compact
    auto = plan == "auto" and x is not None and bool(owners or compact or (only_blocks and not x.is_cuda))
    dense = copy.deepcopy(model) if auto else None
    sites = find_sites(model, x, [*owners, *compact]) if auto else {}

    for name in ticket.removed_blocks:
        swaps.replace(name, LayerSkip())
        result.layers.append(LayerPlan(name, "block", (), 1.0, "skipped", chosen_us=0.0))
    for name, module in compact.items():
        swaps.replace(name, module)
        old = model.get_submodule(name)
        removed = 1 - module.weight.numel() / old.weight.numel()
        result.layers.append(LayerPlan(name, type(old).__name__.lower(), (), removed, "compact"))
    for name, module in norms.items():
        swaps.replace(name, module)
    for name, mask in owners.items():
        masked, row = choose_layer(
            name, model.get_submodule(name), mask, forced.get(name, "auto"), sites.get(name), cache, name in insisted
        )
        swaps.replace(name, masked)
        result.layers.append(row)
    model = swaps.commit()
    if "dense" in (forced.get(name) for name in compact):
        run_dense(model, swaps, result, "asked for")
    else:
        # on the CPU there is one way besides the chain of tiles, and the race of whole steps decides
        choose_filters(model, x if auto and x.is_cuda else None, sites, forced, swaps, result, cache)
    choose_model(dense, model, x, forced, swaps, result, cache, only_blocks)
    swaps.carry(optimizer)  # last, since a change of format makes new parameters
    model._pysparse_plan = result
    return model


def densify(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Back to plain torch modules, in place: pruned weights are zeros, a removed block is an ``nn.Identity``."""
    swaps = Swaps(untile(model))
    for name, module in list(model.named_modules()):
        if isinstance(module, LayerSkip):
            swaps.replace(name, nn.Identity())
        elif isinstance(module, MaskedModule | DenseState):
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


def _behind_filters(
    model: nn.Module, ticket: Ticket, masked: Mapping[str, Tensor], multiple: int, x: Tensor | None, result: Plan
) -> tuple[dict[str, DenseState], dict[str, CompactBatchNorm2d]]:
    """{name: compact layer} and {name: compact norm} of what makes, reads or passes on a channel that is removed."""
    if all(kept.all() for kept in ticket.filters.values()):
        return {}, {}
    channels = find_channels(model)
    try:
        gone = channels.removed(ticket.filters)
    except ValueError as error:
        raise TicketError(str(error)) from None
    skipped = tuple(f"{name}." for name in ticket.removed_blocks)
    for name in dict.fromkeys([*channels.producers, *channels.readers]):
        units = (*channels.producers.get(name, ()), *channels.readers.get(name, ()))
        if name in masked and not name.startswith(skipped) and not gone.isdisjoint(units):
            raise ValueError(
                f"the ticket masks weights of {name} and removes channels that it makes or reads; only one of them can "
                "be run"
            )
    spare = spare_units(channels, gone, multiple)
    if spare:
        layers, norms = _compact_modules(model, channels, gone, spare, skipped)
        trial = Swaps(copy.deepcopy(model))
        for name, module in {**layers, **norms}.items():
            trial.replace(name, module)
        if stay_zero(trial.commit(), x):
            return layers, norms
        result.notes.append(f"filters are not filled up to multiples of {multiple}: the zeros would not stay zero")
    return _compact_modules(model, channels, gone, set(), skipped)


def _compact_modules(
    model: nn.Module, channels: Channels, gone: set[int], spare: set[int], skipped: tuple[str, ...]
) -> tuple[dict[str, DenseState], dict[str, CompactBatchNorm2d]]:
    def rows(units: Mapping[str, tuple[int, ...]], name: str) -> tuple[Tensor | None, Tensor]:
        """Which channels are held, None where all are and none is a zero; which are removed."""
        lost = torch.tensor([unit in gone for unit in units.get(name, ())], dtype=torch.bool)
        held = torch.tensor([unit not in gone or unit in spare for unit in units.get(name, ())], dtype=torch.bool)
        return held if lost.any() else None, lost

    layers: dict[str, DenseState] = {}
    for name in dict.fromkeys([*channels.producers, *channels.readers]):
        (keep_out, lost_out), (keep_in, lost_in) = rows(channels.producers, name), rows(channels.readers, name)
        if name.startswith(skipped) or (keep_out is None and keep_in is None):
            continue
        layers[name] = _compact(model.get_submodule(name), keep_out, keep_in)
        if spare:
            lost = {"out_index": lost_out if keep_out is not None else None}
            lost["in_index"] = lost_in if keep_in is not None else None
            layers[name].hold_spare(**{k: v for k, v in lost.items() if v is not None and hasattr(layers[name], k)})
    norms = {}
    for name in channels.norms:
        held, lost = rows(channels.norms, name)
        if not name.startswith(skipped) and held is not None:
            norms[name] = CompactBatchNorm2d.from_dense(model.get_submodule(name), held)
            if spare:
                norms[name].hold_spare(index=lost)
    return layers, norms


def _compact(layer: nn.Module, keep_out: Tensor | None, keep_in: Tensor | None) -> DenseState:
    if isinstance(layer, nn.Linear):
        return CompactLinear.from_dense(layer, keep_in)
    if layer.groups > 1:
        return CompactDepthwiseConv2d.from_dense(layer, keep_out)
    whole = torch.ones(layer.out_channels, dtype=torch.bool)
    return FilterSparseConv2d.from_dense(
        layer,
        whole if keep_out is None else keep_out,
        keep_in,
        compact_in=keep_in is not None,
        compact_out=keep_out is not None,
    )
