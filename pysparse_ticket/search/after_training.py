"""Tickets from a trained network: score it, drop the lowest, rewind (Jordao et al. 2023, algorithm 1)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..granularity import pool_layers
from ..scores import BLOCK_SCORES, SCORES, lookup
from ..scores.activation import bypassed
from ..scores.batches import Batch, pairs_of
from ..scores.gradient import Loss
from ..select import check_scores, drop_lowest_blocks
from ..structure import find_blocks
from ..ticket import Ticket, fingerprint, odd_entry
from .at_init import at_init
from .controls import fresh_state
from .randomness import seeded


def after_training(
    model: nn.Module,
    batches: Iterable[Batch] | Batch | Tensor | None = None,
    *,
    score: str = "hrank",
    granularity: str = "layer",
    remove: int | None = None,
    sparsity: float | None = None,
    rewind: Mapping[str, Tensor] | None = None,
    reinit: bool | Callable[[nn.Module], Any] = False,
    steps: int | None = None,
    strict: bool = False,
    keep: int | None = None,
    aggregate: str = "sum",
    scope: str = "global",
    allow_empty: bool = False,
    bn_mode: str = "eval",
    loss: Loss = F.cross_entropy,
    seed: int = 0,
    **options,
) -> Ticket:
    """Find a ticket in a trained network and store the state to start from. The model is not changed.

        early = copy.deepcopy(model.state_dict())            # theta_i, after epoch i
        ...train on...
        ticket = pst.after_training(model, batches, score="kl", remove=5, rewind=early)
        ticket.restore(model); pst.sparsify(model, ticket)   # train again, the schedule from epoch i

    batches      (x, y) or a list of such pairs; x alone does for scores that need no labels
    score        of blocks: hrank, expectabs, kl, pls-vip, cka, cka-intra, filter-l1, random; or any score of weights,
                 pooled by ``aggregate``, as in :func:`at_init`
    granularity  "layer" with ``remove``; others as in :func:`at_init`, with a score of weights
    remove       how many blocks (or filters) to remove
    rewind       state_dict of the dense network to start from, stored by copy: an early epoch's for weight rewinding,
                 ``model.state_dict()`` for learning-rate rewinding; None stores none
    reinit       the control: start from random weights instead, drawn from ``seed`` on a copy by ``reinit(copy)`` or,
                 with True, by every module's own ``reset_parameters``: torch's defaults, not always those of the
                 model's constructor
    steps        layers: remove the blocks in so many rounds of nearly equal size, each scored without those gone before
                 (1); weights: as in :func:`at_init`
    strict       layers: also spare the neighbours of downsampling blocks
    keep         layers: blocks that stay in every stage (2); filters: filters that stay in every convolution (1)
    bn_mode      weight scores: batch norm on running ("eval") or batch ("train") statistics
    options      go to the score of blocks, as double_softmax=True to kl

    ``provenance["scores"]`` holds a block's score in the last round that it took part in. Raises ValueError for an
    unknown name, a budget that cannot be met, NaN, or a rewind state of another network.
    """
    state = _start(model, rewind, reinit, seed)
    if granularity != "layer":
        if score in BLOCK_SCORES and score not in SCORES:
            raise ValueError(f"score {score!r} is of blocks; use granularity='layer' or a score of weights")
        if options:
            raise ValueError(f"score {score!r} is of weights and takes no option {next(iter(options))!r}")
        ticket = at_init(
            model, batches, score=score, granularity=granularity, remove=remove, sparsity=sparsity, keep=keep,
            aggregate=aggregate, scope=scope, allow_empty=allow_empty, bn_mode=bn_mode, loss=loss, seed=seed,
            rewind=False, steps=steps,
        )  # fmt: skip
        ticket.rewind = state
        ticket.provenance |= {"search": "after_training", "reinit": bool(reinit)}
        return ticket

    if remove is None or sparsity is not None:
        raise ValueError("granularity 'layer' takes remove=, a count, and no sparsity=")
    if remove < 0:
        raise ValueError(f"remove must be 0 or more, not {remove}")
    steps = 1 if steps is None else steps
    if not 1 <= steps <= max(remove, 1):
        raise ValueError(f"steps must lie between 1 and remove={remove}, not {steps}")
    if score not in BLOCK_SCORES:
        if score not in SCORES:
            raise ValueError(f"unknown score {score!r}; known: {', '.join(dict.fromkeys([*BLOCK_SCORES, *SCORES]))}")
        if options:
            raise ValueError(f"score {score!r} is of weights and takes no option {next(iter(options))!r}")
    if batches is not None and not isinstance(batches, Tensor | tuple | list):
        batches = list(batches)

    blocks = find_blocks(model, pairs_of(batches)[0][0], strict)
    least = 2 if keep is None else keep
    sizes = blocks.stage_sizes
    drop_lowest_blocks(dict.fromkeys(blocks.candidates, 0.0), blocks.stages, sizes, remove, least)  # or say why not

    def scored(twin: nn.Module, names: list[str]) -> dict[str, float]:
        if score == "random":  # drawn once for all rounds
            drawn = BLOCK_SCORES[score](twin, batches, blocks.candidates, seed=seed)
            return {name: drawn[name] for name in names}
        if score in BLOCK_SCORES:
            return BLOCK_SCORES[score](twin, batches, names, **options)
        with seeded(twin, seed):
            weights = lookup(score)(twin, batches, loss=loss, bn_mode=bn_mode, seed=seed)
        check_scores(weights)
        return pool_layers(weights, names, aggregate)

    twin = copy.deepcopy(model)
    left, dropped, last = list(blocks.candidates), [], {}
    for step in range(steps):
        with bypassed(twin, dropped):
            scores = scored(twin, left)
        last |= scores
        count = remove * (step + 1) // steps - len(dropped)
        for name in drop_lowest_blocks(scores, blocks.stages, sizes, count, least):
            dropped.append(name)
            left.remove(name)
            sizes[blocks.stages[name]] -= 1

    return Ticket(
        layers={name: name not in dropped for name in blocks.candidates},
        rewind=state,
        architecture=fingerprint(model),
        provenance={
            "search": "after_training",
            "score": score,
            "granularity": granularity,
            "remove": remove,
            "steps": steps,
            "aggregate": aggregate,
            "strict": strict,
            "keep": least,
            "bn_mode": bn_mode,
            "seed": seed,
            "reinit": bool(reinit),
            "options": dict(options),
            "scores": {name: last[name] for name in blocks.candidates if name in last},
            "order": dropped,
            "torch": torch.__version__,
        },
    )


def _start(model: nn.Module, rewind, reinit, seed: int) -> dict[str, Tensor] | None:
    """The state that the ticket stores, by copy; ValueError where it is not one of this network."""
    if reinit:
        if rewind is not None:
            raise ValueError("reinit= starts from random weights, so it takes no rewind=")
        rewind = fresh_state(model, seed, reinit if callable(reinit) else None)
    if rewind is None:
        return None
    if odd := odd_entry(model, rewind, "nothing"):
        name, theirs, ours = odd
        raise ValueError(f"the rewind state is not of this network: it holds {theirs} under {name}, the model {ours}")
    return {name: rewind[name].detach().clone() for name in model.state_dict()}
