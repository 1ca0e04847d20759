"""Iterative pruning of a named network on a named data set; ``train`` trains each level, with checkpoints inside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from . import models
from .compare import Settings, build, first_batch, load_data
from .files import write_whole
from .search import imp
from .search.rounds import Level, Search
from .train import History, Progress, position, train
from .train_config import sgd, steps_per_epoch


class Place:
    """Where ``train`` stands, carried by a search, so that it is rewound with the weights."""

    def __init__(self) -> None:
        self.kept: dict | None = None

    def state_dict(self) -> dict:
        return {"position": self.kept}

    def load_state_dict(self, state: dict) -> None:
        self.kept = state["position"]


def train_levels(
    search: Search,
    place: Place,
    run: Callable[..., History],
    *,
    rewind_step: int = 0,
    on_step: Callable[[Level, Progress], None] = lambda *_: None,
) -> Iterator[tuple[Level, History, float]]:
    """Train each level of a search that carries ``place`` to its end, with a checkpoint in the level's folder.

    ``run`` is ``train`` with the search's model and optimizer, the data and the config. Yields the level, its history
    and its seconds from the rewind step on, which alone differ between levels; goes on at the last checkpoint.
    """
    for level in search:
        for done in search.levels:
            (done.folder / "training.checkpoint").unlink(missing_ok=True)
        checkpoint = level.folder / "training.checkpoint"
        go = partial(run, checkpoint=checkpoint, on_step=partial(on_step, level))
        if search.rewind is None:
            go(stop_after=rewind_step)
            place.kept = position(checkpoint)
            level.step_done(rewind_step)
        place.kept = search.rewind["carry"][0]["position"]
        history = go(start=place.kept)
        yield level, history, history.seconds[-1] - (place.kept["seconds"] if place.kept else 0.0)


def find_imp(
    settings: Settings,
    folder: Path,
    *,
    seed: int = 0,
    rewind_step: int = 0,
    on_progress: Callable[[str, int, int], None] = lambda *_: None,
    **options,
) -> tuple[Search, list[dict]]:
    """Run :func:`pysparse_ticket.imp` to its end; the search, and a row a level: sparsity, accuracy, training seconds
    from the rewind step on, which alone differ between levels.

    ``settings`` gives data, model and training; ``options`` go to ``imp``. Called again with the same arguments it goes
    on at the last checkpoint. Raises ValueError for a rewind step that is not before the last one, and what ``imp``,
    ``train`` and the data's loader raise.
    """
    data = load_data(settings)
    config = replace(settings.train, seed=seed)
    steps = config.epochs * steps_per_epoch(config, len(data.train_labels))
    if rewind_step >= steps:
        raise ValueError(f"rewind_step {rewind_step} is not before the last of {steps} steps; lower it or train longer")
    model = build(settings, data, seed)
    optimizer = sgd(model.parameters(), config)
    if options.get("control") == "reinit":
        fresh = partial(models.build, settings.model, data.classes, data.shape)
        options["init"] = lambda twin: twin.load_state_dict(fresh().state_dict())
    place = Place()
    search = imp(
        model,
        optimizer,
        rewind_step=rewind_step,
        carry=[place],
        sample=first_batch(settings, data, seed)[0],
        folder=folder,
        seed=seed,
        facts={"data": settings.data, "network": settings.model, "size": data.shape[-1]} | asdict(config),
        **options,
    )

    def tick(level: Level, progress: Progress) -> None:
        on_progress(f"level {level.index} of {search.rounds}, {level.sparsity:.1%}", progress.step, progress.steps)

    run = partial(train, model, data, config, optimizer=optimizer)
    for level, history, seconds in train_levels(search, place, run, rewind_step=rewind_step, on_step=tick):
        row = {
            "level": level.index,
            "sparsity": level.sparsity,
            "accuracy": history.test_accuracy[-1],
            "train_seconds": seconds,
        }
        write_whole(level.folder / "result.json", json.dumps(row).encode())
    return search, [json.loads((level.folder / "result.json").read_text()) for level in search.levels]
