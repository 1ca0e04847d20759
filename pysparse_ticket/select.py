"""From scores and a budget to what survives: exact k of n, ties kept in model order, no layer emptied by accident."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SCOPES = ("global", "layer")


def check_scores(scores: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming the first tensor with a score that is NaN."""
    for name, score in scores.items():
        if torch.isnan(score).any():
            raise ValueError(f"the scores of {name} hold NaN; look for NaN in its weights, its gradients or the data")


def budget(sparsity: float, total: int) -> int:
    """How many of ``total`` pieces stay at this sparsity, rounded to the nearest."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), not {sparsity}")
    return round((1 - sparsity) * total)


def keep_top(
    scores: Mapping[str, Tensor], sparsity: float, scope: str = "global", allow_empty: bool = True
) -> dict[str, Tensor]:
    """bool masks keeping the highest scores, exactly ``budget(sparsity, n)`` of them over all tensors or in each.

    Of equal scores the earlier position survives. ``allow_empty=False`` refuses masks that empty a tensor.
    """
    check_scores(scores)
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}; known: {', '.join(SCOPES)}")
    if scope == "layer":
        masks = {name: _keep(score.reshape(-1), sparsity).reshape(score.shape) for name, score in scores.items()}
    else:
        flat = torch.cat([score.reshape(-1).double() for score in scores.values()])
        parts = _keep(flat, sparsity).split([score.numel() for score in scores.values()])
        masks = {n: part.reshape(s.shape) for (n, s), part in zip(scores.items(), parts, strict=True)}
    if not allow_empty:
        for name, mask in masks.items():
            if not mask.any():
                raise ValueError(
                    f"a sparsity of {sparsity} would empty {name}; lower it, use scope='layer' or allow_empty=True"
                )
    return masks


def _keep(flat: Tensor, sparsity: float) -> Tensor:
    kept = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    order = flat.double().argsort(descending=True, stable=True)
    kept[order[: budget(sparsity, flat.numel())]] = True
    return kept


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


def drop_lowest_filters(scores: Mapping[str, Tensor], remove: int, keep: int = 1) -> dict[str, Tensor]:
    """bool [out channels] a convolution, exactly ``remove`` filters False, at least ``keep`` True in each."""
    check_scores(scores)
    flat = torch.cat([s.reshape(-1).double() for s in scores.values()])
    owner = torch.cat([torch.full((s.numel(),), i) for i, s in enumerate(scores.values())])
    left = [s.numel() for s in scores.values()]
    kept = torch.ones(flat.numel(), dtype=torch.bool)
    dropped = 0
    for position in flat.argsort(stable=True).tolist():
        if dropped == remove:
            break
        if left[owner[position]] > keep:
            left[owner[position]] -= 1
            kept[position] = False
            dropped += 1
    if dropped < remove:
        raise ValueError(
            f"cannot remove {remove} filters: of {flat.numel()} candidates {dropped} can go, "
            f"since every convolution keeps at least {keep}"
        )
    return dict(zip(scores, kept.split([s.numel() for s in scores.values()]), strict=True))
