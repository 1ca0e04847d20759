"""Launches the kernels of ``masked_linear.py``: which of them, on which grid, with which descriptors."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pysparse_ticket.ops.tile_mask import TileMask

from . import masked_linear as kernels
from .parts import OPTIONS, Device, device_of
from .tile_configs import Config, candidates
from .tile_tuning import pick

INTERPRETED = not isinstance(kernels.mask_tiles, triton.runtime.jit.JITFunction)
DESCRIPTORS: bool | None = None  # None: where the GPU has them; a test sets it


def masked_values(values: Tensor, tiles: TileMask, dtype: torch.dtype, transpose: bool = False) -> Tensor:
    """``[tiles, bn, bk]`` in ``dtype``, zero where pruned; ``[tiles, bk, bn]`` with ``transpose``."""
    count, bn, bk = values.shape
    out = values.new_empty((count, bk, bn) if transpose else (count, bn, bk), dtype=dtype)
    if count:
        kernels.mask_tiles[(count,)](
            values, out, tiles.partial, tiles.bits, *values.stride(), bn, bk, transpose, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return out


def forward(
    x: Tensor, values: Tensor, bias: Tensor | None, tiles: TileMask, activation: str | None, keep: bool, precision: str
) -> tuple[Tensor, Tensor]:
    """x ``[T, K]``, masked values ``[tiles, bn, bk]`` -> y ``[T, N]``; what the activation saw if ``keep``"""
    return _matmul(x, values, bias, tiles.walk, tiles.shape[0], tiles.tile, False, activation, keep, precision)


def input_grad(dy: Tensor, values: Tensor, tiles: TileMask, precision: str) -> Tensor:
    """dy ``[T, N]`` -> ``[T, K]``. float32 values are turned first: the TF32 instruction sums along rows alone."""
    sides = tiles.tile[::-1]
    transposed = values.dtype != torch.float32
    values = values if transposed else values.transpose(1, 2).contiguous()
    return _matmul(dy, values, None, tiles.t_walk, tiles.shape[1], sides, transposed, None, False, precision)[0]


def _matmul(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    walk: Tensor,
    out_features: int,
    sides: tuple[int, int],
    transposed: bool,
    activation: str | None,
    keep: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    tokens, features = x.shape
    y = x.new_empty(tokens, out_features)
    z = x.new_empty((tokens, out_features) if keep else (0,))
    if not tokens:
        return y, z
    out_side, sum_side = sides
    w_rows = sum_side if transposed else out_side
    rows = -(-out_features // out_side)
    device = device_of(x.device)
    w = w.view(-1, w.shape[-1])
    described = _described(device, x, y, w) and w.shape[0] > 0
    depth = min(sum_side, 64 if x.element_size() == 2 else 32)

    def run(config: Config) -> None:
        block = config.block
        if described:
            box = [depth, out_side] if transposed else [out_side, depth]
            piece = [block, out_side // config.pieces]
            operands = (_box(x, [block, depth]), _box(w, box), _box(y, piece), _box(z, piece) if keep else y)
        else:
            operands = x, w, y, z
        programs = min(device.multiprocessors * config.resident, -(-tokens // block) * rows)
        kernels.matmul_tiles[(programs,)](
            *operands, bias, walk, w.shape[0] // w_rows, (len(walk) - 2 * rows - 1) // 2, tokens,
            out_features, features, x.stride(0), out_features, rows, _spin(rows), programs,
            block, out_side, sum_side, depth, transposed, bias is not None, activation, keep, config.pieces,
            precision, described, num_warps=config.warps, num_stages=config.stages, **OPTIONS,
        )  # fmt: skip

    kind = ("matmul", out_side, sum_side, transposed, x.dtype, precision, described, keep, rows, len(walk), tokens)
    pick(device.name, kind, candidates("matmul", out_side, x.dtype, precision, described, tokens), run)
    return y, z


def weight_grad(
    x: Tensor, dy: Tensor, tiles: TileMask, dtype: torch.dtype, need_bias: bool, precision: str
) -> tuple[Tensor, Tensor]:
    """x ``[T, K]``, dy ``[T, N]`` -> ``[tiles, bn, bk]`` in ``dtype``, zero where pruned; float32 ``[N]`` or empty."""
    (n, k), (bn, bk), count = tiles.shape, tiles.tile, tiles.row.numel()
    tokens, out = x.shape[0], x.new_empty(tiles.row.numel(), *tiles.tile, dtype=dtype)
    rows = -(-n // bn)
    items = tiles.items.shape[0] - (0 if need_bias else rows)
    if not tokens or not items:
        return out.zero_(), x.new_zeros(n if need_bias else 0, dtype=torch.float32)
    device = device_of(x.device)
    described = _described(device, x, dy) and min(bn, bk) >= 64 and x.element_size() == 2
    bias = x.new_empty(0)

    def run(config: Config) -> None:
        nonlocal bias
        split, chunk = split_tokens(tokens, items, device.multiprocessors * config.resident, config.block)
        bias = x.new_empty((split, n) if need_bias else (0,), dtype=torch.float32)
        sums = out if split == 1 else x.new_empty(split, count, bn, bk, dtype=torch.float32)
        if described:
            fn, operands = kernels.weight_grad_boxes, (_box(x, [config.block, bk]), _box(dy, [config.block, bn]))
            extra = ()
        else:
            fn, operands, extra = kernels.weight_grad_gather, (x, dy), (x.stride(0), dy.stride(0))
        fn[(split * items,)](
            *operands, sums, bias, tiles.items, tiles.col, tiles.partial, tiles.bits, items, count, tokens, n, k, chunk,
            *extra, config.block, bn, bk, tiles.group, split, precision,
            num_warps=config.warps, num_stages=config.stages, **OPTIONS,
        )  # fmt: skip
        if split > 1 and count:
            kernels.sum_splits[(count,)](
                sums, out, tiles.partial, tiles.bits, count, bn, bk, split, num_warps=4, **OPTIONS
            )

    kind = ("weight_grad", bn, bk, x.dtype, precision, described, items, count, tokens)
    pick(device.name, kind, candidates("weight_grad", max(bn, bk), x.dtype, precision, described, tokens), run)
    return out, bias.sum(0) if need_bias else bias


def split_tokens(tokens: int, items: int, programs: int, block: int) -> tuple[int, int]:
    """Over how many parts of the tokens the items are cut, and the tokens of one: as many as fill the programs evenly,
    while a part has 16 steps or more and its sums are few against what it reads."""
    steps = -(-tokens // block)

    def cost(split: int) -> float:
        length = -(-steps // split)
        return -(-items * split // programs) * (length + 4) + 2 * (split > 1) * items * split / programs

    split = min((s for s in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if s == 1 or steps >= 16 * s), key=cost)
    chunk = -(-steps // split) * block
    return -(-tokens // chunk), chunk


def _spin(rows: int) -> int:
    """A step through the rows that visits all of them and lands far from where it was: near the golden section."""
    spin = max(1, round(rows * 0.618))
    while math.gcd(spin, rows) > 1:
        spin += 1
    return spin % rows


def _described(device: Device, *tensors: Tensor) -> bool:
    """Whether descriptors can name them: rows and starts at multiples of 16 bytes, rows without gaps in them."""
    if not (device.descriptors if DESCRIPTORS is None else DESCRIPTORS):
        return False
    return all(
        t.data_ptr() % 16 == 0 and t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 for t in tensors
    )


def _box(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)
