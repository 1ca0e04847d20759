"""Dynamic sparse training of a named network on a named data set, checkpoints included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from . import checkpoint as checkpoints
from .compare import Settings, build, first_batch, load_data
from .planner import plan
from .search import dynamic
from .ticket import Ticket
from .train import History, Progress, train
from .train_config import sgd, steps_per_epoch


class _Choices:
    """What a run was asked for and which kernels it chose, kept in its checkpoint: going on takes the same ones."""

    def __init__(self, request: dict, checkpoint: Path) -> None:
        self.request, self.formats = request, None
        if checkpoint.exists():
            kept = (checkpoints.load(checkpoint).get("carry") or [{}])[0]
            checkpoints.check_same_run(checkpoint, {"identity": kept.get("request", {})}, request)
            self.formats = kept["formats"]

    def state_dict(self) -> dict:
        return {"request": self.request, "formats": self.formats}

    def load_state_dict(self, state: Mapping) -> None:
        """The constructor has read it: the formats are needed before there is a model to load."""


def find_dynamic(
    settings: Settings,
    checkpoint: str | Path,
    *,
    seed: int = 0,
    every: int | None = None,
    until: int | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    **options,
) -> tuple[Ticket, History, list[dict]]:
    """Train ``settings.model`` from a random mask with :func:`pysparse_ticket.dynamic`.

    Returns the final ticket, whose provenance holds the exploration rate R_s and whose rewind state is the trained
    weights, the training's history, and a row for each update (its step, drop fraction, moved weights, R_s).

    every    optimizer steps between updates; None for a 40th of all steps, at least 1, at most 100
    until    the step that ends them; None for 3/4 of all steps
    options  go to ``dynamic``: method, sparsity, distribution, drop, decay, regrow, dense

    An interrupted run goes on from ``checkpoint``, on the same kernels, and ends with the same bits. Raises ValueError
    when the checkpoint is of another run, and what ``dynamic``, ``train`` and the data's loader raise.
    """
    config = replace(settings.train, seed=seed)
    data = load_data(settings)
    steps = config.epochs * steps_per_epoch(config, len(data.train_labels))
    every = min(100, max(1, steps // 40)) if every is None else every
    until = 3 * steps // 4 if until is None else until
    options |= {"every": every, "until": until}
    request = {"data": settings.data, "model": settings.model, "size": data.shape[-1], **asdict(config), **options}
    choices = _Choices(request, Path(checkpoint))

    model = build(settings, data, seed)
    optimizer = sgd(model.parameters(), config)
    x, _ = first_batch(settings, data, seed)
    how = {"plan": choices.formats} if choices.formats is not None else {"sample": x}
    schedule = dynamic(model, optimizer, seed=seed, **how, **options)
    if choices.formats is None:
        choices.formats = {row.layer: row.format for row in plan(model).layers}

    def tick(progress: Progress) -> None:
        schedule.step()
        on_progress(progress)

    history = train(
        model, data, config, optimizer=optimizer, checkpoint=checkpoint, on_step=tick, carry=[choices, schedule]
    )
    schedule.close()
    ticket = schedule.ticket()
    ticket.provenance |= {"data": settings.data, "model": settings.model, "epochs": config.epochs}
    return ticket, history, schedule.history
