"""Tickets at initialisation: one score, one granularity, in one shot or in steps, with no training.

Blocks of layers after Jordao et al. 2023, algorithm 2; steps after Tanaka et al. 2020, algorithm 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..granularity import KEEP_N_OF_M, expand_blocks, parse, pool_blocks, pool_layers, pool_units
from ..scores import lookup
from ..scores.activation import random_block
from ..scores.batches import Batch, first_input
from ..scores.gradient import Loss
from ..select import check_scope, check_scores, drop_lowest_blocks, drop_lowest_units, keep_top
from ..structure import find_blocks, find_channels
from ..ticket import Ticket, clone_state, fingerprint, odd_entry
from .randomness import seeded


def at_init(
    model: nn.Module,
    batches: Iterable[Batch] | Batch | Tensor | None = None,
    *,
    score: str = "grasp",
    granularity: str = "layer",
    sparsity: float | None = None,
    remove: int | None = None,
    aggregate: str = "sum",
    scope: str = "global",
    strict: bool = False,
    keep: int | None = None,
    coupled: bool = True,
    allow_empty: bool = False,
    bn_mode: str = "train",
    loss: Loss = F.cross_entropy,
    seed: int = 0,
    rewind: bool = True,
    steps: int | None = None,
    state: Mapping[str, Tensor] | None = None,
    in_shape: Sequence[int] | None = None,
) -> Ticket:
    """Find a ticket in the model as it is, or at a given state, without training it. The model is not changed.

    batches      (x, y) or a list of such pairs; the first x also finds the blocks, for which x alone will do
    score        magnitude, random, snip, grasp (theta Hg), grasp-signed (theta g), snip-scaled (SNIP of a re-drawn
                 copy, Lee et al. 2019), grasp-magnitude (|theta Hg|, Chen et al. 2021), synflow (no data)
    granularity  "weight", "n:m" (as 2:4), "n:mt" (transposable), "block:HxW" with ``sparsity``; "filter" or "layer"
                 with ``remove``
    sparsity     share of the weights to remove, in [0, 1); n:m fixes its own
    remove       how many filters or blocks to remove
    aggregate    "sum" or "mean" of a piece's weight scores
    scope        where weights and tiles compete: "global", "layer", or "erk", each layer with the share that
                 :func:`~pysparse_ticket.select.erk_budgets` gives it; score="random" makes that static random ERK
    strict       layers: also spare the neighbours of downsampling blocks
    keep         layers: blocks that stay in every stage (2); filters: filters that stay in every convolution (1)
    coupled      filters: also those that go together, since their outputs are added, multiplied or filtered depthwise;
                 False takes only filters that go alone. A coupled unit is scored over all weights of its filters and
                 counts as many filters as it has, so ``remove`` is the number of filters that the ticket marks
    allow_empty  accept masks that empty a tensor; the papers do, so set it when reproducing SNIP or SynFlow
    seed         of the random score, of snip-scaled's draw, and of dropout while gradients are taken
    rewind       store the state that was scored in the ticket
    steps        score and cut this many times, each time keeping density^(e / steps) of the weights; by default 100 for
                 synflow (Tanaka et al. 2020) and 1 for the others. Weights, tiles and n:m (which has at most m - n
                 steps); filters and layers go in one shot
    state        a state_dict to score and to rewind to instead of the model's own, as the weights of step k
    in_shape     of one input, without the batch dimension, where no batches are given

    Raises ValueError for an unknown name, a budget that cannot be met, a state of another architecture, or NaN in
    weights or scores.
    """
    kind, numbers = parse(granularity)
    scorer = lookup(score)
    if kind in ("layer", "filter"):
        if remove is None or sparsity is not None:
            raise ValueError(f"granularity {granularity!r} takes remove=, a count, and no sparsity=")
        if remove < 0:
            raise ValueError(f"remove must be 0 or more, not {remove}")
    elif remove is not None or (sparsity is None) != (kind in KEEP_N_OF_M):
        raise ValueError(
            f"granularity {granularity!r} takes {'neither' if kind in KEEP_N_OF_M else 'sparsity='}, not remove="
        )

    check_scope(scope)
    steps = _steps(steps, score, kind, numbers)

    if batches is not None and not isinstance(batches, Tensor | tuple | list):
        batches = list(batches)
    if state is not None:
        if odd := odd_entry(model, state, "missing"):
            name, theirs, ours = odd
            raise ValueError(f"the state is of another architecture: {name} is {theirs} in it and {ours} in the model")
        model = copy.deepcopy(model)
        model.load_state_dict(state)

    def judge(subject: nn.Module, kept: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        with seeded(subject, seed):
            scores = scorer(subject, batches, loss=loss, bn_mode=bn_mode, seed=seed, in_shape=in_shape, masks=kept)
        check_scores(scores)
        return scores

    masks: dict[str, Tensor] = {}
    layers: dict[str, bool] = {}
    filters: dict[str, Tensor] = {}
    if kind == "layer":
        scores = judge(model)
        blocks = find_blocks(model, _sample(model, batches, in_shape), strict)
        pooled = _pool_block_scores(score, scores, blocks.candidates, aggregate, seed)
        dropped = drop_lowest_blocks(pooled, blocks.stages, blocks.stage_sizes, remove, 2 if keep is None else keep)
        layers = {name: name not in dropped for name in blocks.candidates}
    elif kind == "filter":
        scores = judge(model)
        filters = _drop_filters(model, score, scores, aggregate, remove, 1 if keep is None else keep, coupled, seed)
    else:

        def cut(scores: dict[str, Tensor], step: int) -> dict[str, Tensor]:
            if kind == "weight":
                return keep_top(scores, sparsity, scope, allow_empty, step=step, steps=steps)
            if kind in KEEP_N_OF_M:
                n, m = numbers
                kept = round(m * (n / m) ** (step / steps))
                return {name: KEEP_N_OF_M[kind](s, kept, m) for name, s in scores.items()}
            shapes = {name: s.shape for name, s in scores.items()}
            tiles = {name: pool_blocks(s, *numbers, aggregate) for name, s in scores.items()}
            tiles = keep_top(tiles, sparsity, scope, allow_empty, shapes=shapes, step=step, steps=steps)
            return {name: expand_blocks(tiles[name], shape, *numbers) for name, shape in shapes.items()}

        masks = _cut_in_steps(model, judge, cut, steps)

    settings = {
        "search": "at_init",
        "score": score,
        "granularity": granularity,
        "sparsity": sparsity,
        "remove": remove,
        "aggregate": aggregate,
        "scope": scope,
        "strict": strict,
        "coupled": coupled,
        "bn_mode": bn_mode,
        "seed": seed,
        "steps": steps,
        "state": "model" if state is None else "given",
        "torch": torch.__version__,
    }
    return Ticket(
        masks={n: m.cpu() for n, m in masks.items()},
        layers=layers,
        filters={n: m.cpu() for n, m in filters.items()},
        rewind=clone_state(model) if rewind else None,
        architecture=fingerprint(model),
        provenance=settings,
    )


def _pool_block_scores(score, scores, candidates, aggregate: str, seed: int) -> dict[str, float]:
    if score == "random":  # a block's own U(0, 1): the sum over its weights would only rank blocks by their size
        return random_block(None, None, candidates, seed=seed)
    return pool_layers(scores, candidates, aggregate)


def _sample(model: nn.Module, batches, in_shape: Sequence[int] | None) -> Tensor:
    sample = first_input(batches)
    if sample is None and in_shape is not None:
        sample = torch.ones(1, *in_shape, device=next(model.parameters()).device)
    if sample is None:
        raise ValueError("finding the blocks needs data: pass batches=(x, y) or a list of such pairs")
    return sample


def _steps(steps: int | None, score: str, kind: str, numbers: tuple[int, int] | None) -> int:
    one_shot = kind in ("layer", "filter")
    if steps is None:
        steps = 100 if score == "synflow" and not one_shot else 1
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, not {steps}")
    if one_shot and steps > 1:
        raise ValueError(f"granularity {kind!r} at initialisation goes in one shot; leave steps out or pass steps=1")
    return min(steps, max(1, numbers[1] - numbers[0])) if kind in KEEP_N_OF_M else steps


def _cut_in_steps(
    model: nn.Module,
    judge: Callable[[nn.Module, Mapping[str, Tensor] | None], dict[str, Tensor]],
    cut: Callable[[dict[str, Tensor], int], dict[str, Tensor]],
    steps: int,
) -> dict[str, Tensor]:
    """Score, cut, set what was cut to zero, and score again; what is pruned scores -inf from then on."""
    if steps == 1:
        return cut(judge(model), 1)
    twin = copy.deepcopy(model)
    masks: dict[str, Tensor] = {}
    for step in range(1, steps + 1):
        scores = judge(twin, masks)
        masks = cut({n: s.masked_fill(~masks[n], -torch.inf) if masks else s for n, s in scores.items()}, step)
        with torch.no_grad():
            for name, mask in masks.items():
                twin.get_parameter(name).mul_(mask)
    return masks


def _drop_filters(
    model: nn.Module, score: str, scores: dict[str, Tensor], aggregate: str, remove: int, keep: int, coupled, seed: int
) -> dict[str, Tensor]:
    channels = find_channels(model)
    units = channels.units(coupled)
    if not units:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(channels.refused.items())[:3])
        why = "each is coupled with others, which coupled=True removes with it" if channels.units() else why
        raise ValueError(f"{type(model).__name__} has no filter that can be removed: {why}")
    if score == "random":  # a unit's own U(0, 1), as for blocks
        pooled = torch.rand(len(units), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    else:
        pooled = pool_units(scores, list(units.values()), aggregate)
    groups = [tuple(sorted(name for name, _ in unit)) for unit in units.values()]
    kept = drop_lowest_units(pooled, [len(unit) for unit in units.values()], groups, remove, keep)
    return channels.masks((unit for unit, stays in zip(units, kept.tolist(), strict=True) if not stays), coupled)
