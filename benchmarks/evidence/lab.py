"""What every table shares: data, networks, one recipe, early states to rewind to, and a ticket's training."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

import pysparse_ticket as pst
from evidence.rows import Row, Store
from pysparse_ticket import data as datasets
from pysparse_ticket import models
from pysparse_ticket.compare import recipe
from pysparse_ticket.data import ImageData
from pysparse_ticket.report import machine, machine_line
from pysparse_ticket.ticket import clone_state
from pysparse_ticket.train import TrainConfig, position, train
from pysparse_ticket.train_config import sgd, steps_per_epoch


@dataclass(frozen=True)
class Setup:
    """One data set and one recipe; small on purpose, so that all tables take less than an hour on two cores."""

    data: str = "procedural"
    size: int = 16
    train: int = 2000
    test: int = 1000
    difficulty: float = 0.5
    width: int = 8
    epochs: int = 6
    batch_size: int = 64
    lr: float = 0.1
    rewind_epoch: int = 1
    rounds: int = 10
    scored: int = 256  # training images that scores see

    def load(self) -> ImageData:
        if self.data == "digits":
            return datasets.load("digits", size=self.size)
        counts = {"train": self.train, "test": self.test}
        return datasets.load(self.data, size=self.size, difficulty=self.difficulty, **counts)

    def config(self, seed: int) -> TrainConfig:
        return replace(recipe(self.epochs, self.batch_size, self.lr), seed=seed)

    def __str__(self) -> str:
        images = (
            f"{self.train}/{self.test} images, difficulty {self.difficulty}"
            if self.data != "digits"
            else "1437/360 images"
        )
        return (
            f"{self.data} {self.size}x{self.size} {images}; width {self.width}; {self.epochs} epochs, batch "
            f"{self.batch_size}, lr {self.lr}; rewound to epoch {self.rewind_epoch}; {self.scored} images scored"
        )


@dataclass
class Start:
    """A dense network after some epochs: the weights, and where ``train`` goes on from."""

    state: dict[str, Tensor]
    position: dict | None


@dataclass
class Lab:
    """A setup at work: every arm asks it for networks and trainings, and hands it the rows."""

    setup: Setup
    store: Store
    folder: Path  # tickets that later tables start from
    say: Callable[[str], None] = print
    facts: dict = field(default_factory=machine)

    def __post_init__(self) -> None:
        self.data = self.setup.load()
        self.start = cache(self._start)
        self.pairs = cache(self._pairs)

    @property
    def epoch_steps(self) -> int:
        return steps_per_epoch(self.setup.config(0), len(self.data.train_labels))

    @property
    def steps(self) -> int:
        return self.setup.epochs * self.epoch_steps

    def row(self, table: str, network: str, arm: str, level: object, seed: int, **values) -> Row:
        said = {"settings": str(self.setup), "revision": self.facts["revision"], "machine": machine_line(self.facts)}
        return Row(table, self.setup.data, network, arm, str(level), seed, **values, **said)

    def add(self, *rows: Row) -> None:
        self.store.add(rows)
        for row in rows:
            got = "" if row.accuracy is None else f" {row.accuracy:.2%}, trained {row.train_seconds:.1f} s"
            self.say(f"{row.table} {row.data} {row.network} {row.arm} {row.level} seed {row.seed}{got}")

    def build(self, network: str, seed: int) -> nn.Module:
        """The network at its initialisation, the same for every arm of a seed."""
        return models.fresh(network, self.data.classes, self.data.shape, seed, width=self.setup.width)

    def _pairs(self, seed: int) -> list[tuple[Tensor, Tensor]]:
        """The training images that scores see, in batches, not augmented."""
        drawn = self.data.draw(self.setup.scored, seed)
        return [self.data.plain_batch(index) for index in drawn.split(self.setup.batch_size)]

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return sgd(model.parameters(), self.setup.config(0))

    def train_until(self, model, optimizer, seed: int, epoch: int) -> dict | None:
        """Train from the start to the end of an epoch; the place to go on from, None for epoch 0."""
        if not epoch:
            return None
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "checkpoint"
            config = self.setup.config(seed)
            stop = epoch * self.epoch_steps
            train(model, self.data, config, optimizer=optimizer, checkpoint=checkpoint, stop_after=stop)
            return position(checkpoint)

    def _start(self, network: str, seed: int, epoch: int) -> Start:
        model = self.build(network, seed)
        place = self.train_until(model, self.optimizer(model), seed, epoch)
        return Start(clone_state(model), place)

    def train(self, model: nn.Module, seed: int, place: dict | None, optimizer=None, on_step=None) -> dict[str, float]:
        """Train to the end; accuracy, and seconds from the place on."""
        optimizer = optimizer or self.optimizer(model)
        config = self.setup.config(seed)
        history = train(model, self.data, config, optimizer=optimizer, start=place, on_step=on_step)
        before = place["seconds"] if place else 0.0
        return {"accuracy": history.test_accuracy[-1], "train_seconds": history.seconds[-1] - before}

    def run(self, row: Row, find: Callable[[nn.Module], pst.Ticket], epoch: int, extra: float = 0.0) -> None:
        """One arm: find a ticket, and train it on the sparse kernels from the epoch that it rewinds to.

        ``extra`` are seconds that the search took before. An arm that is stored is skipped.
        """
        if self.store.has(row):
            return
        model = self.build(row.network, row.seed)
        began = time.perf_counter()
        ticket = find(copy.deepcopy(model))
        found = extra + time.perf_counter() - began
        place = self.start(row.network, row.seed, epoch).position
        model = pst.sparsify(ticket.restore(model), ticket, plan=plan_of(ticket))
        values = self.train(model, row.seed, place)
        gone = sum(not mask.any() for mask in ticket.masks.values())
        self.add(
            self.row(
                row.table, row.network, row.arm, row.level, row.seed,
                sparsity=ticket.sparsity, find_seconds=found, emptied=float(gone), **values,
            )
        )  # fmt: skip

    def run_dense(self, table: str, network: str, seed: int, epoch: int) -> None:
        """The dense network, its seconds counted from the end of ``epoch`` on."""
        row = self.row(table, network, "dense", "0", seed)
        if self.store.has(row):
            return
        start = self.start(network, seed, epoch)
        model = self.build(network, seed)
        model.load_state_dict(start.state)
        values = self.train(model, seed, start.position)
        self.add(self.row(table, network, "dense", "0", seed, sparsity=0.0, find_seconds=0.0, **values))


def plan_of(ticket: pst.Ticket) -> str:
    """Tiles for all that is masked: no race, so the same kernels at every level and seed."""
    return "tiled" if ticket.masks or ticket.filters else "auto"
