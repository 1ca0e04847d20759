"""Elastic Ticket Transformation: a ticket for a deeper or shallower network of the family, without a search.

Chen et al. 2021, "The Elastic Lottery Ticket Hypothesis", section 3.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..scores.batches import Batch
from ..scores.gradient import Loss, snip
from ..select import keep_top
from ..ticket import Architecture, Ticket, TicketError, clone_state, fingerprint
from .controls import shuffled
from .mapping import ORDERS, StageMap, check_stage, read_mapping, stage_mapping, write_mapping
from .randomness import seeded
from .units import Stage, Unit, find_stages, named_stages

CONTROLS = ("random-mask", "random-added", "reinit", "snip-added")


def elastic(
    ticket: Ticket,
    source: nn.Module | Architecture | None,
    target: nn.Module | Architecture,
    order: str = "append",
    *,
    units: int | str | None = None,
    mapping: str | None = None,
    stages: Sequence | None = None,
    control: str | None = None,
    batches: Iterable[Batch] | Batch | None = None,
    loss: Loss = F.cross_entropy,
    bn_mode: str = "train",
    seed: int = 0,
) -> Ticket:
    """Stretch or squeeze a weight ticket of ``source`` into one for ``target`` (Chen et al. 2021, section 3).

    Networks are stages of repeated units (``search.units.find_stages``). The first unit of a stage, the stem and the
    classifier are copied one to one; the other units of a stage are repeated to fill a deeper target, or dropped for a
    shallower one. One mapping carries masks, rewound weights, batch norm with its running statistics, and the record of
    the rewind step; every entry of the target is written exactly once, by copy. Train the result from the source's
    rewind step with a fresh optimizer. Neither network is changed.

    source, target  models, or their names and shapes (``ticket.fingerprint``); source None: the ticket's own record
    order           "append" (units 1 2 1 2) or "interpolate" (1 1 2 2); ``search.mapping.stage_mapping`` has the rule
                    for counts that do not divide, and for squeezes
    units           of each stage the first so many are repeated; None or "all" for all, which the paper found best
    mapping         your own, "src:dst[,dst...];...|...", a part a stage of two or more units, or one part for all of
                    them; ``order`` and ``units`` then count for nothing
    stages          what the units are, if their names do not show it: containers such as ["encoder.layers"], or two
                    lists of stages, the source's and the target's, each a list of units, each a module's name or a
                    tuple of several
    control         None, or what the ticket is judged against (the paper's figures 3 and 4): "random-mask" shuffles
                    each mask, "random-added" those of added units alone, "reinit" takes the target's own weights as
                    they are, "snip-added" masks the added units, ranked together, by SNIP at the source's sparsity
    batches         (x, y) or a list of such pairs for "snip-added", which scores the rewound target with the units
    loss, bn_mode   that are not added masked
    seed            of the controls' draws

    The sparsity is that of the source only nearly: provenance holds both, beside the mapping.
    Raises TicketError when ticket and networks do not belong together, for a ticket of layers or filters, and for one
    without a rewind state; ValueError for a bad argument or mapping.
    """
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}; known: {', '.join(ORDERS)}")
    if control is not None and control not in CONTROLS:
        raise ValueError(f"unknown control {control!r}; known: {', '.join(CONTROLS)}")
    if control in ("reinit", "snip-added") and not isinstance(target, nn.Module):
        raise ValueError(f"control {control!r} needs the target as a model, not as names and shapes")
    if units is not None and units != "all" and (isinstance(units, bool) or not isinstance(units, int)):
        raise ValueError(f"units must be 'all' or a count, not {units!r}")
    ours = _architecture_of(ticket, source)
    theirs = fingerprint(target) if isinstance(target, nn.Module) else tuple(target)

    ours_staged, theirs_staged = _stages(stages, dict(ours), dict(theirs))
    maps = _maps(ours_staged, theirs_staged, order, None if units == "all" else units, mapping)
    moves = [
        (unit, theirs_staged[i][place], nth > 0)
        for i, stage in enumerate(maps)
        for unit, places in ((ours_staged[i][s], places) for s, places in stage.items())
        for nth, place in enumerate(places)
    ]
    names = list(dict.fromkeys([*dict(ours), *ticket.rewind]))
    origin = _origins(names, moves, {module for stage in ours_staged for unit in stage for module in unit})
    _check(origin, ours, theirs, ticket.rewind, target.state_dict() if isinstance(target, nn.Module) else None)

    masks = {name: ticket.masks[origin[name]].clone() for name, _ in theirs if origin[name] in ticket.masks}
    rewind = {name: ticket.rewind[key].detach().clone() for name, key in origin.items() if key in ticket.rewind}
    added = tuple(f"{module}." for _, unit, extra in moves if extra for module in unit)
    if control in ("random-added", "snip-added") and not added:
        raise ValueError(f"control {control!r} masks added units, but this mapping adds none")
    if control == "reinit":
        rewind = clone_state(target)
    elif control == "snip-added":
        masks |= _snip_masks(target, masks, rewind, added, ticket.sparsity, batches, loss, bn_mode, seed)
    elif control is not None:
        draws = torch.Generator().manual_seed(seed)
        for name, mask in masks.items():
            if control == "random-mask" or name.startswith(added):
                masks[name] = shuffled(mask, draws)

    result = Ticket(masks=masks, rewind=rewind, architecture=theirs)
    result.provenance = {
        "search": "elastic",
        "order": order if mapping is None else None,
        "units": (units or "all") if mapping is None else None,
        "mapping": write_mapping([maps[i] for i in _spelled(ours_staged, theirs_staged)] or [{0: (0,)}]),
        "control": control,
        "seed": seed,
        "sparsity": result.sparsity,
        "source_sparsity": ticket.sparsity,
        "source": ticket.provenance,
    }
    if "rewind_step" in ticket.provenance:
        result.provenance["rewind_step"] = ticket.provenance["rewind_step"]
    return result


def _architecture_of(ticket: Ticket, source: nn.Module | Architecture | None) -> Architecture:
    if ticket.layers or ticket.filters:
        kind = "layers" if ticket.layers else "filters"
        raise TicketError(f"this ticket removes {kind}; elastic transfer carries masks of weights alone")
    if ticket.rewind is None:
        raise TicketError("this ticket has no rewind state to carry over; find it with rewind=True")
    if isinstance(source, nn.Module):
        ticket.check(source)
        return fingerprint(source)
    ours = ticket.architecture if source is None else tuple((name, tuple(shape)) for name, shape in source)
    if not ours:
        raise TicketError("this ticket does not record its network; pass the source model")
    if ticket.architecture and ours != ticket.architecture:
        raise TicketError("the ticket is for another architecture than the source given")
    return ours


def _stages(stages: Sequence | None, ours: Mapping, theirs: Mapping) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
    if stages is None:
        found = find_stages(ours), find_stages(theirs)
    elif not isinstance(stages, str) and all(isinstance(stage, str) for stage in stages):
        found = named_stages(stages, ours), named_stages(stages, theirs)
    elif len(stages) == 2 and not any(isinstance(stage, str) for stage in stages):
        found = named_stages(stages[0], ours), named_stages(stages[1], theirs)
    else:
        raise ValueError(
            "stages is a list of container names, or two lists: the source's stages of units, the target's"
        )
    if len(found[0]) != len(found[1]):
        raise TicketError(
            f"the source has {len(found[0])} stages, the target {len(found[1])}: a transfer keeps their number, within "
            f"one family of networks; name the repeated units by stages= if they were not found"
        )
    return found


def _spelled(ours: Sequence[Stage], theirs: Sequence[Stage]) -> list[int]:
    """The stages that a mapping string spells out: all but those of a lone unit on both sides."""
    return [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if len(a) > 1 or len(b) > 1]


def _maps(ours, theirs, order: str, units: int | None, mapping: str | None) -> list[StageMap]:
    """One mapping a stage."""
    sizes = [(len(a), len(b)) for a, b in zip(ours, theirs, strict=True)]
    if mapping is None:
        return [stage_mapping(*size, order, units) for size in sizes]
    spelled = _spelled(ours, theirs)
    given = read_mapping(mapping)
    if len(given) == 1:
        given *= len(spelled)
    if len(given) != len(spelled):
        raise ValueError(f"the mapping has {len(given)} stages, the networks have {len(spelled)} of two or more units")
    maps: list[StageMap] = [{0: (0,)} for _ in sizes]
    for number, (i, stage) in enumerate(zip(spelled, given, strict=True), 1):
        check_stage(stage, *sizes[i], number)
        maps[i] = stage
    return maps


def _origins(names: Sequence[str], moves: Sequence[tuple[Unit, Unit, bool]], in_units: set[str]) -> dict[str, str]:
    """{entry of the target: the entry of the source that fills it}."""
    pairs = [(name, name) for name in names if not any(name.startswith(f"{module}.") for module in in_units)]
    for old, new, _ in moves:
        if len(old) != len(new):
            raise ValueError(f"unit {old} has {len(old)} modules and unit {new} {len(new)}; name as many in both")
        for before, after in zip(old, new, strict=True):
            pairs += [(after + name.removeprefix(before), name) for name in names if name.startswith(f"{before}.")]
    origin: dict[str, str] = {}
    for name, key in pairs:
        if name in origin:
            raise TicketError(f"{name} of the target would be written twice, from {origin[name]} and {key}")
        origin[name] = key
    return origin


def _check(
    origin, ours: Architecture, theirs: Architecture, rewind: Mapping[str, Tensor], state: Mapping | None
) -> None:
    """Every entry of the target has one source of its shape, and the mapping writes nothing else."""
    shapes, wanted = dict(ours), dict(theirs)
    if absent := [name for name in shapes if name not in rewind]:
        raise TicketError(f"the ticket's rewind state lacks {absent[0]}; find it again with rewind=True")
    shapes |= {name: tuple(tensor.shape) for name, tensor in rewind.items()}
    if state is None:
        extra = [name for name, key in origin.items() if name not in wanted and key in dict(ours)]
    else:
        wanted |= {name: tuple(tensor.shape) for name, tensor in state.items()}
        extra = [name for name in origin if name not in wanted]
    for name, shape in wanted.items():
        key = origin.get(name)
        if key is None:
            raise TicketError(f"{name} of the target has no counterpart in the source: another family of networks")
        if shapes[key] != shape:
            raise TicketError(
                f"{name} of the target has shape {list(shape)}, {key} of the source {list(shapes[key])}: elastic "
                f"transfer changes the depth alone"
            )
    if extra:
        raise TicketError(f"{origin[extra[0]]} of the source has no place in the target: another family of networks")


def _snip_masks(
    target: nn.Module, masks, rewind, added: tuple[str, ...], sparsity: float, batches, loss, bn_mode: str, seed: int
) -> dict[str, Tensor]:
    """Masks of the added units by SNIP (Lee et al. 2019), scored in the rewound target with the others masked."""
    twin = copy.deepcopy(target)
    twin.load_state_dict(rewind)
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            if name in masks and not name.startswith(added):
                weight *= masks[name].to(weight.device)
    with seeded(twin, seed):
        scores = snip(twin, batches, loss=loss, bn_mode=bn_mode)
    pooled = {name: score for name, score in scores.items() if name in masks and name.startswith(added)}
    return {name: mask.cpu() for name, mask in keep_top(pooled, sparsity).items()}
