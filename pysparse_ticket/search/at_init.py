"""Tickets at initialisation: one score, one granularity, one shot (Jordao et al. 2023, algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..granularity import expand_blocks, keep_n_of_m, parse, pool_blocks, pool_filters, pool_layers
from ..scores import lookup
from ..scores.gradient import Batch, Loss
from ..select import check_scores, drop_lowest_blocks, drop_lowest_filters, keep_top
from ..structure import filter_chains, find_blocks
from ..ticket import Ticket, clone_state, fingerprint


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
    allow_empty: bool = False,
    bn_mode: str = "train",
    loss: Loss = F.cross_entropy,
    seed: int = 0,
    rewind: bool = True,
) -> Ticket:
    """Find a ticket in the model as it is, without training it. The model is not changed.

    batches      (x, y) or a list of such pairs; the first x also finds the blocks, for which x alone will do
    score        magnitude, random, snip, grasp (theta Hg) or grasp-signed (theta g)
    granularity  "weight", "n:m" (as 2:4), "block:HxW" with ``sparsity``; "filter" or "layer" with ``remove``
    sparsity     share of the weights to remove, in [0, 1); n:m fixes its own
    remove       how many filters or blocks to remove
    aggregate    "sum" or "mean" of a piece's weight scores
    scope        "global" or "layer": where weights and blocks compete
    strict       layers: also spare the neighbours of downsampling blocks
    keep         layers: blocks that stay in every stage (2); filters: filters that stay in every convolution (1)
    allow_empty  accept masks that empty a tensor
    seed         of the random score
    rewind       store the model's state in the ticket

    Raises ValueError for an unknown name, a budget that cannot be met, or NaN in weights or scores.
    """
    kind, numbers = parse(granularity)
    scorer = lookup(score)
    if kind in ("layer", "filter"):
        if remove is None or sparsity is not None:
            raise ValueError(f"granularity {granularity!r} takes remove=, a count, and no sparsity=")
        if remove < 0:
            raise ValueError(f"remove must be 0 or more, not {remove}")
    elif remove is not None or (sparsity is None) != (kind == "n:m"):
        raise ValueError(
            f"granularity {granularity!r} takes {'neither' if kind == 'n:m' else 'sparsity='}, not remove="
        )

    if batches is not None and not isinstance(batches, Tensor | tuple | list):
        batches = list(batches)
    scores = scorer(model, batches, loss=loss, bn_mode=bn_mode, seed=seed)
    check_scores(scores)
    masks: dict[str, Tensor] = {}
    layers: dict[str, bool] = {}
    filters: dict[str, Tensor] = {}
    if kind == "layer":
        blocks = find_blocks(model, _first_input(batches), strict)
        pooled = _pool_block_scores(score, scores, blocks.candidates, aggregate, seed)
        dropped = drop_lowest_blocks(pooled, blocks.stages, blocks.stage_sizes, remove, 2 if keep is None else keep)
        layers = {name: name not in dropped for name in blocks.candidates}
    elif kind == "filter":
        pooled = pool_filters(scores, [chain.producer for chain in filter_chains(model)], aggregate)
        filters = drop_lowest_filters(pooled, remove, 1 if keep is None else keep)
    elif kind == "weight":
        masks = keep_top(scores, sparsity, scope, allow_empty)
    elif kind == "n:m":
        masks = {name: keep_n_of_m(s, *numbers) for name, s in scores.items()}
    else:
        tiles = keep_top(
            {n: pool_blocks(s, *numbers, aggregate) for n, s in scores.items()}, sparsity, scope, allow_empty
        )
        masks = {n: expand_blocks(tiles[n], s.shape, *numbers) for n, s in scores.items()}

    settings = {
        "search": "at_init",
        "score": score,
        "granularity": granularity,
        "sparsity": sparsity,
        "remove": remove,
        "aggregate": aggregate,
        "scope": scope,
        "strict": strict,
        "bn_mode": bn_mode,
        "seed": seed,
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
        draws = torch.rand(len(candidates), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return dict(zip(candidates, draws.tolist(), strict=True))
    return pool_layers(scores, candidates, aggregate)


def _first_input(batches) -> Tensor:
    if isinstance(batches, Tensor):
        return batches
    if isinstance(batches, tuple | list) and batches:
        first = batches[0]
        return first if isinstance(first, Tensor) else first[0]
    raise ValueError("finding the blocks needs data: pass batches=(x, y) or a list of such pairs")
