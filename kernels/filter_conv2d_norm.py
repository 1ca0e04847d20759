"""Batch norm, residual add and ReLU behind ``kernels/filter_conv2d.py``: one pass forward, two backward, channels_last.

An image is a matrix of M pixels by C channels in memory; a program takes BM x BC of it, sums in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .filter_conv2d import _power


@triton.jit
def _centred(y, mean, var, eps, at, c, whole, kept):
    """(y - mean) / sqrt(var + eps), and 1 / sqrt(var + eps)."""
    rstd = 1.0 / tl.sqrt(tl.load(var + c, mask=kept, other=1.0) + eps)
    centre = tl.load(mean + c, mask=kept, other=0.0)
    return (tl.load(y + at, mask=whole, other=0.0).to(tl.float32) - centre[None, :]) * rstd[None, :], rstd


@triton.jit
def _affine(value, weight, bias, c, kept, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    if WEIGHT:
        value *= tl.load(weight + c, mask=kept, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        value += tl.load(bias + c, mask=kept, other=0.0).to(tl.float32)[None, :]
    return value


@triton.jit
def _gated(
    grad, z, value, weight, bias, at, c, whole, kept, GATE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr
):
    """The gradient in front of the ReLU; GATE "z" reads the output's sign, "y" computes it again from the norm's input
    (``value``, centred and scaled)."""
    g = tl.load(grad + at, mask=whole, other=0.0).to(tl.float32)
    if GATE == "z":
        g = tl.where(tl.load(z + at, mask=whole, other=0.0).to(tl.float32) > 0, g, 0.0)
    elif GATE == "y":
        g = tl.where(_affine(value, weight, bias, c, kept, WEIGHT, BIAS) > 0, g, 0.0)
    return g


@triton.jit
def _forward(
    y, mean, var, weight, bias, residual, z, eps, M, C,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    rows, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
    kept = c < C
    whole, at = (rows < M)[:, None] & kept[None, :], rows.to(tl.int64)[:, None] * C + c[None, :]
    value, _ = _centred(y, mean, var, eps, at, c, whole, kept)
    value = _affine(value, weight, bias, c, kept, WEIGHT, BIAS)
    if RESIDUAL:
        value += tl.load(residual + at, mask=whole, other=0.0).to(tl.float32)
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # NaN passes
    tl.store(z + at, value.to(z.dtype.element_ty), mask=whole)


@triton.jit
def _sums(
    grad, y, z, mean, var, weight, bias, gated, parts, eps, M, C, each,
    GATE: tl.constexpr, WRITE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """parts[program] = sums over its pixels of the gated gradient and of its product with the centred, scaled y."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    kept = c < C
    shift, scale = tl.zeros((BM, BC), dtype=tl.float32), tl.zeros((BM, BC), dtype=tl.float32)
    start = tl.program_id(0) * each
    for first in range(start, tl.minimum(start + each, M), BM):
        rows = first + tl.arange(0, BM)
        whole, at = (rows < M)[:, None] & kept[None, :], rows.to(tl.int64)[:, None] * C + c[None, :]
        value, _ = _centred(y, mean, var, eps, at, c, whole, kept)
        g = _gated(grad, z, value, weight, bias, at, c, whole, kept, GATE, WEIGHT, BIAS)
        if WRITE:
            tl.store(gated + at, g.to(gated.dtype.element_ty), mask=whole)
        shift += g
        scale += g * value
    to = parts + tl.program_id(0).to(tl.int64) * 2 * C + c
    tl.store(to, tl.sum(shift, axis=0), mask=kept)
    tl.store(to + C, tl.sum(scale, axis=0), mask=kept)


@triton.jit
def _gradient(
    grad, y, z, mean, var, weight, bias, sums, out, eps, M, C,
    GATE: tl.constexpr, BATCH: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out = weight / sqrt(var + eps) * (g - mean of g - value * mean of (g * value)); without BATCH the first term."""
    rows, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
    kept = c < C
    whole, at = (rows < M)[:, None] & kept[None, :], rows.to(tl.int64)[:, None] * C + c[None, :]
    value, rstd = _centred(y, mean, var, eps, at, c, whole, kept)
    g = _gated(grad, z, value, weight, bias, at, c, whole, kept, GATE, WEIGHT, BIAS)
    if BATCH:
        by_shift = tl.load(sums + c, mask=kept, other=0.0) / M
        by_scale = tl.load(sums + C + c, mask=kept, other=0.0) / M
        g -= by_shift[None, :] + value * by_scale[None, :]
    if WEIGHT:
        rstd *= tl.load(weight + c, mask=kept, other=0.0).to(tl.float32)
    tl.store(out + at, (g * rstd[None, :]).to(out.dtype.element_ty), mask=whole)


def _tile(channels: int, entries: int) -> dict[str, int]:
    """16 channels are 32 bytes in 16 bits, what memory is read by."""
    width = _power(channels, 16, 128)
    return {"BM": entries // width, "BC": width, "num_warps": 4}


ENTRIES, SUM_ENTRIES = 4096, 2048  # of a program's tile: 32 and, beside two sums each, 16 a thread


def _image(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(like.shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)


def _last(t: Tensor | None) -> Tensor | None:
    """Pixels by channels without a gap."""
    return None if t is None else t.contiguous(memory_format=torch.channels_last)


def forward(
    y: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    eps: float, relu: bool,
) -> Tensor:  # fmt: skip
    """Of the residual's dtype, y's without one."""
    y, residual = _last(y), _last(residual)
    z = _image(y, y.dtype if residual is None else residual.dtype)
    channels = y.shape[1]
    pixels, tile = y.numel() // channels, _tile(channels, ENTRIES)
    if pixels:
        _forward[(triton.cdiv(pixels, tile["BM"]), triton.cdiv(channels, tile["BC"]))](
            y, mean, var, weight, bias, residual, z, eps, pixels, channels,
            weight is not None, bias is not None, residual is not None, relu, **tile,
        )  # fmt: skip
    return z


def backward(
    grad: Tensor, y: Tensor, z: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float, relu: bool, batch_stats: bool, need_y: bool, need_sum: bool, programs: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of y and of the sum in front of the ReLU, which the first pass stores for the second one to read; and
    float32 [2, C], of bias and weight, from at least ``programs`` programs whose sums are added in order."""
    grad, y, z = _last(grad), _last(y), _last(z)
    channels = y.shape[1]
    pixels, tile = y.numel() // channels, _tile(channels, SUM_ENTRIES)
    out = _image(y, y.dtype) if need_y else y.new_empty(0)
    gated = _image(y, grad.dtype) if need_sum else grad.new_empty(0)
    if not pixels:
        return out, gated, mean.new_zeros((2, channels))
    gate = ("none" if not relu else "y") if z is None else "z"
    affine = weight is not None, bias is not None
    blocks = triton.cdiv(channels, tile["BC"])
    each = triton.cdiv(triton.cdiv(pixels, triton.cdiv(programs, blocks)), tile["BM"]) * tile["BM"]
    parts = torch.empty((triton.cdiv(pixels, each), 2, channels), dtype=torch.float32, device=y.device)
    _sums[(len(parts), blocks)](
        grad, y, z, mean, var, weight, bias, gated, parts, eps, pixels, channels, each, gate, need_sum, *affine, **tile
    )
    sums = parts.sum(0)
    if need_y:
        tile = _tile(channels, ENTRIES)
        read, gate = (gated, "none") if need_sum else (grad, gate)
        _gradient[(triton.cdiv(pixels, tile["BM"]), triton.cdiv(channels, tile["BC"]))](
            read, y, z, mean, var, weight, bias, sums, out, eps, pixels, channels, gate, batch_stats, *affine, **tile
        )
    return out, gated, sums
