"""The training runs of a recipe, each kept in files: done ones are not repeated, an interrupted one goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import pysparse_ticket as pst
from pysparse_ticket import checkpoint as checkpoints
from pysparse_ticket import data as datasets
from pysparse_ticket import models
from pysparse_ticket.files import write_whole
from pysparse_ticket.find import Place, train_levels
from pysparse_ticket.ticket import clone_state
from pysparse_ticket.train import TrainConfig, position, train
from pysparse_ticket.train_config import sgd, steps_per_epoch


class Runs:
    """Trains what one part of a recipe asks for. A run's name is that of its files in ``folder``."""

    def __init__(self, parts: Mapping[str, Any], part: str, folder: Path, root: str | None = None) -> None:
        self.parts, self.settings, self.folder, self.root = parts, parts[part], folder / part, root

    def beside(self, part: str) -> Runs:
        """The runs of another part of the table, in their own place."""
        return Runs(self.parts, part, self.folder.parent, self.root)

    @cached_property
    def data(self) -> datasets.ImageData:
        data = datasets.load(self.settings.data, root=self.root, **self.settings.load)
        data = data if self.settings.subset is None else data.subset(*self.settings.subset)
        return data.to(self.settings.train.device)

    def network(self, seed: int, name: str | None = None) -> nn.Module:
        """The network at its initialisation, the same for every run of a seed."""
        wanted, device = name or self.settings.network, self.settings.train.device
        return models.fresh(wanted, self.data.classes, self.data.shape, seed, device, width=self.settings.width)

    def batch(self, seed: int, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Training images drawn by the seed, not augmented, and their labels; one batch by default."""
        return self.data.plain_batch(self.data.draw(count or self.settings.train.batch_size, seed))

    def config(self, seed: int) -> TrainConfig:
        return replace(self.settings.train, seed=seed)

    @property
    def epoch_steps(self) -> int:
        return steps_per_epoch(self.settings.train, len(self.data.train_labels))

    def dense(self, name: str, seed: int, network: str | None = None, marks=()) -> tuple[dict, dict[int, dict]]:
        """Train the whole network: its accuracy in %, seconds, state ("model") and place; and its state and place after
        each step of ``marks``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        model, steps = self.network(seed, network), self.epoch_steps * self.settings.train.epochs
        checkpoint = self.folder / f"{name}.checkpoint"
        kept = {}
        for step in [*sorted(marks), steps]:
            path = self.folder / f"{name}-step-{step}.safetensors"
            if not path.exists():
                history = train(model, self.data, self.config(seed), checkpoint=checkpoint, stop_after=step)
                state = {"model": clone_state(model), "place": position(checkpoint)}
                if step == steps:
                    state |= {"accuracy": 100 * history.test_accuracy[-1], "seconds": history.seconds[-1]}
                checkpoints.save(path, state)
            kept[step] = checkpoints.load(path)
        checkpoint.unlink(missing_ok=True)
        return kept[steps], kept

    def ticket(
        self,
        name: str,
        seed: int,
        find: Callable[[], pst.Ticket],
        place: dict | None = None,
        network: str | None = None,
        order: int | None = None,
        weights: bool = False,
    ) -> dict:
        """Train the network of the ticket that ``find`` returns, from its rewind state and from ``place`` on.

        Returns accuracy and sparsity in %, seconds and, with ``weights``, the trained state ("model"). ``order`` seeds
        the order of the data in place of ``seed``.
        """
        result = self.folder / f"{name}.json"
        if result.exists():
            kept = {"model": checkpoints.load(self.folder / f"{name}.weights")} if weights else {}
            return json.loads(result.read_text()) | kept
        self.folder.mkdir(parents=True, exist_ok=True)
        path, chosen, checkpoint = (self.folder / f"{name}.{end}" for end in ("ticket", "plan", "checkpoint"))
        model = self.network(seed, network)
        if not path.exists():
            find().save(path)
        ticket = pst.Ticket.load(path, model)
        ticket.restore(model)
        plan = json.loads(chosen.read_text()) if chosen.exists() else self.settings.plan
        pst.sparsify(model, ticket, self.batch(seed)[0], plan=plan)
        formats = {row.layer: row.format for row in pst.plan(model).layers if row.format != "skipped"}
        write_whole(chosen, json.dumps(formats).encode())  # a resumed run takes the same kernels
        config = self.config(seed if order is None else order)
        history = train(model, self.data, config, checkpoint=checkpoint, start=place)
        facts = {"accuracy": 100 * history.test_accuracy[-1], "sparsity": 100 * ticket.sparsity}
        facts |= {"seconds": history.seconds[-1] - (place["seconds"] if place else 0.0)}
        if weights:
            checkpoints.save(self.folder / f"{name}.weights", clone_state(pst.densify(model)))
        write_whole(result, json.dumps(facts).encode())
        for file in (path, chosen, checkpoint):
            file.unlink(missing_ok=True)
        return self.ticket(name, seed, find, weights=True) if weights else facts

    def search(self, name: str, seed: int, network: str | None = None, **options) -> dict[int, dict]:
        """Iterated pruning by 20% a level to each of ``settings.rounds``: {level: accuracy, sparsity, seconds, path of
        its ticket, place of the rewind step}, the dense level 0 first."""
        done = self.folder / f"{name}.json"
        if not done.exists():
            self._search(name, seed, network, options, done)
        rows = {row["level"]: row for row in json.loads(done.read_text())}
        place = checkpoints.load(self.folder / f"{name}.place")
        for level, row in rows.items():
            row |= {"place": place, "ticket": self.folder / f"{name}-level-{level}.ticket"}
        return rows

    def _search(self, name: str, seed: int, network: str | None, options: Mapping, done: Path) -> None:
        config, levels = self.config(seed), (0, *self.settings.rounds)
        model = self.network(seed, network)
        optimizer = sgd(model.parameters(), config)
        place, rewind = Place(), self.settings.rewind_step
        rates = [round(1 - 0.8 ** (b - a), 12) for a, b in pairwise(levels)]
        search = pst.imp(
            model, optimizer, rate=rates, rewind_step=rewind, carry=[place], sample=self.batch(seed)[0],
            folder=self.folder / name, facts={"data": self.settings.data}, plan=self.settings.plan, **options,
        )  # fmt: skip
        run = partial(train, model, self.data, config, optimizer=optimizer)
        for level, history, seconds in train_levels(search, place, run, rewind_step=rewind):
            row = {
                "level": levels[level.index],
                "accuracy": 100 * history.test_accuracy[-1],
                "sparsity": 100 * level.sparsity,
                "seconds": seconds,
            }
            write_whole(level.folder / "result.json", json.dumps(row).encode())
        for level, index in zip(search.levels, levels, strict=True):
            level.ticket.save(self.folder / f"{name}-level-{index}.ticket")
        checkpoints.save(self.folder / f"{name}.place", place.kept)
        rows = [json.loads((level.folder / "result.json").read_text()) for level in search.levels]
        write_whole(done, json.dumps(rows).encode())
        shutil.rmtree(self.folder / name)
