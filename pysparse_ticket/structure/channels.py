"""Which filters go together: the result of following channels through a network, and what a choice of filters means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .follow import Follower, trace

Filter = tuple[str, int]


@dataclass(frozen=True)
class Channels:
    """The channels of a network in units that stay or go as one.

    A unit is one channel of a convolution, or several that cannot be told apart behind it: the channels that a residual
    add or a gate's product puts together, and those that a depthwise convolution makes of one. A concatenation puts
    units side by side, flattening makes several features of one.

    producers  {convolution: the unit of each filter}, in the order of execution; depthwise ones among them
    readers    {convolution or linear layer: the unit of each input channel or feature}
    norms      {batch norm: the unit of each channel}
    pinned     {unit: why it stays}
    refused    {convolution: why none of its filters can go}
    """

    producers: dict[str, tuple[int, ...]]
    readers: dict[str, tuple[int, ...]]
    norms: dict[str, tuple[int, ...]]
    pinned: dict[int, str]
    refused: dict[str, str]

    def units(self, coupled: bool = True) -> dict[int, tuple[Filter, ...]]:
        """{unit: its filters} of all units that may go, in the order of execution.

        ``coupled=False`` lists only the filters of convolutions that share no unit with another filter.
        """
        filters = self._filters()
        bound = {name for members in filters.values() if len(members) > 1 for name, _ in members}
        return {
            unit: tuple(members)
            for unit, members in filters.items()
            if unit not in self.pinned and (coupled or members[0][0] not in bound)
        }

    def masks(self, removed: Iterable[int], coupled: bool = True) -> dict[str, Tensor]:
        """{convolution: bool [out channels]} with the removed units False, of the convolutions that ``units`` lists."""
        gone, units = set(removed), self.units(coupled)
        return {
            name: torch.tensor([unit not in gone for unit in row])
            for name, row in self.producers.items()
            if any(unit in units for unit in row)
        }

    def removed(self, filters: Mapping[str, Tensor]) -> set[int]:
        """The units that these masks remove.

        ValueError naming the convolution when it cannot lose filters, loses all of them, or when a filter's unit is
        removed by half; a convolution without a mask keeps all filters.
        """
        gone: dict[int, str] = {}
        for name, kept in filters.items():
            if kept.all():
                continue
            if name not in self.producers:
                raise ValueError(
                    f"the filters of {name} cannot be removed: {self.refused.get(name, 'it is not a convolution')}"
                )
            if len(kept) != len(self.producers[name]):
                raise ValueError(
                    f"the ticket has {len(kept)} filters for {name}, which has {len(self.producers[name])}"
                )
            if not kept.any():
                raise ValueError(f"the ticket removes every filter of {name}; at least one has to stay")
            for unit, stays in zip(self.producers[name], kept.tolist(), strict=True):
                if not stays:
                    gone.setdefault(unit, name)
                    if unit in self.pinned:
                        raise ValueError(f"the filters of {name} cannot be removed: {self.pinned[unit]}")
        for name, row in self.producers.items():
            for index, unit in enumerate(row):
                if unit in gone and (name not in filters or filters[name][index]):
                    raise ValueError(
                        f"the ticket keeps filter {index} of {name} and removes the one of {gone[unit]} that shares "
                        "its channel; filters whose outputs are added, multiplied or filtered depthwise go together"
                    )
        return set(gone)

    def _filters(self) -> dict[int, list[Filter]]:
        filters: dict[int, list[Filter]] = {}
        for name, row in self.producers.items():
            for index, unit in enumerate(row):
                filters.setdefault(unit, []).append((name, index))
        return filters


def find_channels(model: nn.Module) -> Channels:
    """Trace the model and follow its channels; ValueError with the reason when it cannot be traced."""
    follower = Follower(model, trace(model))
    follower.run()
    find, pinned = follower.find, {}
    for atom, why in follower.pins:
        pinned.setdefault(find(atom), why)
    producers = {name: tuple(map(find, atoms)) for name, atoms in follower.producers.items()}
    refused = dict(follower.refused)
    for name, row in producers.items():
        if all(unit in pinned for unit in row):
            refused[name] = pinned[row[0]]
    return Channels(
        producers,
        {name: tuple(map(find, atoms)) for name, atoms in follower.readers.items()},
        {name: tuple(map(find, atoms)) for name, atoms in follower.norms.items()},
        pinned,
        refused,
    )


@dataclass(frozen=True)
class FilterChain:
    """A convolution whose output reaches one other convolution alone, channel by channel: its filters can go."""

    producer: str
    norms: tuple[str, ...]
    consumer: str


def filter_chains(model: nn.Module) -> list[FilterChain]:
    """Trace the model and list its :class:`FilterChain`; ValueError with the reason when it cannot be traced."""
    channels = find_channels(model)
    free, modules = channels.units(coupled=False), dict(model.named_modules())
    chains = []
    for producer, row in channels.producers.items():
        if not all(unit in free for unit in row):
            continue
        readers = [name for name, units in channels.readers.items() if not set(row).isdisjoint(units)]
        if len(readers) == 1 and isinstance(modules[readers[0]], nn.Conv2d) and channels.readers[readers[0]] == row:
            norms = tuple(name for name, units in channels.norms.items() if not set(row).isdisjoint(units))
            chains.append(FilterChain(producer, norms, readers[0]))
    return chains
