"""What an iterated search removes, round by round: how many pieces each round keeps, and which go.

A piece is a weight, a tile, a filter or a block of layers; what went once never comes back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..granularity import KEEP_N_OF_M, aggregate, expand_blocks, parse, pool_blocks, pool_layers
from ..scores import prunable
from ..select import check_scores, drop_lowest_blocks, highest, highest_of
from ..structure import find_blocks
from ..ticket import Ticket, fingerprint
from .filter_units import FilterUnits

SCOPES = ("global", "layer")  # a distribution over layers such as ERK would not come from the importance
CONTROLS = (None, "random", "reinit", "shuffle")


@dataclass(frozen=True)
class Schedule:
    """How much each round leaves: ``rates`` of what is left go, or the ``sparsities`` are reached.

    A round keeps round((1 - rate) kept) or round((1 - sparsity) total), halves to the even neighbour; with
    ``at_least_one`` no round removes nothing.
    """

    rounds: int
    rates: tuple[float, ...] | None = None
    sparsities: tuple[float, ...] | None = None

    @classmethod
    def of(cls, rounds: int | None, rate: float | Sequence[float] | None, sparsities) -> Schedule:
        """ValueError for a rate outside (0, 1), sparsities that do not rise below 1, or rounds of another number."""
        if rate is not None and sparsities is not None:
            raise ValueError("give rate= or sparsities=, not both")
        rate = 0.2 if rate is None else rate
        if sparsities is not None:
            values = tuple(float(s) for s in sparsities)
            if not values or not all(low < high for low, high in zip((0.0, *values), (*values, 1.0), strict=True)):
                raise ValueError(f"sparsities rise from above 0 to below 1, the whole network; got {list(values)}")
        elif isinstance(rate, int | float):
            values = (float(rate),) * (10 if rounds is None else rounds)
        else:
            values = tuple(float(r) for r in rate)
        if rounds is not None and (not isinstance(rounds, int) or rounds < 1):
            raise ValueError(f"rounds must be a whole number, at least 1, not {rounds}")
        if rounds not in (None, len(values)):
            raise ValueError(f"{len(values)} values were given for {rounds} rounds; leave rounds= out")
        if sparsities is not None:
            return cls(len(values), sparsities=values)
        for value in values:
            if not 0 < value < 1:
                raise ValueError(f"a rate is the share of what is left that a round removes, in (0, 1), not {value}")
        if not values:
            raise ValueError("a schedule needs at least one rate")
        return cls(len(values), rates=values)

    def facts(self) -> dict:
        """What fixes the schedule; one rate for all rounds goes on for as many as one likes."""
        if self.sparsities is not None:
            return {"sparsities": list(self.sparsities)}
        return {"rate": self.rates[0]} if len(set(self.rates)) == 1 else {"rate": list(self.rates)}

    def counts(self, total: int, what: str, *, least: int = 1, at_least_one: bool = False) -> list[int]:
        """Pieces kept at levels 0 to ``rounds``; ValueError when a round would leave fewer than ``least``."""
        kept = [total]
        for i in range(self.rounds):
            left = round((1 - self.rates[i]) * kept[-1]) if self.rates else round((1 - self.sparsities[i]) * total)
            kept.append(min(left, kept[-1] - 1) if at_least_one else left)
            if kept[-1] < least:
                raise ValueError(
                    f"round {i + 1} of {self.rounds} would leave {max(kept[-1], 0)} of {total} {what}, and {least} "
                    "must stay; take fewer rounds or lower the rate"
                )
        return kept


class Pieces:
    """The pieces of one model at one granularity, what each level keeps of them, and the choice of those that go."""

    def __init__(
        self,
        model: nn.Module,
        granularity: str,
        schedule: Schedule | None,
        *,
        rounds: int | None = None,
        sample: Tensor | None = None,
        how: str = "sum",
        scope: str = "global",
        keep: int | None = None,
        strict: bool = False,
        allow_empty: bool = True,
        spare: Sequence[str] = (),
        control: str | None = None,
        seed: int = 0,
        coupled: bool = True,
    ) -> None:
        self.kind, self.numbers = parse(granularity)
        if scope not in SCOPES:
            raise ValueError(f"unknown scope {scope!r}; known: {', '.join(SCOPES)}")
        if control not in CONTROLS:
            raise ValueError(f"unknown control {control!r}; known: {', '.join(map(str, CONTROLS))}")
        if control == "shuffle" and self.kind == "layer":
            raise ValueError("control='shuffle' moves pieces within a layer, and granularity 'layer' has none there")
        aggregate(torch.zeros(1), how)
        self.how, self.scope, self.allow_empty, self.control, self.seed = how, scope, allow_empty, control, seed
        self.keep = {"layer": 2, "filter": 1}.get(self.kind) if keep is None else keep
        self.architecture = fingerprint(model)
        self._check_spared(model, spare)
        self.shapes = {n: tuple(w.shape) for n, w in prunable(model).items() if not _within(n, spare)}
        if not self.shapes:
            raise ValueError("spare= leaves no weight to prune")
        if self.kind == "layer":
            if sample is None:
                raise ValueError("granularity 'layer' runs the model to find its blocks: pass sample=, an input batch")
            self.blocks = find_blocks(model, sample, strict)
            self.names = tuple(b for b in self.blocks.candidates if not _within(b, spare))
        elif self.kind == "filter":
            spared = [name for name, _ in model.named_modules() if _within(f"{name}.weight", spare)]
            self.filters = FilterUnits(model, coupled, spared, self.keep)
        self.rounds, self.counts = self._plan(schedule, rounds)

    @staticmethod
    def _check_spared(model: nn.Module, spare: Sequence[str]) -> None:
        known = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_modules()}
        for name in spare:
            if name not in known or not name:
                raise ValueError(f"spare= names {name!r}, which is no parameter or module of the model")

    def _plan(self, schedule: Schedule | None, rounds: int | None) -> tuple[int, dict[str, list[int]]]:
        """Kept pieces at each level, by what they compete in: one tensor, or everything ("")."""
        if self.kind in KEEP_N_OF_M:
            n, m = self.numbers
            rounds = m - n if rounds is None else rounds
            if not 1 <= rounds <= m - n:
                raise ValueError(f"{n}:{m} is reached from dense in 1 to {m - n} rounds, not {rounds}")
            return rounds, {"": [m - round((m - n) * i / rounds) for i in range(rounds + 1)]}
        if self.kind == "layer":
            sizes = self.blocks.stage_sizes
            stages = [self.blocks.stages[name] for name in self.names]
            free = sum(min(stages.count(s), max(sizes[s] - self.keep, 0)) for s in dict.fromkeys(stages))
            least = len(self.names) - free
            return schedule.rounds, {
                "": schedule.counts(len(self.names), "removable blocks", least=least, at_least_one=True)
            }
        if self.kind == "filter":
            total, least = self.filters.total, self.filters.least
            return schedule.rounds, {"": schedule.counts(total, "removable filters", least=least, at_least_one=True)}
        sizes = {n: self._tiles(torch.ones(shape)).numel() for n, shape in self.shapes.items()}
        what = "weights" if self.kind == "weight" else "blocks of weights"
        if self.scope == "layer":
            return schedule.rounds, {n: schedule.counts(size, f"{what} of {n}") for n, size in sizes.items()}
        return schedule.rounds, {"": schedule.counts(sum(sizes.values()), what)}

    def whole(self) -> Ticket:
        """The ticket that keeps everything."""
        ticket = Ticket(architecture=self.architecture)
        if self.kind == "layer":
            return replace(ticket, layers=dict.fromkeys(self.names, True))
        if self.kind == "filter":
            return replace(ticket, filters=self.filters.whole())
        return replace(ticket, masks={n: torch.ones(s, dtype=torch.bool) for n, s in self.shapes.items()})

    def weight_masks(self, ticket: Ticket) -> dict[str, Tensor]:
        """{prunable weight: bool of its shape}, True where the ticket's network has it."""
        masks = {n: ticket.masks.get(n, torch.ones(s, dtype=torch.bool)).clone() for n, s in self.shapes.items()}
        if self.kind == "filter":
            self.filters.clear(masks, ticket.filters)
        for name in masks:
            if _within(name, ticket.removed_blocks):
                masks[name][...] = False
        return masks

    def prune(self, ticket: Ticket, scores: Mapping[str, Tensor], level: int) -> Ticket:
        """The ticket of ``level`` from that of the level before: the lowest-scored pieces that are left go."""
        check_scores(scores)
        pooled = self._controlled(self._pool(scores, self.weight_masks(ticket)), level)
        kept = self.counts.get("", [0] * (level + 1))[level]
        if self.kind == "layer":
            values = {name: float(value) for name, value in pooled.items()}
            remove = len(self.names) - kept
            dropped = drop_lowest_blocks(values, self.blocks.stages, self.blocks.stage_sizes, remove, self.keep)
            return replace(ticket, layers={name: name not in dropped for name in self.names})
        if self.kind == "filter":
            return replace(ticket, filters=self.filters.prune(ticket.filters, pooled, kept))
        if self.kind in KEEP_N_OF_M:
            keep = KEEP_N_OF_M[self.kind]
            return replace(ticket, masks={n: keep(s, kept, self.numbers[1]) for n, s in pooled.items()})
        if self.scope == "layer":
            tiles = {n: highest(s, self.counts[n][level]) for n, s in pooled.items()}
        else:
            tiles = highest_of(pooled, kept)
        if self.kind == "block":
            tiles = {n: expand_blocks(t, self.shapes[n], *self.numbers) for n, t in tiles.items()}
        for name, mask in tiles.items():
            if not self.allow_empty and not mask.any():
                raise ValueError(f"level {level} would empty {name}; take fewer rounds, scope='layer' or allow_empty")
        return replace(ticket, masks=tiles)

    def _tiles(self, x: Tensor) -> Tensor:
        return pool_blocks(x, *self.numbers, "sum") if self.kind == "block" else x

    def _pool(self, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A score a piece, -inf where nothing of it is left; pruned weights count neither in a sum nor in a mean."""
        scores = {n: torch.where(masks[n], scores[n].cpu(), 0.0) for n in masks}
        held = {n: mask.double() for n, mask in masks.items()}
        if self.kind == "layer":
            sums = {n: torch.tensor(v) for n, v in pool_layers(scores, self.names, "sum").items()}
            counts = {n: torch.tensor(v) for n, v in pool_layers(held, self.names, "sum").items()}
        elif self.kind == "filter":
            sums, counts = self.filters.pool(scores), self.filters.pool(held)
        else:
            sums = {n: self._tiles(s) for n, s in scores.items()}
            counts = {n: self._tiles(h) for n, h in held.items()}
        if self.how == "mean":
            sums = {n: s / counts[n].clamp_min(1) for n, s in sums.items()}
        return {n: s.double().masked_fill(counts[n] == 0, -torch.inf) for n, s in sums.items()}

    def _controlled(self, pooled: dict[str, Tensor], level: int) -> dict[str, Tensor]:
        """With control "random" a draw from U(0, 1) in place of each score; with "shuffle" a layer's scores permuted
        among the pieces that it has left, which keeps how many go from each layer."""
        if self.control not in ("random", "shuffle"):
            return pooled
        generator = torch.Generator().manual_seed(self.seed * 100_003 + level)
        drawn = {}
        for name, score in pooled.items():
            left = score > -torch.inf
            values = score[left]
            if self.control == "random":
                values = torch.rand(values.shape, generator=generator, dtype=torch.float64)
            else:
                values = values[torch.randperm(len(values), generator=generator)]
            drawn[name] = score.clone()
            drawn[name][left] = values
        return drawn


def _within(name: str, parents: Sequence[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)
