"""From scores and a budget to what survives: exact k of n, ties kept in model order, no layer emptied by accident."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

SCOPES = ("global", "layer", "erk")


def check_scores(scores: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming the first tensor with a score that is NaN."""
    for name, score in scores.items():
        if torch.isnan(score).any():
            raise ValueError(f"the scores of {name} hold NaN; look for NaN in its weights, its gradients or the data")


def budget(sparsity: float, total: int, step: int = 1, steps: int = 1) -> int:
    """How many of ``total`` pieces stay at this sparsity, rounded to the nearest.

    On the way there in ``steps`` steps, step e leaves total * density^(e / steps), e from 1 on: the exponential
    schedule of Tanaka et al. 2020, algorithm 1.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), not {sparsity}")
    return round((1 - sparsity) ** (step / steps) * total)


def erk_budgets(
    shapes: Mapping[str, Sequence[int]], sparsity: float, sizes: Mapping[str, int] | None = None
) -> dict[str, int]:
    """How many pieces each tensor keeps by the Erdos-Renyi-Kernel rule; their sum is exactly ``budget``.

    A tensor's density is proportional to (n_in + n_out + kh + kw) / (n_in n_out kh kw), a linear one's to
    (n_in + n_out) / (n_in n_out); those above 1 are made dense, and the rest is shared out again until none is above 1
    (Evci et al. 2020, section 3; Mocanu et al. 2018). What rounding down leaves over goes to the largest remainders,
    of equal ones to the earlier tensor.

    shapes  {name: the weight's shape}
    sizes   {name: how many pieces it consists of}, where these are not its weights (tiles)
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()} if sizes is None else sizes
    total = budget(sparsity, sum(sizes.values()))
    # exact: in floats the remainders of two tensors that tie differ in the last bit, and not by the rule
    shares = {name: Fraction(sum(shape) * sizes[name], math.prod(shape)) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        left = total - sum(sizes[name] for name in dense)
        share = sum(shares[name] for name in sizes if name not in dense)
        exact = {n: Fraction(sizes[n]) if n in dense else shares[n] * left / share for n in sizes}
        above = {n for n in sizes if n not in dense and exact[n] > sizes[n]}
        if not above:
            break
        dense |= above
    counts = {name: math.floor(value) for name, value in exact.items()}
    by_remainder = sorted(sizes, key=lambda n: counts[n] - exact[n])  # sorted is stable: model order within ties
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def keep_top(
    scores: Mapping[str, Tensor],
    sparsity: float,
    scope: str = "global",
    allow_empty: bool = True,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    step: int = 1,
    steps: int = 1,
) -> dict[str, Tensor]:
    """bool masks keeping the highest scores, exactly ``budget(sparsity, n)`` of them.

    scope        "global": n over all tensors; "layer": in each; "erk": over all, shared out by :func:`erk_budgets`
    allow_empty  False refuses masks that empty a tensor, naming it and the step
    shapes       the weights' shapes for "erk", where the scores are those of tiles
    step, steps  cut only as far as ``step`` of ``steps`` of the exponential schedule goes

    Of equal scores the earlier position survives. -inf marks what an earlier step has pruned; at most as many pieces
    as that step left are kept, so it stays pruned.
    """
    check_scores(scores)
    check_scope(scope)
    sizes = {name: score.numel() for name, score in scores.items()}
    if scope == "global":
        masks = highest_of(scores, budget(sparsity, sum(sizes.values()), step, steps))
    else:
        if scope == "layer":
            counts = {name: budget(sparsity, size, step, steps) for name, size in sizes.items()}
        else:
            last = erk_budgets(shapes or {n: s.shape for n, s in scores.items()}, sparsity, sizes)
            counts = {n: round(sizes[n] * (last[n] / sizes[n]) ** (step / steps)) for n in sizes}
        masks = {n: highest(s.double(), counts[n]) for n, s in scores.items()}
    if not allow_empty:
        for name, mask in masks.items():
            if not mask.any():
                raise ValueError(
                    f"a sparsity of {sparsity} would empty {name}{f' at step {step} of {steps}' if steps > 1 else ''}; "
                    f"lower it, use scope='layer' or allow_empty=True"
                )
    return masks


def check_scope(scope: str) -> None:
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}; known: {', '.join(SCOPES)}")


def highest(score: Tensor, count: int) -> Tensor:
    """bool of the score's shape, True at the ``count`` highest; of equal ones the earlier stays.

    A selection, which takes a fraction of a sort's time. -inf may be among the highest where nothing else is left.
    """
    if not count:
        return torch.zeros_like(score, dtype=torch.bool)
    flat = score.reshape(-1)
    last = flat.topk(count, sorted=False).values.min()
    chosen = flat > last
    ties = (flat == last).nonzero().flatten()
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen.reshape(score.shape)


def highest_of(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """bool masks of the ``count`` highest scores over all tensors; of equal ones the earlier in model order stays."""
    flat = torch.cat([score.reshape(-1).double() for score in scores.values()])
    parts = highest(flat, count).split([score.numel() for score in scores.values()])
    return {n: part.reshape(s.shape) for (n, s), part in zip(scores.items(), parts, strict=True)}


def drop_lowest_blocks(
    scores: Mapping[str, float], stages: Mapping[str, str], stage_sizes: Mapping[str, int], remove: int, keep: int = 2
) -> list[str]:
    """The ``remove`` lowest-scored blocks, lowest first, skipping a block whose stage would keep fewer than ``keep``.

    stages {block: its stage}, stage_sizes {stage: blocks in it, removable or not}. Jordao et al. 2023, A.1.
    """
    left = dict(stage_sizes)
    dropped: list[str] = []
    for block in sorted(scores, key=scores.__getitem__):  # sorted is stable: of equal scores the earlier block goes
        if len(dropped) == remove:
            break
        if left[stages[block]] - 1 >= keep:
            left[stages[block]] -= 1
            dropped.append(block)
    if len(dropped) < remove:
        raise ValueError(
            f"cannot remove {remove} blocks: of {len(scores)} candidates {len(dropped)} can go, "
            f"since every stage keeps at least {keep}"
        )
    return dropped


def drop_lowest_units(
    scores: Tensor, sizes: Sequence[int], groups: Sequence[Hashable], remove: int, keep: int = 1
) -> Tensor:
    """bool [units], False for units of exactly ``remove`` filters in all; every group keeps at least ``keep`` units.

    A unit counts as many filters as it has (``sizes``). The lowest score goes first; a unit is passed over where the
    exact count could not be met with it gone. Of equal scores the earlier unit survives. ValueError when no choice of
    units has exactly that many filters, with the nearest counts that there are.
    """
    left = Counter(groups)
    spare = {group: max(count - keep, 0) for group, count in left.items()}
    size_of = dict(zip(groups, sizes, strict=True))
    if any(size_of[group] != size for group, size in zip(groups, sizes, strict=True)):
        raise ValueError("the units of a group must have one size")

    def within(limit: int) -> int:
        """A bit for each number of filters, up to ``limit``, that the units left can still remove."""
        most: Counter[int] = Counter()
        for group, size in size_of.items():
            most[size] += min(spare[group], left[group])
        reached = 1
        for size, count in most.items():
            step = 1
            while count:
                step = min(step, count)
                reached |= reached << (step * size)
                count, step = count - step, 2 * step
                reached &= (2 << limit) - 1
        return reached

    total = sum(size_of[group] * spare[group] for group in size_of)
    if not within(remove) >> remove & 1:
        raise ValueError(_no_such_count(remove, sum(sizes), total, keep, within(total), set(sizes)))
    kept = torch.ones(len(sizes), dtype=torch.bool)
    mixed = set(sizes) != {1}
    # of equal scores the later position comes first
    for position in (len(sizes) - 1 - scores.double().flip(0).argsort(stable=True)).tolist():
        if not remove:
            break
        group, size = groups[position], sizes[position]
        left[group] -= 1
        if not spare[group] or size > remove:
            continue
        spare[group] -= 1
        if mixed and not within(remove - size) >> (remove - size) & 1:
            spare[group] += 1
            continue
        kept[position] = False
        remove -= size
    return kept


def _no_such_count(remove: int, filters: int, total: int, keep: int, reached: int, sizes: set[int]) -> str:
    if remove > total:
        return (
            f"cannot remove {remove} filters: of {filters} candidates {total} can go, "
            f"since every convolution keeps at least {keep}"
        )
    fewer = (reached & ((1 << remove) - 1)).bit_length() - 1
    more = next(n for n in range(remove + 1, total + 1) if reached >> n & 1)
    return (
        f"cannot remove exactly {remove} filters: coupled ones go together, {' or '.join(map(str, sorted(sizes)))} at "
        f"a time, so the nearest counts are {fewer} and {more}"
    )
