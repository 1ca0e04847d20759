"""The tiles of a convolution's mask that hold a surviving weight, as the GPU kernels walk them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .masked_conv2d import Pair
from .tile_mask import RATES, TileMask, choose_tile


@dataclass(frozen=True)
class ConvTiles:
    """A bool mask ``[O, C, kh, kw]`` as the matrix ``[O, kh * kw * C']``, channels innermost, cut into tiles
    ``(bn, bk)``; C' is C filled up with pruned weights to a multiple of bk, so that a tile holds one tap.

    The weight is stored as ``values [tiles, bn, bk]``, as ``matrix`` lays them out. All tensors are int32.

    walk    the forward pass's order: ``ptr [R + 1]``, ``out [R, 3]``, ``step [tiles + 1, 4]``, one after another.
            Output channels ``out[i, 0] * bn ..`` sum the steps ``ptr[i] .. ptr[i + 1]``, each of them a tile, the
            block of bk input channels that it meets, and how far down and right of ``output pixel * stride`` that
            lies. Steps are in the order of the values; the last one is nothing, to be read ahead of its time
    t_walk  the same for the input gradient: ``out`` is a block of input channels and a phase, the pixels whose row
            and column have the remainders ``out[i, 1:]`` by the stride, numbered by their quotients. They meet the
            same taps: each tile is in one phase, its block one of output channels, its offset added to the quotients
    """

    shape: tuple[int, int, int, int]
    stride: Pair
    padding: Pair
    dilation: Pair
    matrix: TileMask
    walk: Tensor
    t_walk: Tensor

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        tile: tuple[int, int] | None = None,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
    ) -> ConvTiles:
        """mask: bool ``[O, C, kh, kw]``; tile as ``TileMask.from_mask`` takes it, None for the size of least estimated
        time. ValueError for anything else. Waits for the device: call it once a mask."""
        if mask.dtype != torch.bool or mask.dim() != 4 or not mask.numel():
            raise ValueError(f"tiles are cut from a 4-D bool mask, not from {mask.dtype} of shape {tuple(mask.shape)}")
        tile = tuple(tile or choose_tile(mask.permute(0, 2, 3, 1).flatten(1, 2)))
        matrix = TileMask.from_mask(_as_matrix(mask, tile[1]), tile)
        walks = _walks(matrix, tuple(mask.shape), stride, padding, dilation)
        return cls(tuple(mask.shape), tuple(stride), tuple(padding), tuple(dilation), matrix, *walks)

    @classmethod
    def of_tensors(
        cls, tensors: list[Tensor], shape: list[int], tile: list[int], stride: list[int], padding: list[int],
        dilation: list[int],
    ) -> ConvTiles:  # fmt: skip
        """From ``tensors`` and the other fields, as an op carries them."""
        o, c, kh, kw = shape
        *of_matrix, walk, t_walk = tensors
        matrix = TileMask((o, kh * kw * -(-c // tile[1]) * tile[1]), tuple(tile), *of_matrix)
        return cls((o, c, kh, kw), tuple(stride), tuple(padding), tuple(dilation), matrix, walk, t_walk)

    def cut(self, mask: Tensor) -> ConvTiles:
        """The tiles of another mask of the convolution, of the same size."""
        return ConvTiles.from_mask(mask, self.tile, self.stride, self.padding, self.dilation)

    @property
    def tile(self) -> tuple[int, int]:
        return self.matrix.tile

    @property
    def tiles(self) -> int:
        return self.matrix.tiles

    @property
    def grid(self) -> tuple[int, int]:
        """How many tiles cover the matrix: R, C."""
        return self.matrix.grid

    @property
    def empty(self) -> float:
        """Share of the tiles without a survivor: what the kernels skip."""
        return self.matrix.empty

    @property
    def time(self) -> float:
        """Estimated time of the products, over the dense ones', which are slower too where channels are few."""
        o, c, kh, kw = self.shape
        whole = min(-(-o // bn) * bn * -(-c // bk) * bk / rate for (bn, bk), rate in RATES.items())
        return self.matrix.work / (whole * max(RATES.values()) * kh * kw)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.matrix.tensors, self.walk, self.t_walk)

    def to(self, device: torch.device) -> ConvTiles:
        return replace(self, matrix=self.matrix.to(device), walk=self.walk.to(device), t_walk=self.t_walk.to(device))

    def survivors(self) -> Tensor:
        """bool ``[tiles, bn, bk]``."""
        return self.matrix.survivors()

    def expand(self, kept: Tensor) -> Tensor:
        """bool ``[R, C]``, which tiles are kept, to a mask of this shape."""
        return self._as_weight(self.matrix.expand(kept))

    def scatter(self, values: Tensor) -> Tensor:
        """``[tiles, bn, bk]`` to the dense ``[O, C, kh, kw]``, zeros in the other tiles; differentiable."""
        return self._as_weight(self.matrix.scatter(values))

    def gather(self, weight: Tensor) -> Tensor:
        """Dense ``[O, C, kh, kw]`` to ``[tiles, bn, bk]``, with zeros where pruned; differentiable."""
        return self.matrix.gather(_as_matrix(weight, self.tile[1]))

    def _as_weight(self, matrix: Tensor) -> Tensor:
        o, c, kh, kw = self.shape
        return matrix.view(o, kh, kw, -1)[..., :c].permute(0, 3, 1, 2).contiguous()


def _as_matrix(weight: Tensor, bk: int) -> Tensor:
    return F.pad(weight.permute(0, 2, 3, 1), (0, -weight.shape[1] % bk)).flatten(1)


def _walks(
    matrix: TileMask, shape: tuple[int, ...], stride: Pair, padding: Pair, dilation: Pair
) -> tuple[Tensor, Tensor]:
    (_, channels, _, kw), rows = shape, matrix.grid[0]
    blocks = -(-channels // matrix.tile[1])
    number = torch.arange(matrix.tiles, device=matrix.row.device)
    row, block, tap = matrix.row.long(), matrix.col.long() % blocks, matrix.col.long() // blocks
    taps = tap // kw, tap % kw
    offsets = [t * d - p for t, d, p in zip(taps, dilation, padding, strict=True)]
    phases = [offset % s for offset, s in zip(offsets, stride, strict=True)]
    t_offsets = [(phase - offset) // s for phase, offset, s in zip(phases, offsets, stride, strict=True)]
    outs = [torch.arange(n, device=row.device) for n in (rows, 1, 1)]
    t_outs = [torch.arange(n, device=row.device) for n in (*stride, blocks)]
    walk = _walk(row, torch.cartesian_prod(*outs), [number, block, *offsets])
    by_phase = (phases[0] * stride[1] + phases[1]) * blocks + block
    return walk, _walk(by_phase, torch.cartesian_prod(*t_outs)[:, [2, 0, 1]], [number, row, *t_offsets])


def _walk(out: Tensor, outs: Tensor, step: list[Tensor]) -> Tensor:
    """The steps by which of ``outs`` they add to, of which those with most steps go first."""
    lengths = torch.bincount(out, minlength=len(outs))
    order = lengths.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    steps = torch.stack(step, 1)[rank[out].argsort(stable=True)]
    ptr = F.pad(lengths[order].cumsum(0), (1, 0))
    return torch.cat([ptr, outs[order].flatten(), steps.flatten(), steps.new_zeros(4)]).int()
