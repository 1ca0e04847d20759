"""Convolution over kept filters and kept input channels as an implicit product, channels_last: three Triton kernels.

A program computes BM pixels x BN channels. The product's inner dimension is (tap, channel), walked as one loop so that
the loads of the next tap are under way before the last of this one are used. Channels of a tensor that holds removed
ones are read and written through their index; removed channels are never multiplied.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .parts import channels_last, conv_precision, coordinates, multiply, new_image, pixel_strides

Pair = tuple[int, int]


@triton.jit
def _forward(
    x, w, bias, y, parts, in_index, out_index,
    H, W, OH, OW, C, OC, M,
    x_n, x_h, x_w, y_n, y_h, y_w, w_o, w_t,
    KW: tl.constexpr, TAPS: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr, BIAS: tl.constexpr,
    STATS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[m, o] = bias[o] + sum over taps and channels of x[m * stride + tap, c] * w[o, tap, c]."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    outs = tl.program_id(1) * BN + tl.arange(0, BN)
    n, oh, ow = coordinates(rows, OH, OW)
    image = x + n.to(tl.int64) * x_n
    inside, kept = rows < M, outs < OC
    channel = tl.arange(0, BK)
    blocks = tl.cdiv(C, BK)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for step in range(0, TAPS * blocks):
        tap, c = step // blocks, step % blocks * BK + channel
        ih = oh * SH - PH + tap // KW * DH
        iw = ow * SW - PW + tap % KW * DW
        seen = inside & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        known = c < C
        at = tl.load(in_index + c, mask=known, other=0).to(tl.int32) if GATHER else c
        pixel = image + ih.to(tl.int64) * x_h + iw.to(tl.int64) * x_w
        a = tl.load(pixel[:, None] + at[None, :], mask=seen[:, None] & known[None, :], other=0.0)
        b = tl.load(
            w + outs[None, :].to(tl.int64) * w_o + tap * w_t + c[:, None],
            mask=kept[None, :] & known[:, None],
            other=0.0,
        )
        total = multiply(a, b, total, PRECISION)
    if BIAS:
        total += tl.load(bias + outs, mask=kept, other=0.0).to(tl.float32)[None, :]
    written = total.to(y.dtype.element_ty)
    whole = inside[:, None] & kept[None, :]
    to = tl.load(out_index + outs, mask=kept, other=0) if SCATTER else outs
    pixel = y + n.to(tl.int64) * y_n + oh.to(tl.int64) * y_h + ow.to(tl.int64) * y_w
    tl.store(pixel[:, None] + to[None, :], written, mask=whole)
    if STATS:
        # mean and squared deviations of these pixels, of the values as written: the sums of many tiles add without
        # the cancellation of E[y^2] - E[y]^2
        count = tl.minimum(M - tl.program_id(0) * BM, BM).to(tl.float32)
        value = tl.where(whole, written.to(tl.float32), 0.0)
        mean = tl.sum(value, axis=0) / count
        off = tl.where(whole, value - mean[None, :], 0.0)
        at = parts + tl.program_id(0).to(tl.int64) * 2 * OC + outs
        tl.store(at, mean, mask=kept)
        tl.store(at + OC, tl.sum(off * off, axis=0), mask=kept)


@triton.jit
def _join(parts, found, blocks, OC, pixels, each, BB: tl.constexpr, BN: tl.constexpr):
    """Mean and biased variance of all pixels from the parts that :func:`_forward` wrote."""
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    kept = outs < OC
    base = tl.load(parts + outs, mask=kept, other=0.0)  # sums of what is near zero round least
    mean = tl.zeros((BN,), dtype=tl.float32)
    for first in range(0, blocks, BB):
        block = first + tl.arange(0, BB)
        count = tl.minimum(pixels - block * each, each).to(tl.float32)
        whole = (block < blocks)[:, None] & kept[None, :]
        at = parts + block.to(tl.int64)[:, None] * 2 * OC + outs[None, :]
        off = tl.load(at, mask=whole, other=0.0) - base[None, :]
        mean += tl.sum(tl.where(whole, off * count[:, None], 0.0), axis=0)
    mean = base + mean / pixels
    squares = tl.zeros((BN,), dtype=tl.float32)
    for first in range(0, blocks, BB):
        block = first + tl.arange(0, BB)
        count = tl.minimum(pixels - block * each, each).to(tl.float32)
        whole = (block < blocks)[:, None] & kept[None, :]
        at = parts + block.to(tl.int64)[:, None] * 2 * OC + outs[None, :]
        off = tl.load(at, mask=whole, other=0.0) - mean[None, :]
        more = tl.load(at + OC, mask=whole, other=0.0) + count[:, None] * off * off
        squares += tl.sum(tl.where(whole, more, 0.0), axis=0)
    tl.store(found + outs, mean, mask=kept)
    tl.store(found + OC + outs, squares / pixels, mask=kept)


@triton.jit
def _input_gradient(
    grad, w, out, in_index, out_index,
    H, W, OH, OW, C, OC, N,
    g_n, g_h, g_w, x_n, x_h, x_w, w_o, w_t,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, GATHER: tl.constexpr,
    SCATTER: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[pixel, c] = sum of grad[(pixel + padding - tap * dilation) / stride, o] * w[o, tap, c].

    Pixels go by their phase, their place modulo the stride: all pixels of a phase meet the same taps, every STEP-th
    from the first that divides, and no product is masked away.
    """
    phase_h, phase_w = tl.program_id(2) // SW, tl.program_id(2) % SW
    height, width = tl.cdiv(H - phase_h, SH), tl.cdiv(W - phase_w, SW)
    first_h, first_w = KH, KW
    for i in tl.static_range(KH):
        first_h = tl.where((phase_h + PH - (KH - 1 - i) * DH) % SH == 0, KH - 1 - i, first_h)
    for i in tl.static_range(KW):
        first_w = tl.where((phase_w + PW - (KW - 1 - i) * DW) % SW == 0, KW - 1 - i, first_w)
    taps_h, taps_w = tl.cdiv(KH - first_h, STEP_H), tl.cdiv(KW - first_w, STEP_W)

    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    n, i, j = coordinates(rows, tl.maximum(height, 1), tl.maximum(width, 1))  # a phase beyond a small image is empty
    h, wide = i * SH + phase_h, j * SW + phase_w
    inside = rows < N * height * width
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    kept = cols < C
    image = grad + n.to(tl.int64) * g_n
    channel = tl.arange(0, BK)
    blocks = tl.cdiv(OC, BK)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for step in range(0, taps_h * taps_w * blocks):
        tap, o = step // blocks, step % blocks * BK + channel
        r = first_h + tap // taps_w * STEP_H
        t = first_w + tap % taps_w * STEP_W
        oh, ow = h + PH - r * DH, wide + PW - t * DW
        seen = inside & (oh >= 0) & (ow >= 0) & (oh < OH * SH) & (ow < OW * SW)
        known = o < OC
        at = tl.load(out_index + o, mask=known, other=0).to(tl.int32) if GATHER else o
        pixel = image + (oh // SH).to(tl.int64) * g_h + (ow // SW).to(tl.int64) * g_w
        a = tl.load(pixel[:, None] + at[None, :], mask=seen[:, None] & known[None, :], other=0.0)
        b = tl.load(
            w + o[:, None].to(tl.int64) * w_o + (r * KW + t) * w_t + cols[None, :],
            mask=known[:, None] & kept[None, :],
            other=0.0,
        )
        total = multiply(a, b, total, PRECISION)
    to = tl.load(in_index + cols, mask=kept, other=0) if SCATTER else cols
    pixel = out + n.to(tl.int64) * x_n + h.to(tl.int64) * x_h + wide.to(tl.int64) * x_w
    tl.store(pixel[:, None] + to[None, :], total.to(out.dtype.element_ty), mask=inside[:, None] & kept[None, :])


@triton.jit
def _weight_gradient(
    grad, x, out, in_index, out_index,
    H, W, OH, OW, C, OC, M, each,
    g_n, g_h, g_w, x_n, x_h, x_w,
    KW: tl.constexpr, TAPS: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, GATHER_X: tl.constexpr, GATHER_G: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[part, o, tap, c] = sum over the part's pixels of grad[pixel, o] * x[pixel * stride + tap, c]."""
    outs = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    tap, part = tl.program_id(2) % TAPS, tl.program_id(2) // TAPS
    kept, known = outs < OC, cols < C
    from_g = tl.load(out_index + outs, mask=kept, other=0).to(tl.int32) if GATHER_G else outs
    from_x = tl.load(in_index + cols, mask=known, other=0).to(tl.int32) if GATHER_X else cols
    pixels = tl.arange(0, BK)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(part * each, tl.minimum(part * each + each, M), BK):
        m = start + pixels
        inside = m < M
        n, oh, ow = coordinates(m, OH, OW)
        ih, iw = oh * SH - PH + tap // KW * DH, ow * SW - PW + tap % KW * DW
        seen = inside & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        at = n.to(tl.int64) * g_n + oh.to(tl.int64) * g_h + ow.to(tl.int64) * g_w
        a = tl.load(grad + at[:, None] + from_g[None, :], mask=inside[:, None] & kept[None, :], other=0.0)
        at = n.to(tl.int64) * x_n + ih.to(tl.int64) * x_h + iw.to(tl.int64) * x_w
        b = tl.load(x + at[:, None] + from_x[None, :], mask=seen[:, None] & known[None, :], other=0.0)
        total = multiply(tl.trans(a), b, total, PRECISION)
    at = ((part.to(tl.int64) * OC + outs[:, None]) * TAPS + tap) * C + cols[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=kept[:, None] & known[None, :])


def _power(n: int, least: int, most: int) -> int:
    return max(least, min(most, triton.next_power_of_2(n)))


def _tiles(outputs: int, inner: int, dtype: torch.dtype, gather: bool) -> dict[str, int]:
    """BM pixels x BN channels in steps of BK: 128 x 128 in 8 warps, two warpgroups of 64 x 128, four below. Four stages
    of 128 x 64 and 64 x 128 in 16 bits take 128 of Hopper's 227 KB; float32 takes steps of half the channels. A gather
    has an address an element, and would spill registers in any larger tile than these (sm_80 and sm_90)."""
    half = dtype.itemsize == 2
    bn = _power(outputs, 16 if half else 32, 128)  # float32 on sm_80 spills at 16
    bk = _power(inner, 16, 64 if half and not gather else 32)
    return {"BM": 64 if gather else 128, "BN": bn, "BK": bk, "num_warps": 8 if bn == 128 else 4} | _stages(half)


def _gradient_tiles(outputs: int, inputs: int, dtype: torch.dtype, gather: bool) -> dict[str, int]:
    """BM filters x BN channels in steps of BK pixels: wgmma takes from 64 on M."""
    half, most = dtype.itemsize == 2, 64 if gather else 128
    bm, bn = _power(outputs, 64, most), _power(inputs, 16, most)
    bk = 64 if half and not gather else 32
    return {"BM": bm, "BN": bn, "BK": bk, "num_warps": 8 if bm * bn == 128 * 128 else 4} | _stages(half)


def _stages(half: bool) -> dict[str, int]:
    return {"num_stages": 4 if half else 3}


def _taps(weight: Tensor) -> tuple[Tensor, int, int]:
    """The weight as [O, taps, C] in memory, and the strides of O and of taps."""
    weight = weight.permute(0, 2, 3, 1).contiguous()
    return weight, weight.stride(0), weight.stride(2)


def _output(like: Tensor, size: tuple[int, int, int, int], whole: bool) -> Tensor:
    """A channels_last image, zero unless the kernel writes the whole of it."""
    y = new_image(like, size)
    return y if whole else y.zero_()


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_index: Tensor | None, out_index: Tensor | None,
    out_channels: int, output: Pair, stride: Pair, padding: Pair, dilation: Pair, stats: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and, with ``stats``, float32 [2, O]: mean and biased variance of each kept channel; else an empty tensor."""
    x = channels_last(x)
    taps, w_o, w_t = _taps(weight)
    n, _, h, w = x.shape
    outputs, inputs, kh, kw = weight.shape
    oh, ow = output
    pixels = n * oh * ow
    y = _output(x, (n, out_channels, oh, ow), out_index is None)
    tile = _tiles(outputs, inputs, x.dtype, in_index is not None)
    blocks = triton.cdiv(pixels, tile["BM"])
    parts = torch.empty((blocks, 2, outputs) if stats else (0,), dtype=torch.float32, device=x.device)
    if pixels:
        _forward[(blocks, triton.cdiv(outputs, tile["BN"]))](
            x, taps, bias, y, parts, in_index, out_index,
            h, w, oh, ow, inputs, outputs, pixels,
            *pixel_strides(x), *pixel_strides(y), w_o, w_t,
            kw, kh * kw, *stride, *padding, *dilation, in_index is not None, out_index is not None, bias is not None,
            stats, conv_precision(x.dtype), **tile,
        )  # fmt: skip
    return y, _combined(parts, pixels, tile["BM"]) if stats else parts


def _combined(parts: Tensor, pixels: int, each: int) -> Tensor:
    """Mean and variance of all pixels from those of tiles of ``each`` pixels, the last one shorter."""
    outputs = parts.shape[2]
    found = torch.empty((2, outputs), dtype=torch.float32, device=parts.device)
    if not pixels:
        return found.fill_(math.nan)
    blocks = _power(len(parts), 16, 512)
    _join[(triton.cdiv(outputs, 8),)](parts, found, len(parts), outputs, pixels, each, blocks, 8, num_warps=4)
    return found


def input_gradient(
    grad: Tensor, weight: Tensor, in_index: Tensor | None, out_index: Tensor | None, size: tuple[int, ...],
    stride: Pair, padding: Pair, dilation: Pair,
) -> Tensor:  # fmt: skip
    """Of the size of x, zero in the channels that ``in_index`` leaves out."""
    grad = channels_last(grad)
    taps, w_o, w_t = _taps(weight)
    n, _, h, w = size
    outputs, inputs, kh, kw = weight.shape
    out = _output(grad, tuple(size), in_index is None)
    tile = _tiles(inputs, outputs, grad.dtype, out_index is not None)
    phase = n * triton.cdiv(h, stride[0]) * triton.cdiv(w, stride[1])
    grid = (triton.cdiv(phase, tile["BM"]), triton.cdiv(inputs, tile["BN"]), stride[0] * stride[1])
    steps = [s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True)]
    if out.numel():
        _input_gradient[grid](
            grad, taps, out, in_index, out_index,
            h, w, *grad.shape[2:], inputs, outputs, n,
            *pixel_strides(grad), *pixel_strides(out), w_o, w_t,
            kh, kw, *stride, *padding, *dilation, *steps, out_index is not None, in_index is not None,
            conv_precision(grad.dtype), **tile,
        )  # fmt: skip
    return out


def weight_gradient(
    grad: Tensor, x: Tensor, in_index: Tensor | None, out_index: Tensor | None, shape: tuple[int, ...],
    stride: Pair, padding: Pair, dilation: Pair, programs: int,
) -> Tensor:  # fmt: skip
    """``[O, C, kh, kw]``; pixels are split so that ``programs`` programs run at least, their sums added in order."""
    grad, x = channels_last(grad), channels_last(x)
    outputs, inputs, kh, kw = shape
    n, _, oh, ow = grad.shape
    pixels = n * oh * ow
    tile = _gradient_tiles(outputs, inputs, x.dtype, in_index is not None or out_index is not None)
    blocks = triton.cdiv(outputs, tile["BM"]) * triton.cdiv(inputs, tile["BN"]) * kh * kw
    parts = max(1, min(-(-programs // blocks), triton.cdiv(pixels, 4 * tile["BK"])))
    each = triton.cdiv(triton.cdiv(pixels, parts), tile["BK"]) * tile["BK"]
    dtype = x.dtype if parts == 1 else torch.float32
    out = torch.empty((parts, outputs, kh, kw, inputs), dtype=dtype, device=x.device)
    grid = (triton.cdiv(outputs, tile["BM"]), triton.cdiv(inputs, tile["BN"]), kh * kw * parts)
    _weight_gradient[grid](
        grad, x, out, in_index, out_index,
        *x.shape[2:], oh, ow, inputs, outputs, pixels, each,
        *pixel_strides(grad), *pixel_strides(x),
        kw, kh * kw, *stride, *padding, *dilation, in_index is not None, out_index is not None,
        conv_precision(x.dtype), **tile,
    )  # fmt: skip
    total = out[0] if parts == 1 else out.sum(0).to(x.dtype)
    return total.permute(0, 3, 1, 2)
