"""Which format each masked layer takes, and how the whole model runs: by racing them, or as the caller asked."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping

from torch import Tensor, nn

from ..planner import (
    MASKED_AT_MOST,
    SLOWER_AT_MOST,
    LayerPlan,
    Plan,
    PlanCache,
    Site,
    find_sites,
    race,
    race_steps,
)
from .chain import chained_layers, tile_chain
from .dense_state import DenseState
from .filter_sparse_conv2d import CompactBatchNorm2d, FilterSparseConv2d
from .fused_norms import FUSED_NORM, fuse_norms
from .linear_stack import stack_linears, stacked_layers
from .masked import MaskedModule
from .masked_conv2d import MaskedConv2d
from .masked_linear import MaskedLinear
from .swaps import Swaps

MASKED = {nn.Linear: MaskedLinear, nn.Conv2d: MaskedConv2d}
FORMATS = (*dict.fromkeys((*MaskedConv2d.FORMATS, *MaskedLinear.FORMATS)), "tiled", "stacked")
Formatted = MaskedModule | FilterSparseConv2d
ONE_PIECE = {"tiled": "chain of tiles", FUSED_NORM: "fused norms"}  # arms that some shapes of a run are refused by


def choose_layer(
    name: str, module: nn.Module, mask: Tensor, fmt: str, site: Site | None, cache: PlanCache, insist: bool
) -> tuple[MaskedModule, LayerPlan]:
    """The masked twin of a dense layer in the format asked for or, with a site to time it at, the fastest one.

    A layer that cannot be packed runs dense; with ``insist`` asking for it is an error.
    """
    masked = MASKED[type(module)].from_dense(module, mask)
    row = LayerPlan(name, type(module).__name__.lower(), site.shape if site else (), masked.sparsity, masked.format)
    if fmt == "stacked":  # dense, and with its neighbours one call
        fmt = "dense" if isinstance(masked, MaskedLinear) else "packed"
    if fmt not in ("auto", "tiled") and (insist or not masked.why_dense):
        reason = None if insist or fmt not in masked.FORMATS or fmt == "dense" else masked.why_not(fmt)
        masked.set_format(fmt if insist or (fmt in masked.FORMATS and not reason) else "packed")
        row.format, row.why = masked.format, f"no {fmt}: {reason}" if reason else "asked for"
        return masked, row
    if masked.why_dense or site is None:
        row.why = masked.why_dense or "no sample to time it with"
        return masked, row

    rivals, note = masked.rival_formats(site.shape), masked.race_note()
    packed = rivals if masked.why_not_raced else ("packed", *rivals)
    if not packed:
        masked.set_format("dense")
        row.format, row.why = "dense", "; ".join(filter(None, (masked.why_not_raced, note)))
        return masked, row
    other_density = 0.5 if mask.float().mean() < 0.4 else 0.2

    def measure() -> dict[str, float]:
        other = type(masked).from_dense(module, masked.random_mask(other_density).to(mask.device))
        arms = {"plain": module, "dense": _in_format(masked, "dense")}
        for one in packed:
            arms[one] = _in_format(masked, one)
            if one != "reordered" and not other.why_not(one):  # no random mask is uneven as this one is
                arms[f"other {one}"] = _in_format(other, one)
        return race(arms, site, module.weight.device)

    times = cache.get_or_race(
        cache.key("layer", module, site, round(masked.sparsity, 2), packed, *filter(None, [note])), measure
    )
    best = min(packed, key=times.__getitem__)
    row.dense_us = times["plain"]
    row.format = best if times[best] <= times["plain"] else "dense"
    row.chosen_us = times[row.format]
    if f"other {best}" in times:
        row.break_even = _break_even(
            times["plain"], times[best], times[f"other {best}"], 1 - masked.sparsity, other_density
        )
    row.why = "fastest here" if row.format == best else f"{best} takes {times[best] / times['plain']:.2f} of it"
    row.why = "; ".join(filter(None, (row.why, note, *(f"no {f}: {reason}" for f, reason in masked.left_out.items()))))
    masked.set_format(row.format)
    return masked, row


def choose_filters(
    model: nn.Module,
    x: Tensor | None,
    sites: Mapping[str, Site],
    forced: Mapping[str, str],
    swaps: Swaps,
    result: Plan,
    cache: PlanCache,
) -> None:
    """How each convolution of kept filters runs: as asked for or, with a sample to time it on, the fastest."""
    rows = {row.layer: row for row in result.layers if isinstance(model.get_submodule(row.layer), FilterSparseConv2d)}
    for name, row in rows.items():
        if forced.get(name) in ("fused", FUSED_NORM):
            model.get_submodule(name).set_format("fused")
            row.format, row.why = "fused", "asked for"
    if x is None:
        return
    here = find_sites(model, x, list(rows))
    for name, row in rows.items():
        module, dense = model.get_submodule(name), swaps.old[name]
        ways = [way for way in module.FORMATS if way != "fused" or not isinstance(module.padding, str)]

        def measure(name=name, module=module, dense=dense, ways=ways) -> dict[str, float]:
            arms = {way: _in_format(module, way) for way in ways}
            where = dict.fromkeys(ways, here[name]) | {"plain": sites[name]}
            return race({"plain": dense, **arms}, where, module.weight.device)

        key = cache.key("filters", dense, sites[name], here[name], tuple(module.weight.shape), ways)
        times = cache.get_or_race(key, measure)
        best = min(ways, key=times.__getitem__)
        module.set_format(best)
        row.shape, row.format = sites[name].shape, best
        row.dense_us, row.chosen_us, row.why = times["plain"], times[best], "fastest here of " + ", ".join(ways)


def _in_format(masked: Formatted, format: str) -> Formatted:
    copied = copy.deepcopy(masked)
    copied.set_format(format)
    return copied


def _break_even(plain: float, packed: float, packed_other: float, density: float, other: float) -> float | None:
    """The sparsity at which packed takes as long as plain, on the line through the two densities that were timed."""
    slope = (packed - packed_other) / (density - other)
    if slope <= 0:
        return None
    return min(1.0, max(0.0, 1 - (density + (plain - packed) / slope)))


def choose_model(
    dense: nn.Module | None,
    model: nn.Module,
    x: Tensor | None,
    forced: Mapping[str, str],
    swaps: Swaps,
    result: Plan,
    cache: PlanCache,
    only_blocks: bool,
) -> None:
    """Run the model in one piece, layer by layer or dense: raced against ``dense`` if given, else as asked for.

    ``only_blocks``: the ticket removes blocks and nothing else, so that whole convolutions form the chain of tiles.
    """
    if dense is None:
        if "tiled" in forced.values():
            _tile(model, result, "asked for", only_blocks)
        if "stacked" in forced.values():
            _stack(model, result, "asked for")
        if FUSED_NORM in forced.values():
            _fuse_norms(model, result, "asked for")
        return
    arms = {"dense": dense, "layers": model}
    if not x.is_cuda:  # chains of tiles and stacks are the CPU's; elsewhere they run their modules one by one
        try:
            arms["tiled"] = _tile(copy.deepcopy(model), whole=only_blocks)
        except ValueError as reason:
            result.notes.append(f"no chain of tiles: {reason}")
        _add_stacked(arms)
    if any(row.format == "fused" for row in result.layers):
        try:
            arms[FUSED_NORM] = _fuse_norms(copy.deepcopy(model))
        except ValueError as reason:
            result.notes.append(f"no fused norms: {reason}")
    formats = [(row.layer, row.format, round(row.sparsity, 2)) for row in result.layers]
    key = cache.key("step", dense, tuple(x.shape), x.stride(), formats, sorted(arms))
    try:
        try:
            times = cache.get_or_race(key, lambda: race_steps(arms, x))
        except ValueError as reason:  # shapes that only a run shows, such as a sum that broadcasts
            gone = [what for arm, what in ONE_PIECE.items() if arms.pop(arm, None) is not None]
            if not gone:
                raise
            result.notes.extend(f"no {what}: {reason}" for what in gone)
            times = cache.get_or_race(key, lambda: race_steps(arms, x))
    except (TypeError, AttributeError, RuntimeError) as error:  # an output that is no tensor, a frozen model
        result.notes.append(f"whole training step: not timed ({error})")
        return
    best = _fastest(times)
    result.step_ratio = times[best] / times["dense"]
    masked = any(isinstance(module, MaskedModule) for module in model.modules())
    limit = MASKED_AT_MOST if masked else SLOWER_AT_MOST
    if result.step_ratio > limit and {row.format for row in result.layers} - {"dense", "skipped"}:
        why = f"the whole step took {result.step_ratio:.2f} of the dense one's with sparse layers"
        run_dense(model, swaps, result, why)
        best, result.step_ratio = "layers", None
        result.notes.append(f"{why}, so every masked layer runs dense")
        arms = {"dense": dense, "layers": model}
        if not x.is_cuda and "stacked" in _add_stacked(arms):
            times = cache.get_or_race(f"{key} dense", lambda: race_steps(arms, x))
            best = _fastest(times)
            result.step_ratio = times[best] / times["dense"]
    if best == "tiled":
        why = f"in one chain, the whole step takes {result.step_ratio:.2f} of the dense one's"
        _tile(model, result, why, only_blocks)
    elif best == "stacked":
        _stack(model, result, f"as one call, the whole step takes {result.step_ratio:.2f} of the dense one's")
    elif best == FUSED_NORM:
        _fuse_norms(model, result, f"norm fused, the whole step takes {result.step_ratio:.2f} of the dense one's")


def _fastest(times: Mapping[str, float]) -> str:
    return min((name for name in times if name != "dense"), key=times.__getitem__)


def _add_stacked(arms: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """With the model of "layers" whose dense linear layers run as one call, if it has such."""
    with contextlib.suppress(ValueError):
        arms["stacked"] = stack_linears(copy.deepcopy(arms["layers"]))
    return arms


def run_dense(model: nn.Module, swaps: Swaps, result: Plan, why: str) -> None:
    """Every masked layer in format "dense"; compact layers become masked ones, their norms whole again."""
    for row in result.layers:
        module = model.get_submodule(row.layer)
        if isinstance(module, DenseState):
            plain = swaps.old[row.layer]
            masked = MASKED[type(plain)].from_dense(plain, module.mask)
            masked.set_format("dense")
            swaps.exchange(row.layer, masked)
        elif isinstance(module, MaskedModule) and module.packed:
            module.set_format("dense")
        else:
            continue
        row.format, row.chosen_us, row.why = "dense", None, why
    for name, module in list(model.named_modules()):
        if isinstance(module, CompactBatchNorm2d):
            swaps.exchange(name, swaps.old[name])


def _tile(model: nn.Module, result: Plan | None = None, why: str = "", whole: bool = False) -> nn.Module:
    names = chained_layers(model, whole)
    for name in names:
        if isinstance(model.get_submodule(name), MaskedModule):
            model.get_submodule(name).set_format("packed")
    tile_chain(model, whole)
    if whole and result:  # so that a rerun by name finds them
        result.layers += [LayerPlan(name, "conv2d", (), 0.0, "tiled") for name in names]
    _note(result, names, "tiled", why)
    return model


def _stack(model: nn.Module, result: Plan, why: str) -> None:
    names = stacked_layers(model)
    stack_linears(model)
    _note(result, names, "stacked", why)


def _fuse_norms(model: nn.Module, result: Plan | None = None, why: str = "") -> nn.Module:
    _note(result, fuse_norms(model), FUSED_NORM, why)
    return model


def _note(result: Plan | None, names: list[str], format: str, why: str) -> None:
    for row in result.layers if result else ():
        if row.layer in names:
            row.format, row.chosen_us, row.why = format, None, why
