"""Iterative magnitude pruning with rewinding, as rounds that the user's own training loop consumes.

Frankle et al. 2020 (rewinding to step k), Renda et al. 2020 (learning-rate rewinding), with the layerwise importances
of Vandersmissen et al. 2023, algorithm 2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..granularity import KEEP_N_OF_M, parse
from ..scores import IMPORTANCES
from ..scores.magnitude import PRUNABLE
from .pieces import Pieces, Schedule
from .rounds import Search

MODES = ("weights", "learning-rate")


def imp(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    importance: str = "magnitude",
    granularity: str = "weight",
    rounds: int | None = None,
    rate: float | Sequence[float] | None = None,
    sparsities: Sequence[float] | None = None,
    rewind_step: int = 0,
    mode: str = "weights",
    carry: Sequence[Any] = (),
    sample: Tensor | tuple | list | None = None,
    folder: str | Path | None = None,
    aggregate: str = "sum",
    scope: str = "global",
    spare: Sequence[str] = (),
    keep: int | None = None,
    coupled: bool = True,
    strict: bool = False,
    allow_empty: bool = True,
    control: str | None = None,
    init: Callable[[nn.Module], Any] | None = None,
    seed: int = 0,
    plan: str | Mapping[str, str] = "auto",
    facts: Mapping[str, Any] | None = None,
) -> Search:
    """Train, prune, rewind, again and again: an iterator of ``rounds`` + 1 levels, the first of them dense.

        for level in pst.imp(model, optimizer, rounds=3, rewind_step=100, carry=[scheduler], folder="runs/imp"):
            for step in range(level.start, steps):
                ...                             # train ``model`` with ``optimizer``
                level.step_done(step + 1)

    Between two levels the model is scored, rewound and made sparse in place, so every round trains on the sparse
    kernels. Its modules and Parameters change: take ``model.parameters()`` anew in each level, and wrap or compile it
    there. After the last level the model is the ticket's network, trained.

    optimizer    its parameters, momentum and settings are exchanged and rewound too; without it make one in each level
    importance   magnitude, l1, l2, softmax, minmax or lamp, over the unpruned weights of each layer
    granularity  "weight", "n:m", "n:mt" (transposable), "block:HxW", "filter" or "layer" (which needs ``sample``)
    rounds       10; rate: the share of what is left that a round removes, 0.2, or one a round. A round keeps
                 round((1 - rate) kept) of all weights (blocks of weights, filters, removable blocks), halves to the
                 even neighbour; where filters that go together cannot make that number, the nearest that they can, of
                 two the larger. "n:m" goes from m to n in ``rounds`` equal steps (m - n) and takes no rate
    sparsities   in place of a rate: the share of the pieces that is gone after each round
    rewind_step  the step to rewind to; kept when level 0 calls ``step_done`` with it
    mode         "weights" rewinds everything; "learning-rate" keeps the trained weights and buffers, rewinds schedule,
                 generators and optimizer settings, and starts with fresh moments
    carry        what else is rewound: schedulers, samplers, gradient scalers (state_dict and load_state_dict), torch
                 and numpy generators. Python's, numpy's and torch's global generators always are
    sample       an input batch, to race the kernels with; see :func:`pysparse_ticket.sparsify`, also for ``plan``
    folder       keeps every level in folder/<hash of the settings>/: called again with the same settings, done levels
                 are skipped and an interrupted one starts again, on the same kernels and so with the same bits
    aggregate    "sum" or "mean" of a piece's scores; scope: "global" or "layer", where weights and blocks compete
    spare        names of parameters or modules that are neither pruned nor counted, such as "fc"
    keep         layers: blocks that stay in every stage (2); filters: filters that stay in every convolution (1)
    coupled      filters: also those that go together, since their outputs are added, multiplied or filtered depthwise,
                 scored over all weights of their filters and counted as many; False takes only those that go alone
    strict       layers: also spare the neighbours of downsampling blocks
    allow_empty  accept masks that empty a tensor, as global magnitude does at the end (layer collapse)
    control      "random": pieces go at random; "shuffle": at random within each layer, as many as the importance would
                 take there; "reinit": each level starts from weights drawn anew (by ``init(model)``, or every module's
                 reset_parameters). ``seed`` is theirs
    facts        more of your settings, such as the data set's name, for the hash: anything JSON can hold

    Raises ValueError for unknown names, a schedule that would leave nothing, NaN in the weights, a rewind step that
    level 0 never reached, or a folder that holds another search; nothing is overwritten.
    """
    if importance not in IMPORTANCES:
        raise ValueError(f"unknown importance {importance!r}; known: {', '.join(IMPORTANCES)}")
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    if mode == "learning-rate" and control == "reinit":
        raise ValueError("control='reinit' draws weights anew and mode='learning-rate' keeps them; take one of the two")
    if init is not None and control != "reinit":
        raise ValueError("init= draws the weights of control='reinit'; without that control leave it out")
    if not isinstance(rewind_step, int) or rewind_step < 0:
        raise ValueError(f"rewind_step must be a whole number, at least 0, not {rewind_step}")
    if hasattr(model, "_pysparse_plan"):
        raise ValueError("the model is sparse already; a search starts from the dense one: pst.densify it first")
    if type(model) in PRUNABLE:
        raise ValueError(f"a lone {type(model).__name__} cannot be exchanged in place; put it in an nn.Sequential")
    n_of_m = parse(granularity)[0] in KEEP_N_OF_M
    if n_of_m and not (rate is None and sparsities is None):
        raise ValueError(f"granularity {granularity!r} fixes its own schedule: leave rate= and sparsities= out")
    x = sample[0] if isinstance(sample, tuple | list) else sample
    schedule = None if n_of_m else Schedule.of(rounds, rate, sparsities)
    pieces = Pieces(
        model,
        granularity,
        schedule,
        rounds=rounds,
        sample=x,
        how=aggregate,
        scope=scope,
        keep=keep,
        strict=strict,
        allow_empty=allow_empty,
        spare=spare,
        control=control,
        seed=seed,
        coupled=coupled,
    )
    settings = {
        "search": "imp",
        "importance": importance,
        "granularity": granularity,
        **({"rounds": pieces.rounds} if schedule is None else schedule.facts()),
        "rewind_step": rewind_step,
        "mode": mode,
        "aggregate": aggregate,
        "scope": scope,
        "spare": list(spare),
        "keep": pieces.keep,
        "strict": strict,
        **({"coupled": coupled} if granularity == "filter" else {}),
        "allow_empty": allow_empty,
        "control": control,
        "seed": seed,
        "plan": plan if isinstance(plan, str) else dict(plan),
        **(facts or {}),
    }
    try:
        json.dumps(settings)
    except TypeError as error:
        raise ValueError(f"facts= holds something that JSON cannot ({error}); give numbers and strings") from None
    return Search(model, optimizer, pieces, settings, carry=carry, sample=x, folder=folder, plan=plan, init=init)
