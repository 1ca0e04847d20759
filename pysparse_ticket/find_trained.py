"""A ticket of a named network, trained on named data: train, keep an early state, score, rewind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from .compare import Settings, build, load_data
from .scores import BLOCK_SCORES, SCORES
from .search import after_training
from .ticket import Ticket, clone_state
from .train import History, Progress, train
from .train_config import steps_per_epoch

MODES = ("weights", "learning-rate")
_OF_THE_CHOICE = ("granularity", "remove", "sparsity", "steps", "strict", "keep", "aggregate", "scope", "allow_empty")


def find_trained(
    settings: Settings,
    checkpoint: str | Path,
    *,
    seed: int = 0,
    rewind_epoch: int = 0,
    mode: str = "weights",
    samples: int = 512,
    on_progress: Callable[[Progress], None] = lambda _: None,
    **options,
) -> tuple[Ticket, History]:
    """Train ``settings.model``, then :func:`pysparse_ticket.after_training` with the state after ``rewind_epoch``.

    ``mode="learning-rate"`` stores the trained weights instead, to train on with the schedule of ``rewind_epoch``.
    ``samples`` training images, drawn by ``seed`` and not augmented, are scored; ``options`` go to ``after_training``.
    An interrupted run goes on from ``checkpoint``, which holds the early state too, and ends with the same bits. Raises
    ValueError for a rewind epoch after the last one or unlike the checkpoint's, and what ``after_training``, ``train``
    and the loader raise; a score or a budget that cannot be, before training.
    """
    config = replace(settings.train, seed=seed)
    if not 0 <= rewind_epoch < config.epochs:
        raise ValueError(
            f"rewind_epoch must be one of 0 to {config.epochs - 1}, before the last epoch, not {rewind_epoch}"
        )
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    if mode == "learning-rate" and options.get("reinit"):
        raise ValueError("mode 'learning-rate' keeps the trained weights, reinit draws new ones; take one of the two")
    known = [*SCORES] if options.get("granularity", "layer") != "layer" else [*BLOCK_SCORES, *SCORES]
    if (score := options.get("score", "random")) not in known:
        raise ValueError(f"unknown score {score!r}; known: {', '.join(dict.fromkeys(known))}")
    if samples < 1:
        raise ValueError(f"scoring needs samples=1 or more, not {samples}")
    data = load_data(settings)
    model = build(settings, data, seed)
    drawn = data.draw(samples, seed)
    pairs = [data.plain_batch(index) for index in drawn.split(config.batch_size)]
    # the same choice by chance: what cannot be is said before the training, not after it
    after_training(model, pairs[:1], **{k: v for k, v in options.items() if k in _OF_THE_CHOICE} | {"score": "random"})
    early = clone_state(model)
    rewind_step = rewind_epoch * steps_per_epoch(config, len(data.train_labels))

    mark = torch.tensor(rewind_step)

    def check() -> None:  # going on from a checkpoint has copied its step into the mark
        if int(mark) != rewind_step:
            raise ValueError(
                f"{checkpoint} keeps the state of step {int(mark)}, not of epoch {rewind_epoch}; name another"
            )

    def tick(progress: Progress) -> None:
        check()
        if progress.step == rewind_step:
            for name, tensor in model.state_dict().items():
                early[name].copy_(tensor)
        on_progress(progress)

    history = train(model, data, config, checkpoint=checkpoint, on_step=tick, extra=early | {"rewind step": mark})
    check()
    rewind = clone_state(model) if mode == "learning-rate" else early
    rewind = None if options.get("reinit") else rewind
    ticket = after_training(model, pairs, rewind=rewind, seed=seed, **options)
    ticket.provenance |= {"data": settings.data, "model": settings.model, "epochs": config.epochs}
    ticket.provenance |= {"rewind_epoch": rewind_epoch, "mode": mode, "samples": len(drawn)}
    return ticket, history
