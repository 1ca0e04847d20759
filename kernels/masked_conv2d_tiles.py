"""``F.conv2d(x, weight * mask)`` over the tiles of a mask as implicit products, channels_last; two Triton kernels.

Pixels lie on the M axis of forward and input gradient and the weight's tile on N. A tile is of one tap, so a step's
input is the same pixels moved by one offset. The tiles are described in ``pysparse_ticket/ops/conv_tiles.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pysparse_ticket.ops.conv_tiles import ConvTiles
from pysparse_ticket.ops.masked_conv2d import output_size

from . import masked_linear
from .parts import (
    OPTIONS,
    channels_last,
    conv_precision,
    coordinates,
    device_of,
    multiply,
    new_image,
    pixel_strides,
    put_group,
)
from .tile_configs import Config, candidates
from .tile_launch import split_tokens
from .tile_tuning import pick

FAR = tl.constexpr(1 << 30)  # a row that no offset brings back into an image


# sizes of images come in all kinds: a kernel compiled anew for each multiple of 16 would be no faster
@triton.jit(do_not_specialize=["rows", "N", "H", "W", "OUT_H", "OUT_W", "mul_h", "mul_w", "step_h", "step_w"])
def conv_tiles(
    x, w, bias, y, walk, rows, N, H, W, OUT_H, OUT_W, C, OUT_C, mul_h, mul_w, step_h, step_w,
    x_n, x_h, x_w, y_n, y_h, y_w,
    BM: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BM pixels of one row of the walk: ``y[pixel * step + phase, o] = bias[o] + sum over the row's steps and channels
    of x[pixel * mul + offset, c] * w[tile][o, c]``, zero where that lies outside of x.

    w is ``[tiles, BO, BR]``, or with TRANSPOSED ``[tiles, BR, BO]``: the forward pass's tiles as they lie, for the
    input gradient. All rows of the walk of the same pixels run together and share their x in L2. Where a step's tile
    and offset lie is read one step ahead: a load that feeds another load in the same iteration would leave triton's
    pipeliner two buffers and no distance between load and use.
    """
    SUB: tl.constexpr = BR // BK  # steps a tile
    row = tl.program_id(0) % rows
    outs, steps = walk + rows + 1 + row * 3, walk + 4 * rows + 1
    first_out, phase_h, phase_w = tl.load(outs) * BO, tl.load(outs + 1), tl.load(outs + 2)
    begin, end = tl.load(walk + row), tl.load(walk + row + 1)
    height, width = (OUT_H - phase_h + step_h - 1) // step_h, (OUT_W - phase_w + step_w - 1) // step_w
    m = tl.program_id(0) // rows * BM + tl.arange(0, BM)
    n, i, j = coordinates(m, tl.maximum(height, 1), tl.maximum(width, 1))  # a phase beyond a small image is empty
    inside = m < N * height * width
    h, wide = i * mul_h, j * mul_w
    image = x + n.to(tl.int64) * x_n + h.to(tl.int64) * x_h + wide.to(tl.int64) * x_w
    h = tl.where(inside, h, FAR)
    reds, cols = tl.arange(0, BK), tl.arange(0, BO)
    at = steps + begin * 4
    tile, block, down, right = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    acc = tl.zeros((BM, BO), tl.float32)
    for step in range(begin * SUB, end * SUB):
        part = step % SUB * BK
        seen = (h + down >= 0) & (h + down < H) & (wide + right >= 0) & (wide + right < W)
        c = block * BR + part + reds
        pixels = image + (down * x_h + right * x_w)
        a = tl.load(pixels[:, None] + c[None, :], mask=seen[:, None] & (c < C)[None, :], other=0.0)
        base = w + tile.to(tl.int64) * (BO * BR)
        if TRANSPOSED:
            b = tl.load(base + (part + reds)[:, None] * BO + cols[None, :])
        else:
            b = tl.trans(tl.load(base + cols[:, None] * BR + (part + reds)[None, :]))
        acc = multiply(a, b, acc, PRECISION)
        at = steps + (step + 1) // SUB * 4
        tile, block, down, right = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    o = first_out + cols
    if BIAS:
        acc += tl.load(bias + o, mask=o < OUT_C, other=0.0).to(tl.float32)[None, :]
    h, wide = i * step_h + phase_h, j * step_w + phase_w
    pixels = y + n.to(tl.int64) * y_n + h.to(tl.int64) * y_h + wide.to(tl.int64) * y_w
    tl.store(pixels[:, None] + o[None, :], acc.to(y.dtype.element_ty), mask=inside[:, None] & (o < OUT_C)[None, :])


@triton.jit(do_not_specialize=["n_items", "tiles", "rows", "H", "W", "OH", "OW", "M", "chunk", "stride_h", "stride_w"])
def conv_weight_grad(
    x, dy, out, items, walk, partial, bits, n_items, tiles, rows, H, W, OH, OW, M, C, OUT_C, chunk, stride_h, stride_w,
    x_n, x_h, x_w,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over a chunk of the output's pixels of ``dy[pixel, o] * x[pixel * stride + offset, c]`` at the tiles, GROUP
    tiles of a row side by side on the M axis, each with its own offset: they share the load of dy.

    dy has no gaps between pixels. SPLIT says only whether there are several chunks.
    """
    BM: tl.constexpr = GROUP * BK
    unit = tl.program_id(0)
    number, item = unit // n_items, unit % n_items
    row, first, count = tl.load(items + item * 3), tl.load(items + item * 3 + 1), tl.load(items + item * 3 + 2)
    begin, stop = number * chunk, min(M, (number + 1) * chunk)
    n = tl.arange(0, BN)
    o = row * BN + n
    i = tl.arange(0, BM)
    k, tile = i % BK, first + i // BK
    there = i // BK < count
    # arithmetic on scalars gives each load the layout it wants: loads of 256 offsets would send the mask through shared
    # memory in every step
    at = walk + 4 * rows + 1 + first * 4
    c, down, right = k, tl.zeros((BM,), tl.int32), tl.zeros((BM,), tl.int32)
    for g in tl.static_range(GROUP):
        own, some = i // BK == g, g < count
        c += tl.where(own, tl.load(at + g * 4 + 1, mask=some, other=0) * BK, 0)
        down += tl.where(own, tl.load(at + g * 4 + 2, mask=some, other=0), 0)
        right += tl.where(own, tl.load(at + g * 4 + 3, mask=some, other=0), 0)
    c = tl.max_contiguous(tl.multiple_of(c, BK), BK)
    down, right = tl.max_constancy(down, BK), tl.max_constancy(right, BK)
    known = there & (c < C)
    offset = down * x_h + right * x_w + c
    # BT pixels on are so many images, rows and columns on: no division in the loop
    next_n, next_h, next_w = BT // (OH * OW), BT // OW % OH, BT % OW
    image, oh, ow = coordinates(begin + tl.arange(0, BT), OH, OW)
    acc = tl.zeros((BM, BN), tl.float32)
    for t in range(begin, stop, BT):
        ts = t + tl.arange(0, BT)
        h, wide = oh * stride_h, ow * stride_w
        pixels = x + image.to(tl.int64) * x_n + h.to(tl.int64) * x_h + wide.to(tl.int64) * x_w
        h = tl.where(ts < stop, h, FAR)[:, None] + down[None, :]
        wide = wide[:, None] + right[None, :]
        seen = known[None, :] & (h >= 0) & (h < H) & (wide >= 0) & (wide < W)
        a = tl.load(pixels[:, None] + offset[None, :], mask=seen, other=0.0)
        in_y = (ts < stop)[:, None] & (o < OUT_C)[None, :]
        b = tl.load(dy + ts.to(tl.int64)[:, None] * OUT_C + o[None, :], mask=in_y, other=0.0)
        acc = multiply(tl.trans(a), b, acc, PRECISION)
        ow += next_w
        over = (ow >= OW).to(tl.int32)
        ow -= over * OW
        oh += next_h + over
        over = (oh >= OH).to(tl.int32)
        oh -= over * OH
        image += next_n + over
    put_group(acc, out, tile, there, number, tiles, partial, bits, k, n, BN, BK, SPLIT)


def forward(x: Tensor, values: Tensor, bias: Tensor | None, tiles: ConvTiles) -> Tensor:
    """x ``[N, C, H, W]``, masked values ``[tiles, bn, bk]`` -> y ``[N, O, ., .]``, channels_last."""
    size = output_size(x.shape[2:], tiles.shape[2:], tiles.stride, tiles.padding, tiles.dilation)
    y = new_image(x, (x.shape[0], tiles.shape[0], *size))
    return _products(x, values, bias, y, tiles.walk, tiles.grid[0], tiles.tile, False, tiles.stride, (1, 1))


def input_grad(dy: Tensor, values: Tensor, tiles: ConvTiles, size: tuple[int, ...]) -> Tensor:
    """dy ``[N, O, ., .]`` -> ``size``. float32 values are turned first: the TF32 instruction sums along rows alone."""
    transposed, (bn, bk) = values.element_size() == 2, tiles.tile
    values = values if transposed else values.transpose(1, 2).contiguous()
    rows = tiles.stride[0] * tiles.stride[1] * -(-size[1] // bk)
    return _products(
        dy, values, None, new_image(dy, size), tiles.t_walk, rows, (bk, bn), transposed, (1, 1), tiles.stride
    )


def _products(x, w, bias, y, walk, rows, sides, transposed, mul, step) -> Tensor:
    x = channels_last(x)
    (n, channels, h, wide), (_, out_channels, out_h, out_w) = x.shape, y.shape
    out_side, sum_side = sides
    device, precision = device_of(x.device), conv_precision(x.dtype)
    pixels = n * -(-out_h // step[0]) * -(-out_w // step[1])
    depth = min(sum_side, 64 if x.element_size() == 2 else 32)

    def run(config: Config) -> None:
        conv_tiles[(triton.cdiv(pixels, config.block) * rows,)](
            x, w, bias, y, walk, rows, n, h, wide, out_h, out_w, channels, out_channels, *mul, *step,
            *pixel_strides(x), *pixel_strides(y),
            config.block, out_side, sum_side, depth, transposed, bias is not None, precision,
            num_warps=config.warps, num_stages=config.stages, **OPTIONS,
        )  # fmt: skip

    if pixels:
        kind = ("conv", out_side, sum_side, transposed, x.dtype, precision, rows, len(walk), pixels)
        pick(device.name, kind, candidates("conv", out_side, x.dtype, precision, False, pixels), run)
    return y


def weight_grad(x: Tensor, dy: Tensor, tiles: ConvTiles, dtype: torch.dtype) -> Tensor:
    """x ``[N, C, H, W]``, dy ``[N, O, ., .]`` -> ``[tiles, bn, bk]`` in ``dtype``, zero where pruned."""
    matrix, (bn, bk) = tiles.matrix, tiles.tile
    rows, count = tiles.grid[0], tiles.tiles
    items = matrix.items.shape[0] - rows  # without those for the bias
    out = x.new_empty(count, bn, bk, dtype=dtype)
    n, outputs, oh, ow = dy.shape
    pixels = n * oh * ow
    if not pixels or not items:
        return out.zero_()
    x, dy = channels_last(x), dy.permute(0, 2, 3, 1).contiguous()
    device, precision = device_of(x.device), conv_precision(x.dtype)

    def run(config: Config) -> None:
        split, chunk = split_tokens(pixels, items, device.multiprocessors * config.resident, config.block)
        sums = out if split == 1 else x.new_empty(split, count, bn, bk, dtype=torch.float32)
        conv_weight_grad[(split * items,)](
            x, dy, sums, matrix.items, tiles.walk, matrix.partial, matrix.bits, items, count, rows,
            *x.shape[2:], oh, ow, pixels, x.shape[1], outputs, chunk, *tiles.stride, *pixel_strides(x),
            config.block, bn, bk, matrix.group, min(split, 2), precision,
            num_warps=config.warps, num_stages=config.stages, **OPTIONS,
        )  # fmt: skip
        if split > 1:
            masked_linear.sum_splits[(count,)](
                sums, out, matrix.partial, matrix.bits, count, bn, bk, split, num_warps=4, **OPTIONS
            )

    kind = ("conv_weight_grad", bn, bk, x.dtype, precision, items, count, pixels)
    pick(device.name, kind, candidates("conv_weight_grad", max(bn, bk), x.dtype, precision, False, pixels), run)
    return out
