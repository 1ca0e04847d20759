"""Filters as pieces of an iterated search: units that go together, and which weights go with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..granularity import pool_units
from ..select import drop_lowest_units
from ..structure import find_channels

Group = tuple[str, ...]  # the convolutions that each unit of a group has a filter in


class FilterUnits:
    """The units of a model's filters that may go (``structure.Channels``), in execution order.

    coupled  False takes only filters that go alone; spared names the convolutions that no unit may touch
    keep     units that stay in every group of convolutions
    total, least  filters of all units, and of those that have to stay

    ValueError with the reason where the model cannot be traced or has no filter that could go.
    """

    def __init__(self, model: nn.Module, coupled: bool, spared: Sequence[str], keep: int) -> None:
        self._channels, self._coupled, self.keep = find_channels(model), coupled, keep
        self._members = {
            unit: members
            for unit, members in self._channels.units(coupled).items()
            if not any(name in spared for name, _ in members)
        }
        if not self._members:
            reasons = [f"{name}: {why}" for name, why in list(self._channels.refused.items())[:3]]
            why = "; ".join(reasons) or "all are spared, or coupled with others, which coupled=True takes together"
            raise ValueError(f"{type(model).__name__} has no filter that can be removed: {why}")
        self._groups: dict[Group, list[int]] = {}
        for unit, members in self._members.items():
            self._groups.setdefault(tuple(sorted(name for name, _ in members)), []).append(unit)
        self._group_of = {unit: group for group, units in self._groups.items() for unit in units}
        self.total = sum(map(len, self._members.values()))
        self.least = sum(len(group) * min(keep, len(units)) for group, units in self._groups.items())

    def whole(self) -> dict[str, Tensor]:
        """{convolution: bool [out channels], all True} of the convolutions that may lose a filter."""
        return self._masks(())

    def pool(self, values: Mapping[str, Tensor]) -> dict[Group, Tensor]:
        """{group: float64 [units]}, the sums over all weights of a unit's filters; values by parameter name."""
        return {
            group: pool_units(values, [self._members[unit] for unit in units], "sum")
            for group, units in self._groups.items()
        }

    def clear(self, masks: Mapping[str, Tensor], filters: Mapping[str, Tensor]) -> None:
        """Set what the removed filters make, and what reads them, to False in the masks of weights, in place."""
        gone = self._gone(filters)
        for rows, index in ((self._channels.producers, ()), (self._channels.readers, (slice(None),))):
            for name, units in rows.items():
                if (weight := f"{name}.weight") in masks:
                    masks[weight][(*index, torch.tensor([unit in gone for unit in units]))] = False

    def prune(self, filters: Mapping[str, Tensor], pooled: Mapping[Group, Tensor], kept: int) -> dict[str, Tensor]:
        """The filters less the lowest-scored units that are left, so that ``kept`` stay.

        Where whole units cannot make that count exactly, the nearest one, of two the larger. One that passed ``kept``
        in an earlier round stays as it is.
        """
        scores = {u: s for group, units in self._groups.items() for u, s in zip(units, pooled[group], strict=True)}
        gone = self._gone(filters)
        left = [unit for unit in self._members if unit not in gone]
        groups = [self._group_of[unit] for unit in left]
        wanted = max(sum(map(len, groups)) - kept, 0)
        counts = self._removable(groups)
        remove = next(
            count
            for off in range(wanted + 1)
            for count in (wanted - off, wanted + off)
            if counts >> count & 1  # 0 always is
        )
        values = torch.stack([scores[unit] for unit in left])
        stays = drop_lowest_units(values, [len(group) for group in groups], groups, remove, self.keep)
        return self._masks(gone | {unit for unit, stay in zip(left, stays.tolist(), strict=True) if not stay})

    def _removable(self, groups: Sequence[Group]) -> int:
        """A bit for each number of filters that can go from the units left, given by their groups."""
        counts, seen = 1, dict.fromkeys(groups, 0)
        for group in groups:
            seen[group] += 1
            if seen[group] > self.keep:
                counts |= counts << len(group)
        return counts

    def _gone(self, filters: Mapping[str, Tensor]) -> set[int]:
        removed = {name: (~kept).tolist() for name, kept in filters.items()}
        return {unit for unit, ((name, index), *_) in self._members.items() if removed[name][index]}

    def _masks(self, gone) -> dict[str, Tensor]:
        names = {name for members in self._members.values() for name, _ in members}
        return {name: mask for name, mask in self._channels.masks(gone, self._coupled).items() if name in names}
