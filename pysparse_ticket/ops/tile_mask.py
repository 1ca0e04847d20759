"""The tiles of a weight mask that hold a surviving weight, as the GPU kernels walk them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .pattern import INT32_MAX

# Share of the dense multiply's rate that a tile size can reach in bfloat16 on an H100, by what its operands cost on
# their way from L2 (docs/gpu.md). Estimates, to choose a size by; the plan times the layer itself.
RATES = {(128, 128): 0.78, (128, 64): 0.60, (64, 64): 0.48, (32, 32): 0.26, (16, 16): 0.13}
WORD = 32


@dataclass(frozen=True)
class TileMask:
    """A bool mask ``[N, K]`` cut into tiles of ``tile = (bn, bk)``; those without a survivor are left out.

    The weight is stored as ``values [tiles, bn, bk]``: tile rows with the most tiles first, a row's tiles in ascending
    order, zeros behind the edges of the mask. All tensors are int32, on one device; R x C tiles cover the mask.

    row, col  ``[tiles]``    tile row and tile column of each tile
    partial   ``[tiles]``    where its bits lie in ``bits``; -1 for a tile all of whose weights survive
    bits      ``[partials, bn, ceil(bk / 32)]``  bit c of word w: the weight at column ``32 w + c`` survives
    walk      the forward pass's order: ``ptr [R + 1]``, ``out [R]``, ``tile [n]``, ``other [n]``, one after another.
              Output tile row ``out[i]`` sums the tiles ``tile[ptr[i]:ptr[i + 1]]``, each with the input's tile column
              ``other``, given as ``-1 - other`` for the last of them. A row without a tile has one entry, of tile
              number ``tiles``, which no memory holds: zeros
    t_walk    the same by tile columns, for the input gradient; ``other`` is a tile row
    items     ``[.., 3]`` the weight gradient's work: tile row, first tile, and how many tiles of that row, up to
              ``group``; behind them R entries of no tile, one a tile row, for the bias gradient
    """

    shape: tuple[int, int]
    tile: tuple[int, int]
    row: Tensor
    col: Tensor
    partial: Tensor
    bits: Tensor
    walk: Tensor
    t_walk: Tensor
    items: Tensor

    FIELDS = ("row", "col", "partial", "bits", "walk", "t_walk", "items")

    @classmethod
    def from_mask(cls, mask: Tensor, tile: tuple[int, int] | None = None) -> TileMask:
        """mask: bool ``[N, K]``; tile: one of ``RATES``' sizes, or any two powers of 2 from 16 to 128; None for
        the size of least estimated time. ValueError for anything else. Waits for the device: call it once a mask."""
        if mask.dtype != torch.bool or mask.dim() != 2 or not mask.numel():
            raise ValueError(f"tiles are cut from a 2-D bool mask, not from {mask.dtype} of shape {tuple(mask.shape)}")
        if mask.numel() > INT32_MAX:
            raise ValueError(f"a mask of {mask.numel()} weights is too large for 32-bit indices: at most {INT32_MAX}")
        bn, bk = tile or choose_tile(mask)
        if any(size not in (16, 32, 64, 128) for size in (bn, bk)):
            raise ValueError(f"a tile's sides are 16, 32, 64 or 128, not {bn} x {bk}")
        grid = _cut(mask, bn, bk)
        survivors = grid.sum((1, 3))
        lengths, kept = (survivors > 0).sum(1), survivors > 0
        order = lengths.argsort(descending=True, stable=True)
        position, col = kept[order].nonzero(as_tuple=True)
        row = order[position]
        full = survivors[row, col] == bn * bk
        partial = torch.where(full, -1, (~full).cumsum(0) - 1)
        return cls(
            shape=tuple(mask.shape),
            tile=(bn, bk),
            row=row.int(),
            col=col.int(),
            partial=partial.int(),
            bits=_pack(grid.permute(0, 2, 1, 3)[row[~full], col[~full]]),
            walk=_walk(row, col, lengths),
            t_walk=_walk(col, row, kept.sum(0)),
            items=_items(lengths[order], order, _group(bk)),
        )

    def cut(self, mask: Tensor) -> TileMask:
        """The tiles of another mask, of the same size."""
        return TileMask.from_mask(mask, self.tile)

    @property
    def tiles(self) -> int:
        return self.row.numel()

    @property
    def grid(self) -> tuple[int, int]:
        """How many tiles cover the mask: R, C."""
        return tuple(-(-size // side) for size, side in zip(self.shape, self.tile, strict=True))

    @property
    def empty(self) -> float:
        """Share of the tiles without a survivor: what the kernels skip."""
        return 1 - self.tiles / (self.grid[0] * self.grid[1])

    @property
    def work(self) -> float:
        """How many weights a dense product has that takes as long, by estimate."""
        return self.tiles * self.tile[0] * self.tile[1] / RATES.get(self.tile, 1.0)

    @property
    def time(self) -> float:
        """Estimated time of the products, over the dense ones'."""
        return self.work / (self.shape[0] * self.shape[1])

    @property
    def group(self) -> int:
        """How many tiles of one row the weight gradient takes at a time."""
        return _group(self.tile[1])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.FIELDS)

    def to(self, device: torch.device) -> TileMask:
        return replace(self, **{name: getattr(self, name).to(device) for name in self.FIELDS})

    def expand(self, kept: Tensor) -> Tensor:
        """bool ``[R, C]``, which tiles are kept, to a mask of this shape."""
        for dim, side in enumerate(self.tile):
            kept = kept.repeat_interleave(side, dim)
        return kept[: self.shape[0], : self.shape[1]]

    def survivors(self) -> Tensor:
        """bool ``[tiles, bn, bk]``."""
        shifts = torch.arange(WORD, dtype=torch.int32, device=self.bits.device)
        bits = (self.bits[..., None] >> shifts & 1).flatten(2)[..., : self.tile[1]].bool()
        whole = bits.new_ones(1, *self.tile)
        return torch.cat([bits, whole])[self.partial.long()]  # -1 is the last one

    def scatter(self, values: Tensor) -> Tensor:
        """``[tiles, bn, bk]`` to the dense ``[N, K]``, zeros in the other tiles; differentiable."""
        (rows, cols), (bn, bk) = self.grid, self.tile
        out = values.new_zeros(rows * cols, bn, bk).index_put((self.row.long() * cols + self.col.long(),), values)
        out = out.view(rows, cols, bn, bk).permute(0, 2, 1, 3).reshape(rows * bn, cols * bk)
        return out[: self.shape[0], : self.shape[1]].contiguous()

    def gather(self, weight: Tensor) -> Tensor:
        """Dense ``[N, K]`` to ``[tiles, bn, bk]``, with zeros where pruned; differentiable."""
        tiles = _cut(weight, *self.tile).permute(0, 2, 1, 3)[self.row.long(), self.col.long()]
        return tiles * self.survivors()


def _group(bk: int) -> int:
    """Tiles of a group share the load of the output's gradient. A missing one of the last group costs multiplications,
    which are not what is short, and no loads."""
    return min(8, 256 // bk)


def choose_tile(mask: Tensor) -> tuple[int, int]:
    """The size of least estimated time for ``mask``, [N, K], or [N, taps, C] of a convolution, whose tiles hold one tap
    each; waits for the device."""
    small = _filled(mask.reshape(len(mask), -1, mask.shape[-1]), 16, 16)
    areas = torch.stack([_filled(small, bn // 16, bk // 16).sum() * bn * bk for bn, bk in RATES])
    times = [area / rate for area, rate in zip(areas.tolist(), RATES.values(), strict=True)]
    return tuple(RATES)[times.index(min(times))]


def _filled(mask: Tensor, bn: int, bk: int) -> Tensor:
    """bool [N, taps, C] to [N / bn, taps, C / bk]: which tiles hold a survivor."""
    n, taps, c = mask.shape
    mask = F.pad(mask, (0, -c % bk, 0, 0, 0, -n % bn))
    return mask.view(-(-n // bn), bn, taps, -(-c // bk), bk).any(4).any(1)


def _cut(matrix: Tensor, bn: int, bk: int) -> Tensor:
    """``[R, bn, C, bk]``, zeros behind the edges."""
    rows, cols = matrix.shape
    matrix = F.pad(matrix, (0, -cols % bk, 0, -rows % bn))
    return matrix.reshape(matrix.shape[0] // bn, bn, matrix.shape[1] // bk, bk)


def _pack(tiles: Tensor) -> Tensor:
    """bool ``[n, bn, bk]`` to int32 words."""
    tiles = F.pad(tiles, (0, -tiles.shape[-1] % WORD)).unflatten(-1, (-1, WORD))
    words = (tiles.long() << torch.arange(WORD, device=tiles.device)).sum(-1)
    return torch.where(words > INT32_MAX, words - 2**WORD, words).int()  # bit 31 is the sign


def _walk(out: Tensor, other: Tensor, lengths: Tensor) -> Tensor:
    """``lengths [R]``: how many tiles each output row sums; the longest go first, so that none is left for the end."""
    order = lengths.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    tile = rank[out].argsort(stable=True)
    ptr = lengths[order].clamp(min=1).cumsum(0)
    nothing = other.new_zeros(int((lengths == 0).sum()))
    others = torch.cat([other[tile], nothing])
    others[ptr - 1] = -1 - others[ptr - 1]
    return torch.cat([ptr.new_zeros(1), ptr, order, tile, nothing + len(tile), others]).int()


def _items(lengths: Tensor, order: Tensor, size: int) -> Tensor:
    groups = -(-lengths // size)
    position = torch.repeat_interleave(torch.arange(len(lengths), device=order.device), groups)
    within = torch.arange(len(position), device=order.device) - (groups.cumsum(0) - groups)[position]
    first = (lengths.cumsum(0) - lengths)[position] + within * size
    count = (lengths[position] - within * size).clamp(max=size)
    bias = torch.stack([order, torch.zeros_like(order), torch.zeros_like(order)], 1)
    return torch.cat([torch.stack([order[position], first, count], 1), bias]).int()
