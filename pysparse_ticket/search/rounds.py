"""The rounds of an iterated search, and what happens to the model between two of them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..nn import densify, sparsify
from ..planner import plan as plan_of
from ..scores import layerwise
from ..ticket import Ticket, clone_state
from .controls import fresh_state
from .level_store import LevelStore
from .pieces import Pieces
from .rewinding import (
    capture,
    check_carry,
    digest,
    group_names,
    restore_carry,
    restore_model,
    restore_optimizer,
    restore_rng,
)


@dataclass(eq=False)
class Level:
    """One round of a search, the body of one turn of the user's loop.

    index     0 is dense
    start     the step that this round's training goes on from: 0 in level 0, then the rewind step
    ticket    what this round trains
    seconds   wall time of the body, once it is done
    folder    where the level is kept, None without one; a place for checkpoints inside the level
    """

    index: int
    start: int
    ticket: Ticket
    seconds: float | None = None
    folder: Path | None = None
    last_step: int | None = None
    _keep: Callable[[int], None] | None = None

    @property
    def sparsity(self) -> float:
        return self.ticket.sparsity

    def step_done(self, step: int) -> None:
        """Say, when all of a step is done (the schedule's step too), that ``step`` steps are done.

        In level 0 this keeps the rewind state at the rewind step. ValueError when steps do not rise from ``start``.
        """
        last = self.start if self.last_step is None else self.last_step
        if step <= last:
            raise ValueError(
                f"step_done({step}) came after step {last} of level {self.index}; a level trains "
                "`for step in range(level.start, steps)` and ends each step with level.step_done(step + 1)"
            )
        self.last_step = step
        if self._keep is not None:
            self._keep(step)


class Search:
    """The iterator that :func:`imp` returns; it can be gone through once.

    ticket       the last level's: masks and the state to start from; the one to save
    levels       the levels that are done, with those found in the folder
    done_levels  the levels found done in the folder, which are not trained again
    """

    def __init__(self, model, optimizer, pieces: Pieces, settings: dict, *, carry, sample, folder, plan, init) -> None:
        check_carry(carry)
        self.model, self.optimizer, self.pieces, self.settings = model, optimizer, pieces, settings
        self.carry, self.sample, self.init, self._plan = tuple(carry), sample, init, plan
        self.rewind_step, self.rounds = settings["rewind_step"], pieces.rounds
        self._groups = group_names(model, optimizer)
        self._modes = {name: module.training for name, module in model.named_modules()}
        self._template = copy.deepcopy(model) if settings["control"] == "reinit" else None
        self._blocks = {n: model.get_submodule(n) for n in (pieces.names if pieces.kind == "layer" else ())}
        self._started = False
        self._kept: dict | None = None
        self.levels: list[Level] = []
        self.ticket = replace(pieces.whole(), provenance=self._provenance(0))
        self.store = None if folder is None else LevelStore(folder, self._identity(), self.rounds)
        for index in range(self.store.done if self.store else 0):
            self.levels.append(self._level(index, self.store.ticket(index), self.store.record(index)["seconds"]))
        self.done_levels = tuple(self.levels)
        if self.levels:
            self.ticket = self.levels[-1].ticket

    def __iter__(self) -> Iterator[Level]:
        if self._started:
            raise RuntimeError("this search was gone through already; call pst.imp again, on the model at its start")
        self._started = True
        trained = self._begin()
        for index in range(len(self.levels), self.rounds + 1):
            if index:
                self._enter(index, trained)
            level = self._level(index, self.ticket)
            if not index:
                level._keep = self._keep_rewind
                if self.store and self._kept is not None:
                    self.store.begin(0, self.ticket, {})
            began = time.perf_counter()
            yield level
            level.seconds = time.perf_counter() - began
            trained = self._finish(level)
            self.levels.append(level)

    @property
    def rewind(self) -> dict | None:
        """The state that every level after the first starts from; None before level 0 came to the rewind step."""
        return self._kept

    def _identity(self) -> dict:
        found = dict(self.settings)
        if self.optimizer is not None:
            found["optimizer"] = type(self.optimizer).__name__
            for i, group in enumerate(self.optimizer.param_groups):
                found |= {f"{k} of optimizer group {i}": _plain(v) for k, v in group.items() if k != "params"}
        found["carry"] = [type(thing).__name__ for thing in self.carry]
        found["model"] = f"{type(self.model).__name__} of {sum(p.numel() for p in self.model.parameters())} parameters"
        found["first weights"] = digest(self.model.state_dict())
        return found

    def _level(self, index: int, ticket: Ticket, seconds: float | None = None) -> Level:
        folder = self.store.folder(index) if self.store else None
        return Level(index, self.rewind_step if index else 0, ticket, seconds, folder)

    def _begin(self) -> dict[str, Tensor] | None:
        """The model as the first level to train finds it, and the trained state that its ticket comes from."""
        if not self.levels:
            state = self.store.state("start") if self.store else None
            if state is None:
                state = capture(self.model, self.optimizer, self.carry, 0)
                if self.store:
                    self.store.keep_state("start", state)
            else:
                self._restore(state, state["model"], moments=True)
                self._restore_rest(state)
            if self.rewind_step == 0:
                self._keep(state)
            elif self.store and (kept := self.store.state("rewind")) is not None:
                self._keep(kept)
            return None
        self._keep(self.store.state("start" if self.rewind_step == 0 else "rewind"))
        last = len(self.levels) - 1
        trained = self.store.trained(last)
        if last == self.rounds:
            self._enter(last, trained)
            self.model.load_state_dict({n: t for n, t in trained.items() if n in self.model.state_dict()})
        return trained

    def _keep(self, state: dict) -> None:
        self._kept = state
        if not self.levels:
            self.ticket.rewind = state["model"]

    def _keep_rewind(self, step: int) -> None:
        if step == self.rewind_step:
            state = capture(self.model, self.optimizer, self.carry, step)
            if self.store:
                self.store.keep_state("rewind", state)
            self._keep(state)
            if self.store:
                self.store.begin(0, self.ticket, {})

    def _enter(self, index: int, trained: dict[str, Tensor]) -> None:
        """Score, rewind and make sparse: the model as level ``index`` finds it."""
        record = self.store.record(index) if self.store else None
        self.ticket = self._next_ticket(trained, index) if record is None else self.store.ticket(index)
        densify(self.model, self.optimizer)
        for name, block in self._blocks.items():
            self.model.set_submodule(name, block)
        moments = self.settings["mode"] == "weights" and self.settings["control"] != "reinit"
        self._restore(self._kept, self.ticket.rewind, moments)
        plan = self._plan if record is None else record["plan"]
        sparsify(self.model, self.ticket, self.sample, self.optimizer, plan=plan)
        self._restore_rest(self._kept)
        if self.store:
            chosen = {row.layer: row.format for row in plan_of(self.model).layers if row.format != "skipped"}
            self.store.begin(index, self.ticket, chosen)

    def _restore(self, state: dict, weights: dict[str, Tensor], moments: bool) -> None:
        for name, module in self.model.named_modules():
            module.training = self._modes.get(name, module.training)
        restore_model(self.model, weights)
        if self.optimizer is not None:
            restore_optimizer(self.model, self.optimizer, self._groups, state, moments)

    def _restore_rest(self, state: dict) -> None:
        """Last, since making modules and racing kernels draw random numbers."""
        restore_carry(self.carry, state)
        restore_rng(self.model, state)

    def _next_ticket(self, trained: dict[str, Tensor], index: int) -> Ticket:
        masks = self.pieces.weight_masks(self.ticket)
        scores = layerwise(self.settings["importance"], {n: trained[n] for n in masks}, masks)
        ticket = self.pieces.prune(self.ticket, scores, index)
        start = self._kept["model"]
        if self.settings["mode"] == "learning-rate":
            start = trained
        elif self.settings["control"] == "reinit":
            start = fresh_state(self._template, self.settings["seed"] * 100_003 + index, self.init)
        return replace(ticket, rewind=start, provenance=self._provenance(index))

    def _finish(self, level: Level) -> dict[str, Tensor]:
        """The trained state in dense shapes, checked and kept."""
        if self._kept is None:
            reached = "never called step_done" if level.last_step is None else f"ended after step {level.last_step}"
            raise ValueError(
                f"level 0 {reached} and so never came to the rewind step {self.rewind_step}: lower rewind_step, "
                "or call level.step_done(step + 1) after each step"
            )
        trained = self.ticket.rewind | clone_state(self.model)
        for name, tensor in trained.items():
            if torch.isnan(tensor).any():
                raise ValueError(
                    f"{name} holds NaN after level {level.index}, which is not kept; lower the learning rate"
                )
        if self.store:
            self.store.finish(level.index, trained, level.seconds)
        return trained

    def _provenance(self, index: int) -> dict:
        return self.settings | {"level": index, "torch": torch.__version__}


def _plain(value: Any) -> Any:
    """An optimizer's setting as JSON can hold it."""
    if isinstance(value, Tensor):
        return value.tolist()
    return value if isinstance(value, bool | int | float | str | None | list | tuple) else repr(value)
