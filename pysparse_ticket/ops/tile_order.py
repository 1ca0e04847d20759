"""An order of a mask's rows and columns that empties tiles: a reordered ticket runs on fewer of them, exactly.

A tile without a surviving weight costs a block-sparse kernel nothing. Rows and columns with no weight at all are
dropped; of the others, some orders are tried and the one with the fewest tiles that hold a weight is kept. Plain torch,
on the mask's device, the same result each time; for when the mask changes, not for each step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_GAIN = 0.05  # x is gathered and y scattered for it; of uniform random masks chance empties 2%
SPREAD_ROUNDS = 8  # 16 gave at most 1% fewer tiles
SPECTRAL_ROUNDS = 12
SWAP_ROUNDS = 60
PASSES = 4


@dataclass(frozen=True)
class TileOrder:
    """How to reorder a mask ``[out, in]`` for tiles of ``tile`` rows x columns.

    row_order   int32 ``[out]``   row i of the reordered weight is row ``row_order[i]``; from ``rows`` on, dead rows
    col_order   int32 ``[in]``    the same for columns, dead ones from ``cols`` on
    rows, cols  what the reordered weight keeps; all of them where the order is the identity
    dead_rows, dead_cols   how many rows and columns hold no weight, dropped or not
    tiles       tiles of the mask as it is; ``filled_before`` of them hold a weight, ``filled_after`` of the reordered
    how         "identity", or what made the order: "drop" (dead ones gone, the rest as it was), "density", "spread",
                "overlap" or "spectral", with " + swaps" where swapping rows and columns between tiles helped
    tried       {order: tiles that hold a weight under it}
    """

    tile: tuple[int, int]
    shape: tuple[int, int]
    row_order: Tensor
    col_order: Tensor
    rows: int
    cols: int
    dead_rows: int
    dead_cols: int
    tiles: int
    filled_before: int
    filled_after: int
    how: str
    tried: dict[str, int] = field(default_factory=dict)

    @property
    def identity(self) -> bool:
        return self.how == "identity"

    @property
    def empty_before(self) -> float:
        """Share of the tiles that hold no weight in the mask as it is."""
        return 1 - self.filled_before / self.tiles if self.tiles else 0.0

    @property
    def empty_after(self) -> float:
        """The same after reordering, of as many tiles: those of dropped rows and columns count as empty."""
        return 1 - self.filled_after / self.tiles if self.tiles else 0.0

    def kept(self, weight: Tensor) -> Tensor:
        """``[rows, cols]`` of a weight or mask ``[out, in]``, reordered; differentiable."""
        return weight[self.row_order[: self.rows].long()][:, self.col_order[: self.cols].long()]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``F.linear(x, weight, bias)`` of a masked weight by way of the reordered one, in plain torch.

        x ``[..., in]`` is gathered by ``col_order`` and y ``[..., out]`` scattered by ``row_order``; a dropped row's
        output is its bias.
        """
        kept = F.linear(x[..., self.col_order[: self.cols].long()], self.kept(weight))
        y = x.new_zeros(*x.shape[:-1], self.shape[0]).index_copy(-1, self.row_order[: self.rows].long(), kept)
        return y if bias is None else y + bias

    def __str__(self) -> str:
        size = f"tiles of {self.tile[0]}x{self.tile[1]}: {self.empty_before:.1%} empty"
        dead = f"{self.dead_rows} rows and {self.dead_cols} columns are dead"
        if self.identity:
            return f"{size}, and no order empties {LEAST_GAIN:.0%} of the others; {dead}"
        return f"{size} as it is, {self.empty_after:.1%} reordered ({self.how}); {dead}"


def filled_tiles(mask: Tensor, tile: tuple[int, int]) -> int:
    """Tiles of the bool mask ``[out, in]`` that hold a True; the last ones of a ragged edge are smaller."""
    rows, cols = mask.nonzero(as_tuple=True)
    return int((_counts(rows // tile[0], cols // tile[1], _groups(mask.shape, tile)) > 0).sum())


@torch.no_grad()
def tile_order(mask: Tensor, tile: tuple[int, int] = (64, 64), least_gain: float = LEAST_GAIN) -> TileOrder:
    """The order with the fewest tiles that hold a weight; the identity unless ``least_gain`` of them become empty.

    density  rows and columns by how many weights they hold
    spread   by how many tiles they touch, of the columns (rows) in their present order, in turns
    overlap  each group of rows is grown from the fullest row left by the rows whose weights overlap most with the
             group's, and each group of columns likewise: finds blocks that were shuffled
    spectral by the second singular vectors of the mask, scaled by the roots of the rows' and columns' counts
             (co-clustering, Dhillon 2001)
    swaps    from the best of these, pairs of rows (columns) of two groups are exchanged while that empties tiles

    A mask of 4096x4096 takes seconds, most of them for "overlap". ValueError for a mask that is no bool matrix or a
    tile without rows or columns.
    """
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"tile_order takes a bool mask [out, in], not {mask.dtype} of shape {tuple(mask.shape)}")
    if len(tile) != 2 or min(tile) < 1:
        raise ValueError(f"a tile is (rows, columns) of at least 1, not {tuple(tile)}")
    out, width = mask.shape
    groups = _groups(mask.shape, tile)
    before = filled_tiles(mask, tile)
    alive = [mask.any(dim).nonzero()[:, 0] for dim in (1, 0)]
    facts = {
        "tile": tuple(tile),
        "shape": (out, width),
        "dead_rows": out - len(alive[0]),
        "dead_cols": width - len(alive[1]),
        "tiles": groups[0] * groups[1],
        "filled_before": before,
    }
    search = _Search(mask[alive[0]][:, alive[1]], tile)
    how, (row_group, col_group) = search.best() if before else ("identity", (None, None))
    after = search.tried[how] if before else 0
    if after >= before or after > (1 - least_gain) * before:
        whole = [torch.arange(n, dtype=torch.int32, device=mask.device) for n in mask.shape]
        return TileOrder(**facts, row_order=whole[0], col_order=whole[1], rows=out, cols=width,
                         filled_after=before, how="identity", tried=search.tried)  # fmt: skip
    orders = [
        torch.cat([one[group.argsort(stable=True)], (~mask.any(dim)).nonzero()[:, 0]]).int()
        for one, group, dim in zip(alive, (row_group, col_group), (1, 0), strict=True)
    ]
    return TileOrder(**facts, row_order=orders[0], col_order=orders[1], rows=len(alive[0]), cols=len(alive[1]),
                     filled_after=after, how=how, tried=search.tried)  # fmt: skip


class _Search:
    """Orders of a mask without dead rows and columns, as the group (of a tile's rows or columns) that each is in."""

    def __init__(self, mask: Tensor, tile: tuple[int, int]) -> None:
        self.mask, self.tile, self.groups = mask, tile, _groups(mask.shape, tile)
        self.index = mask.nonzero(as_tuple=True)
        self.tried: dict[str, int] = {}

    def best(self) -> tuple[str, tuple[Tensor, Tensor]]:
        """The name and the groups of the order with the fewest filled tiles, of equal ones the one tried first."""
        starts = {"drop": tuple(torch.arange(n, device=self.mask.device) for n in self.mask.shape)}
        starts["density"] = tuple(self.mask.sum(dim).argsort(descending=True, stable=True) for dim in (1, 0))
        found = {name: tuple(map(_group_of, order, self.tile)) for name, order in starts.items()}
        found["spread"] = self._spread(found["density"])
        found["overlap"] = tuple(
            _group_of(_grown(m, size), size) for m, size in zip((self.mask, self.mask.T), self.tile, strict=True)
        )
        found["spectral"] = tuple(map(_group_of, _spectral(self.mask), self.tile))
        self.tried = {name: self._filled(groups) for name, groups in found.items()}
        best = min(found, key=self.tried.__getitem__)
        swapped = self._swapped(found[best])
        self.tried[f"{best} + swaps"] = self._filled(swapped)
        if self.tried[f"{best} + swaps"] < self.tried[best]:
            return f"{best} + swaps", swapped
        return best, found[best]

    def _filled(self, groups: tuple[Tensor, Tensor]) -> int:
        return int((_counts(groups[0][self.index[0]], groups[1][self.index[1]], self.groups) > 0).sum())

    def _touches(self, axis: int, other: Tensor) -> Tensor:
        """float ``[rows, groups of columns]`` (axis 0) or ``[columns, groups of rows]``: 1 where it holds a weight."""
        size = (self.mask.shape[axis], self.groups[1 - axis])
        return (_counts(self.index[axis], other[self.index[1 - axis]], size) > 0).float()

    def _spread(self, groups: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        weights = [self.mask.sum(dim) for dim in (1, 0)]
        found, best = list(groups), (self._filled(groups), groups)
        for _ in range(SPREAD_ROUNDS):
            for axis in (0, 1):
                touched = self._touches(axis, found[1 - axis]).sum(1).long()
                key = touched * (self.mask.shape[1 - axis] + 1) + weights[axis]
                found[axis] = _group_of(key.argsort(descending=True, stable=True), self.tile[axis])
            filled = self._filled(tuple(found))
            if filled < best[0]:
                best = filled, tuple(found)
        return best[1]

    def _swapped(self, groups: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        groups, filled = list(groups), self._filled(groups)
        for _ in range(PASSES):
            for axis in (0, 1):
                groups[axis] = _swap(groups[axis], self._touches(axis, groups[1 - axis]), self.tile[axis])
            last, filled = filled, self._filled(tuple(groups))
            if filled > 0.998 * last:
                break
        return tuple(groups)


def _groups(shape: tuple[int, ...] | torch.Size, tile: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // tile[0]), -(-shape[1] // tile[1])


def _counts(rows: Tensor, cols: Tensor, size: tuple[int, int]) -> Tensor:
    """How often each (row, column) of an int64 ``[size]`` table occurs."""
    return torch.bincount(rows * size[1] + cols, minlength=size[0] * size[1]).view(size)


def _group_of(order: Tensor, size: int) -> Tensor:
    """The group of ``size`` that each row is in when rows stand in this order."""
    group = torch.empty_like(order)
    group[order] = torch.arange(len(order), device=order.device) // size
    return group


def _grown(mask: Tensor, size: int) -> Tensor:
    """An order in which each ``size`` rows are the fullest one left and those that overlap most with what they hold.

    Overlap is the cosine between a row and the sum of the group's, all of it from the rows' products with each other,
    which hold whole numbers and so are exact in any order of summation.
    """
    rows = mask.float()
    overlap = rows @ rows.T
    weights = rows.sum(1)
    scale = weights.clamp_min(1).rsqrt()
    gone = torch.zeros_like(weights)
    order = []
    for start in range(0, len(rows), size):
        pick = (weights + gone).argmax()
        likeness = torch.zeros_like(weights)
        for _ in range(min(size, len(rows) - start)):
            order.append(pick)
            gone[pick] = -torch.inf
            likeness += overlap[pick]
            pick = (likeness * scale + gone).argmax()
    return torch.stack(order) if order else torch.zeros(0, dtype=torch.long, device=mask.device)


def _spectral(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns in the order of the scaled mask's second singular vectors, by subspace iteration."""
    weights = mask.float()
    scales = [weights.sum(dim).rsqrt() for dim in (1, 0)]
    weights = weights * scales[0][:, None] * scales[1]
    rank = min(8, *mask.shape)
    right = torch.randn(mask.shape[1], rank, generator=torch.Generator().manual_seed(0)).to(mask.device)
    for _ in range(SPECTRAL_ROUNDS):
        left = torch.linalg.qr(weights @ right).Q
        right = torch.linalg.qr(weights.T @ left).Q
    rotation = torch.linalg.svd(left.T @ weights @ right)
    second = min(1, rank - 1)
    rows, cols = left @ rotation.U[:, second], right @ rotation.Vh[second]
    return (rows * scales[0]).argsort(stable=True), (cols * scales[1]).argsort(stable=True)


def _swap(group: Tensor, touches: Tensor, size: int) -> Tensor:
    """Exchange rows between groups while that empties tiles; ``touches`` float ``[rows, column groups]``.

    A row that leaves group a empties the tiles where it stood alone and fills, in group b, those that no row of b
    touches. For each pair of groups the best row of either is tried; the pairs that are each other's best exchange
    theirs at once, which leaves each other's counts alone.
    """
    count, device = -(-len(group) // size), group.device
    slots = torch.full((count * size,), -1, device=device)
    slots[: len(group)] = group.argsort(stable=True)
    every = torch.arange(count, device=device)
    low, high = torch.minimum(every[:, None], every), torch.maximum(every[:, None], every)
    tie = (low * count + high).double() / (count * count + 1)  # below 1: of equal gains the earlier pair
    for _ in range(SWAP_ROUNDS):
        held = touches[slots.clamp_min(0)] * (slots >= 0)[:, None]
        by_group = held.view(count, size, -1)
        total = by_group.sum(1)
        alone = (total == 1).float()
        leaves = (by_group * alone[:, None]).sum(-1).view(-1, 1)
        enters = held.sum(1, keepdim=True) - held @ (total > 0).float().T
        value = (leaves - enters).masked_fill_((slots < 0)[:, None], -torch.inf).view(count, size, count)
        value[every, :, every] = -torch.inf
        best, which = value.max(1)
        slot = every[:, None] * size + which
        gain = (best + best.T).double() - _both_alone(held, slot, alone)
        gain.fill_diagonal_(-torch.inf)
        partner = (gain - tie).argmax(1)
        pairs = (partner[partner] == every) & (gain[every, partner] >= 1) & (every < partner)
        if not pairs.any():
            break
        a, b = slot[every[pairs], partner[pairs]], slot[partner[pairs], every[pairs]]
        slots[a], slots[b] = slots[b], slots[a]
    out = torch.empty_like(group)
    out[slots[: len(group)]] = torch.arange(len(group), device=device) // size
    return out


def _both_alone(held: Tensor, slot: Tensor, alone: Tensor) -> Tensor:
    """What an exchange does not empty, since the row that comes touches the tile too: ``[groups, groups]``."""
    lost = torch.empty(slot.shape, dtype=torch.float64, device=held.device)
    step = max(1, 2**23 // max(1, slot.shape[0] * held.shape[1]))
    for start in range(0, len(slot), step):
        part = slice(start, start + step)
        common = held[slot[part]] * held[slot.T[part]]
        lost[part] = (common * (alone[part, None] + alone[None])).sum(-1).double()
    return lost
