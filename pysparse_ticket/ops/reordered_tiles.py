"""The tiles of a reordered weight mask, and ``F.linear(x, weight * mask, bias)`` over them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .linear_shapes import check_features
from .masked_linear_tiles import DTYPES, masked_linear_tiles
from .tile_mask import TileMask
from .tile_order import TileOrder, filled_tiles, tile_order

# Orders are searched for at these sizes; what one leaves may then be cut otherwise. Of log-normal masks those for 128
# leave 4 to 15% less time by RATES than those for 64, of shuffled blocks those for the blocks' own size 15 to 40%.
SEARCHED = ((128, 128), (64, 64))


@dataclass(frozen=True)
class Side:
    """Which rows (columns) of the weight the reordered one keeps, and where each of them went; int64.

    index    ``[kept]``  row i of the reordered weight is row ``index[i]``
    inverse  ``[all]``   the other way; 0 for a dropped row
    rest     ``[all - kept]``  the dropped rows; None where there are none
    """

    index: Tensor
    inverse: Tensor
    rest: Tensor | None

    @classmethod
    def from_order(cls, order: Tensor, kept: int) -> Side | None:
        """None for the identity. Waits for the device."""
        order = order.long()
        positions = torch.arange(len(order), device=order.device)
        if kept == len(order) and torch.equal(order, positions):
            return None
        inverse = torch.empty_like(order).scatter_(0, order, positions)
        return cls(order[:kept], torch.where(inverse < kept, inverse, 0), order[kept:] if kept < len(order) else None)

    def to(self, device: torch.device) -> Side:
        return Side(*(t if t is None else t.to(device) for t in (self.index, self.inverse, self.rest)))

    def take(self, whole: Tensor) -> Tensor:
        """``[.., all]`` to ``[.., kept]``, differentiable."""
        return _Take.apply(whole, self.index, self.inverse, self.rest)

    def spread(self, part: Tensor, fill: Tensor | None = None) -> Tensor:
        """``[.., kept]`` to ``[.., all]``, differentiable; ``fill [all - kept]`` or zeros for the dropped ones."""
        return _Spread.apply(part, fill, self.index, self.inverse, self.rest)


@dataclass(frozen=True)
class ReorderedTiles:
    """A bool mask ``[N, K]`` whose rows and columns are put into an order that empties tiles, and cut into tiles then.

    The weight is stored as ``values [tiles, bn, bk]``, those of the reordered weight as ``TileMask`` lays them out.

    order  the rows and columns, and what made their order
    kept   the tiles of ``order.kept(mask)``
    rows, cols  the order of each side; None where it is the identity
    empty_before  share of the mask's tiles of this size without a survivor as it is
    """

    shape: tuple[int, int]
    order: TileOrder
    kept: TileMask
    rows: Side | None
    cols: Side | None
    empty_before: float

    @classmethod
    def from_mask(cls, mask: Tensor, tile: tuple[int, int] | None = None) -> ReorderedTiles:
        """mask and tile as ``TileMask.from_mask`` takes them; the order of least estimated time where tile is None.

        Searches for the order: seconds for 4096 x 4096. ``order.identity`` says that none was worth it."""
        found = []
        for size in (tile,) if tile else SEARCHED:
            order = tile_order(mask, size)
            found.append((order, TileMask.from_mask(order.kept(mask), tile)))
        worth = [one for one in found if not one[0].identity] or found
        order, kept = min(worth, key=lambda one: one[1].work)
        return cls(
            shape=tuple(mask.shape),
            order=order,
            kept=kept,
            rows=Side.from_order(order.row_order, order.rows),
            cols=Side.from_order(order.col_order, order.cols),
            empty_before=1 - filled_tiles(mask, kept.tile) / _count(tuple(mask.shape), kept.tile),
        )

    def cut(self, mask: Tensor) -> ReorderedTiles:
        """The tiles of another mask, in an order of its own and of the same size."""
        return ReorderedTiles.from_mask(mask, self.tile)

    @property
    def tile(self) -> tuple[int, int]:
        return self.kept.tile

    @property
    def tiles(self) -> int:
        return self.kept.tiles

    @property
    def empty(self) -> float:
        """Share of the mask's tiles that the kernels skip; those of dropped rows and columns count as empty."""
        return 1 - self.tiles / _count(self.shape, self.tile)

    @property
    def time(self) -> float:
        """Estimated time of the products, over the dense ones'."""
        return self.kept.work / (self.shape[0] * self.shape[1])

    def to(self, device: torch.device) -> ReorderedTiles:
        order = self.order
        order = replace(order, row_order=order.row_order.to(device), col_order=order.col_order.to(device))
        sides = {name: side and side.to(device) for name, side in (("rows", self.rows), ("cols", self.cols))}
        return replace(self, order=order, kept=self.kept.to(device), **sides)

    def survivors(self) -> Tensor:
        """bool ``[tiles, bn, bk]``."""
        return self.kept.survivors()

    def scatter(self, values: Tensor) -> Tensor:
        """``[tiles, bn, bk]`` to the dense ``[N, K]``, in the mask's own order; differentiable."""
        weight = self.kept.scatter(values)
        weight = self.cols.spread(weight) if self.cols else weight
        return self.rows.spread(weight.T).T.contiguous() if self.rows else weight

    def gather(self, weight: Tensor) -> Tensor:
        """Dense ``[N, K]`` to ``[tiles, bn, bk]``, with zeros where pruned; differentiable."""
        weight = self.rows.take(weight.T).T if self.rows else weight
        return self.kept.gather(self.cols.take(weight) if self.cols else weight)


def reordered_linear_tiles(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    layout: ReorderedTiles,
    backend: str | None = None,
    clean: bool = False,
) -> Tensor:
    """``F.linear(x, weight * mask, bias)``, where ``weight`` is ``layout.scatter(values)``.

    Arguments, dtypes, backends and errors are those of ``masked_linear_tiles``, which runs on the reordered x and
    weight: x is gathered and y spread, one pass of memory each and one each for their gradients, none on a side whose
    order is the identity. A dropped row's output is its bias. No sum depends on the order of threads.
    """
    check_features(x, bias, layout.shape, "mask")
    rows, cols, device = layout.rows, layout.cols, x.device.type
    if torch.is_autocast_enabled(device) and x.dtype in DTYPES:
        x = x.to(torch.get_autocast_dtype(device))  # before it is gathered: half the bytes
    x = cols.take(x) if cols else x
    kept_bias = bias.index_select(0, rows.index) if rows and bias is not None else bias
    y = masked_linear_tiles(x, values, kept_bias, layout.kept, backend=backend, clean=clean)
    if rows is None:
        return y
    return rows.spread(y, None if bias is None or rows.rest is None else bias.index_select(0, rows.rest))


class _Take(torch.autograd.Function):
    """Its gradient is a gather too; that of index_select is a sum by atomics."""

    @staticmethod
    def forward(ctx, whole: Tensor, index: Tensor, inverse: Tensor, rest: Tensor | None) -> Tensor:
        ctx.save_for_backward(index, inverse, rest)
        return whole.index_select(-1, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return _Spread.apply(grad, None, *ctx.saved_tensors), None, None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part: Tensor, fill: Tensor | None, index: Tensor, inverse: Tensor, rest: Tensor | None) -> Tensor:
        ctx.save_for_backward(index, inverse, rest)
        ctx.fill_dtype = None if fill is None else fill.dtype
        whole = part.index_select(-1, inverse)
        if fill is not None:
            return whole.index_copy_(-1, rest, fill.to(part.dtype).expand(*part.shape[:-1], -1))
        return whole if rest is None else whole.index_fill_(-1, rest, 0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        index, inverse, rest = ctx.saved_tensors
        fill = None
        if ctx.fill_dtype is not None:
            fill = grad.index_select(-1, rest).reshape(-1, len(rest)).sum(0, dtype=ctx.fill_dtype)
        return _Take.apply(grad, index, inverse, rest), fill, None, None, None


def _count(shape: tuple[int, int], tile: tuple[int, int]) -> int:
    return -(-shape[0] // tile[0]) * -(-shape[1] // tile[1])
