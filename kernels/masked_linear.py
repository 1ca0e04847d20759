"""``F.linear(x, weight * mask)`` over the tiles of a mask: forward and input gradient, weight gradient, masking.

Tokens lie on the M axis of forward and input gradient and the weight's tile on N, so that Hopper's matrix instruction
(M = 64) serves tiles down to 16 x 16. The tiles are described in ``pysparse_ticket/ops/tile_mask.py``.
"""

import triton
import triton.language as tl

from .parts import mask_of, multiply, put_group


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    return z


@triton.jit
def _finish(
    acc, y, z, bias, m, column, T, OUT, stride_y,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, KEEP: tl.constexpr, DESC: tl.constexpr,
):  # fmt: skip
    """Bias and activation of one piece of an output tile, and its way out; ``z`` takes what the activation saw."""
    BM: tl.constexpr = acc.shape[0]
    BO: tl.constexpr = acc.shape[1]
    cols = column + tl.arange(0, BO)
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=cols < OUT, other=0.0).to(tl.float32)[None, :]
    if DESC:
        if KEEP:
            z.store([m, column], acc.to(z.dtype))
        y.store([m, column], _activate(acc, ACTIVATION).to(y.dtype))
    else:
        rows = m + tl.arange(0, BM)
        at = rows.to(tl.int64)[:, None] * stride_y + cols[None, :]
        inside = (rows < T)[:, None] & (cols < OUT)[None, :]
        if KEEP:
            tl.store(z + at, acc.to(z.dtype.element_ty), mask=inside)
        tl.store(y + at, _activate(acc, ACTIVATION).to(y.dtype.element_ty), mask=inside)


@triton.jit
def matmul_tiles(
    x, w, y, z, bias, walk, tiles, entries, T, OUT, RED, stride_x, stride_y, out_rows, spin, programs,
    BM: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, KEEP: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, DESC: tl.constexpr,
):  # fmt: skip
    """``y [T, OUT] = act(x [T, RED] @ weight + bias)``, an output tile of BM tokens and a tile row at a time.

    w is ``[tiles * BO, BR]``, or with TRANSPOSED ``[tiles * BR, BO]``: the forward pass's tiles as they lie, for the
    input gradient. x, w, y, z are tensor descriptors with DESC, else pointers; rows of x and y are strided.

    One loop runs through all steps of all output tiles of a program, so that loads for the next tile are under way
    while the last one is finished: at 90% sparsity one has about six steps, and the pipeline would spend half of its
    time filling. Addresses of a step are read one step ahead, in loop-carried scalars: a load that feeds another load
    in the same iteration would leave triton's pipeliner two buffers and no distance between load and use.
    """
    SUB: tl.constexpr = BR // BK  # steps a tile
    pid = tl.program_id(0)
    blocks = (T + BM - 1) // BM
    items = blocks * out_rows  # all tile rows of one block of tokens are in flight together, and share its x in L2
    out_of, tile_of, other_of = walk + out_rows + 1, walk + 2 * out_rows + 1, walk + 2 * out_rows + 1 + entries

    count = 0
    for i in range(pid, items, programs):
        at = (i % out_rows + i // out_rows * spin) % out_rows
        count += tl.load(walk + at + 1) - tl.load(walk + at)

    item = pid
    # tile rows are sorted by length: the turn by ``spin`` from block to block gives each program long and short ones
    at = (item % out_rows + item // out_rows * spin) % out_rows
    m = item // out_rows * BM
    column = tl.load(out_of + at) * BO
    step, end = tl.load(walk + at) * SUB, tl.load(walk + at + 1) * SUB
    tile, other = tl.load(tile_of + step // SUB), tl.load(other_of + step // SUB)
    acc = tl.zeros((BM, BO), tl.float32)
    for _ in range(count * SUB):
        part = step % SUB * BK
        last = (other < 0) & (step % SUB == SUB - 1)
        other = tl.where(other < 0, -1 - other, other)
        if DESC:
            a = x.load([m, other * BR + part])
            b = w.load([tile * BR + part, 0]) if TRANSPOSED else w.load([tile * BO, part])
        else:
            rows, reds, outs = m + tl.arange(0, BM), part + tl.arange(0, BK), tl.arange(0, BO)
            xs = other * BR + reds
            at_x = rows.to(tl.int64)[:, None] * stride_x + xs[None, :]
            a = tl.load(x + at_x, mask=(rows < T)[:, None] & (xs < RED)[None, :], other=0.0)
            base = w + tile.to(tl.int64) * (BO * BR)
            at_w = reds[:, None] * BO + outs[None, :] if TRANSPOSED else outs[:, None] * BR + reds[None, :]
            b = tl.load(base + at_w, mask=tl.full(at_w.shape, tile, tl.int32) < tiles, other=0.0)
        b = b if TRANSPOSED else tl.trans(b)
        acc = multiply(a, b, acc, PRECISION)
        if last:
            if PIECES == 2:  # halves the shared memory that the output passes through
                left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BO // 2)), (0, 2, 1)))
                _finish(left, y, z, bias, m, column, T, OUT, stride_y, HAS_BIAS, ACTIVATION, KEEP, DESC)
                _finish(right, y, z, bias, m, column + BO // 2, T, OUT, stride_y, HAS_BIAS, ACTIVATION, KEEP, DESC)
            else:
                _finish(acc, y, z, bias, m, column, T, OUT, stride_y, HAS_BIAS, ACTIVATION, KEEP, DESC)
            acc = tl.zeros((BM, BO), tl.float32)
        step += 1
        # the same moment as ``last``, but not to the compiler: it would merge the branches, and not pipeline them
        if step == end:
            item += programs
            at = (item % out_rows + item // out_rows * spin) % out_rows
            m = item // out_rows * BM
            column = tl.load(out_of + at) * BO
            step, end = tl.load(walk + at) * SUB, tl.load(walk + at + 1) * SUB
        tile, other = tl.load(tile_of + step // SUB), tl.load(other_of + step // SUB)


@triton.jit
def _put_tile(
    acc, out, tile, number, tiles, partial, bits, rows, cols,
    BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient: masked into its place, or as it is into the sums that ``sum_splits`` adds up."""
    at = rows * BK + cols
    if SPLIT == 1:
        part = tl.load(partial + tile)
        if part >= 0:
            acc = tl.where(mask_of(bits, part, rows, cols, BN, BK), acc, 0.0)
        tl.store(out + tile.to(tl.int64) * (BN * BK) + at, acc.to(out.dtype.element_ty))
    else:
        tl.store(out + (number.to(tl.int64) * tiles + tile) * (BN * BK) + at, acc)


@triton.jit
def weight_grad_boxes(
    x, dy, out, bias_out, items, col, partial, bits, n_items, tiles, T, N, K, chunk,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``(dy^T x)`` at the tiles, up to GROUP (2 or 4) of a row at a time, which share the load of dy; x, dy are
    descriptors of boxes ``[BT, ..]``. A box behind x's last column is zeros that nobody loads: a missing tile's.

    A program takes one item over ``chunk`` tokens; with no tile in it, it sums dy's columns for the bias, while the
    same part of dy is in L2 for its neighbours. Programs that run together are of the same tokens.
    """
    unit = tl.program_id(0)
    number, item = unit // n_items, unit % n_items
    row, first, count = tl.load(items + item * 3), tl.load(items + item * 3 + 1), tl.load(items + item * 3 + 2)
    begin, stop = number * chunk, min(T, (number + 1) * chunk)
    n, k = tl.arange(0, BN), tl.arange(0, BK)
    if count == 0:
        total = tl.zeros((BT, BN), tl.float32)
        for t in tl.range(begin, stop, BT, num_stages=3):  # without a product in it, a loop is pipelined when told to
            total += dy.load([t, row * BN]).to(tl.float32)
        at = row * BN + n
        tl.store(bias_out + number * N + at, tl.sum(total, 0), mask=at < N)
    elif count == 1:
        column = tl.load(col + first) * BK
        acc = tl.zeros((BN, BK), tl.float32)
        for t in range(begin, stop, BT):
            acc = multiply(tl.trans(dy.load([t, row * BN])), x.load([t, column]), acc, PRECISION)
        _put_tile(acc, out, first, number, tiles, partial, bits, n[:, None], k[None, :], BN, BK, SPLIT)
    elif GROUP == 4 and count > 2:
        column, second = tl.load(col + first) * BK, tl.load(col + first + 1) * BK
        third = tl.load(col + first + 2) * BK
        fourth = tl.load(col + first + 3, mask=count > 3, other=(K + BK - 1) // BK) * BK
        acc, acc2 = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, BK), tl.float32)
        acc3, acc4 = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, BK), tl.float32)
        for t in range(begin, stop, BT):
            a = tl.trans(dy.load([t, row * BN]))
            acc = multiply(a, x.load([t, column]), acc, PRECISION)
            acc2 = multiply(a, x.load([t, second]), acc2, PRECISION)
            acc3 = multiply(a, x.load([t, third]), acc3, PRECISION)
            acc4 = multiply(a, x.load([t, fourth]), acc4, PRECISION)
        _put_tile(acc, out, first, number, tiles, partial, bits, n[:, None], k[None, :], BN, BK, SPLIT)
        _put_tile(acc2, out, first + 1, number, tiles, partial, bits, n[:, None], k[None, :], BN, BK, SPLIT)
        _put_tile(acc3, out, first + 2, number, tiles, partial, bits, n[:, None], k[None, :], BN, BK, SPLIT)
        if count > 3:
            _put_tile(acc4, out, first + 3, number, tiles, partial, bits, n[:, None], k[None, :], BN, BK, SPLIT)
    else:
        column, second = tl.load(col + first) * BK, tl.load(col + first + 1) * BK
        acc, acc2 = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, BK), tl.float32)
        for t in range(begin, stop, BT):
            a = tl.trans(dy.load([t, row * BN]))
            acc = multiply(a, x.load([t, column]), acc, PRECISION)
            acc2 = multiply(a, x.load([t, second]), acc2, PRECISION)
        _put_tile(acc, out, first, number, tiles, partial, bits, n[:, None], k[None, :], BN, BK, SPLIT)
        _put_tile(acc2, out, first + 1, number, tiles, partial, bits, n[:, None], k[None, :], BN, BK, SPLIT)


@triton.jit
def weight_grad_gather(
    x, dy, out, bias_out, items, col, partial, bits, n_items, tiles, T, N, K, chunk, stride_x, stride_y,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The same through pointers, GROUP tiles of a row side by side on the M axis: tiles below 64 fill it."""
    BM: tl.constexpr = GROUP * BK
    unit = tl.program_id(0)
    number, item = unit // n_items, unit % n_items
    row, first, count = tl.load(items + item * 3), tl.load(items + item * 3 + 1), tl.load(items + item * 3 + 2)
    begin, stop = number * chunk, min(T, (number + 1) * chunk)
    n = tl.arange(0, BN)
    ns = row * BN + n
    if count == 0:
        total = tl.zeros((BT, BN), tl.float32)
        for t in tl.range(begin, stop, BT, num_stages=3):  # without a product in it, a loop is pipelined when told to
            ts = t + tl.arange(0, BT)
            at = ts.to(tl.int64)[:, None] * stride_y + ns[None, :]
            total += tl.load(dy + at, mask=(ts < stop)[:, None] & (ns < N)[None, :], other=0.0).to(tl.float32)
        tl.store(bias_out + number * N + ns, tl.sum(total, 0), mask=ns < N)
    else:
        i = tl.arange(0, BM)
        k, tile = i % BK, first + i // BK
        there = i // BK < count
        ks = tl.load(col + tile, mask=there, other=0) * BK + k
        ks = tl.max_contiguous(tl.multiple_of(ks, BK), BK)
        acc = tl.zeros((BM, BN), tl.float32)
        for t in range(begin, stop, BT):
            ts = t + tl.arange(0, BT)
            in_x = (ts < stop)[:, None] & (there & (ks < K))[None, :]
            a = tl.load(x + ts.to(tl.int64)[:, None] * stride_x + ks[None, :], mask=in_x, other=0.0)
            in_y = (ts < stop)[:, None] & (ns < N)[None, :]
            b = tl.load(dy + ts.to(tl.int64)[:, None] * stride_y + ns[None, :], mask=in_y, other=0.0)
            acc = multiply(tl.trans(a), b, acc, PRECISION)
        put_group(acc, out, tile, there, number, tiles, partial, bits, k, n, BN, BK, SPLIT)


@triton.jit
def sum_splits(sums, out, partial, bits, tiles, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr):
    """The gradient of one tile from its SPLIT sums, always in the same order, masked."""
    tile = tl.program_id(0)
    rows, cols = tl.arange(0, BN)[:, None], tl.arange(0, BK)[None, :]
    at = rows * BK + cols
    acc = tl.zeros((BN, BK), tl.float32)
    for number in range(SPLIT):
        acc += tl.load(sums + (number * tiles + tile).to(tl.int64) * (BN * BK) + at)
    _put_tile(acc, out, tile, tile, tiles, partial, bits, rows, cols, BN, BK, 1)


@triton.jit
def mask_tiles(
    values, out, partial, bits, stride, stride_n, stride_k,
    BN: tl.constexpr, BK: tl.constexpr, TRANSPOSE: tl.constexpr,
):  # fmt: skip
    """``out = values * mask`` in out's type, a tile a program; with TRANSPOSE each tile as ``[BK, BN]``."""
    tile = tl.program_id(0)
    rows, cols = tl.arange(0, BN)[:, None], tl.arange(0, BK)[None, :]
    v = tl.load(values + tile.to(tl.int64) * stride + rows * stride_n + cols * stride_k)
    part = tl.load(partial + tile)
    if part >= 0:
        v = tl.where(mask_of(bits, part, rows, cols, BN, BK), v, 0.0)
    out += tile.to(tl.int64) * (BN * BK)
    v = v.to(out.dtype.element_ty)
    if TRANSPOSE:
        tl.store(out + tl.arange(0, BK)[:, None] * BN + tl.arange(0, BN)[None, :], tl.trans(v))
    else:
        tl.store(out + rows * BK + cols, v)
