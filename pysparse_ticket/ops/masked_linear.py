"""``F.linear(x, weight * mask, bias)`` with the surviving weights packed; kernels in ``csrc/cpu/masked_linear.cpp`` and
``csrc/cuda/masked_linear.cpp``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import CPU_ERROR, choose_backend, on_cuda
from .linear_shapes import check_packed
from .pattern import Pattern

Schedules = tuple[Tensor, Tensor]
ACTIVATIONS = (None, "relu")
OWN = {"cpu": "cpu", "cuda": "cuda"}


def column_tile(nnz: int, rows: int, columns: int) -> int:
    """Columns a tile. 128 columns of 64 samples are 32 KB, which stay in a 48 KB L1; the fewer nonzeros that leaves a
    row, the more moving its sums in and out costs, until reading x from L2 is faster. All tiles are about as wide: the
    last 16 columns of 784 alone would cost as much moving as 256."""
    density = nnz / max(1, rows * columns)
    width = 128 if density > 0.07 else 200 if density > 0.035 else 512
    tiles = max(1, round(columns / width))
    return max(1, -(-columns // tiles))


def linear_schedule(pattern: Pattern, windows: int | None = None) -> Schedules:
    """The order in which the kernels walk ``pattern`` and its transpose: int32 tensors, made once a mask; the CPU's
    kernels', or the GPU's for a pattern on a GPU that has them, and then the GPU is waited for.

    windows: of the GPU's alone, for 16-bit x: 0 for multiply-adds, 1 or 2 for windows of 16 rows on tensor cores with
    that many tiles of 64 samples a block, None for whichever an estimate from the mask finds fastest.
    """
    if windows not in (None, 0, 1, 2):
        raise ValueError(
            f"windows has 0, 1 or 2 tiles of samples a block, or None for a choice by the mask, not {windows!r}"
        )
    out_features, in_features = pattern.shape
    stays = pattern.col.is_cuda and on_cuda("linear_schedule")
    row_ptr, col, t_row_ptr, t_col, t_perm = (t if stays else t.cpu() for t in pattern.tensors)
    op = torch.ops.pysparse_ticket.linear_schedule

    def how(rows: int, columns: int) -> int:
        return -1 - windows if stays and windows is not None else column_tile(pattern.nnz, rows, columns)

    return (
        op(row_ptr, col, None, in_features, how(out_features, in_features)),
        op(t_row_ptr, t_col, t_perm, out_features, how(in_features, out_features)),
    )


def masked_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: Pattern,
    activation: str | None = None,
    backend: str | None = None,
    schedules: Schedules | None = None,
) -> Tensor:
    """``F.linear(x, pattern.scatter(values), bias)``, then ReLU where ``activation`` is ``"relu"``.

    x ``[..., in]``, values ``[nnz]``, bias ``[out]`` or None, pattern of shape ``[out, in]``; returns ``[..., out]`` of
    x's dtype. The ``cpu`` backend takes float32 and bfloat16 x, sums in float32, and runs under autocast to bfloat16
    with the values left in float32; so does ``cuda``, which also takes float16 x, and rounds the values to a 16-bit x's
    dtype where it multiplies on tensor cores; any other dtype or device runs on ``reference``. ``schedules`` is
    ``linear_schedule(pattern)``, made anew in each call that does not give it.
    ValueError for shapes that do not fit.
    """
    check_packed("masked_linear", x, values, bias, pattern)
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: None, 'relu'")
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype == torch.float32:
        # the CPU's kernels have no float16: autocast to it leaves x in float32
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype) if dtype == torch.bfloat16 or device == "cuda" else x
    if choose_backend("masked_linear", backend, x, OWN) == "reference":
        return _reference(x, values, bias, pattern, activation)
    if schedules is None:
        schedules = linear_schedule(pattern)
    keep = torch.is_grad_enabled() and values.requires_grad
    y, _ = torch.ops.pysparse_ticket.masked_linear(
        x,
        values.float(),
        None if bias is None else bias.float(),
        *schedules,
        pattern.shape[0],
        activation == "relu",
        keep,
    )
    return y


def _reference(x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, activation: str | None) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, values.dtype)
        y = F.linear(x.to(dtype), pattern.scatter(values.to(dtype)), None if bias is None else bias.to(dtype))
        return (y.relu() if activation else y).to(x.dtype)


def _setup(ctx, inputs, output) -> None:
    x, values, bias, schedule, t_schedule, _, relu, _ = inputs
    y, packed = output
    ctx.mark_non_differentiable(packed)
    ctx.set_materialize_grads(False)  # or zeros as large as x are written for packed in each backward pass
    ctx.in_features = x.shape[-1]
    ctx.has_bias = bias is not None
    ctx.save_for_backward(packed, values, y if relu else None, schedule, t_schedule)


def _backward(ctx, grad_y: Tensor, _grad_packed: Tensor | None) -> tuple[Tensor | None, ...]:
    need_x, need_values, need_bias = ctx.needs_input_grad[:3]
    need_bias = need_bias and ctx.has_bias
    grads = torch.ops.pysparse_ticket.masked_linear_backward(
        grad_y, *ctx.saved_tensors, ctx.in_features, need_x, need_values, need_bias
    )
    kept = (grad if need else None for grad, need in zip(grads, (need_x, need_values, need_bias), strict=True))
    return *kept, *(None,) * 5


def _padded(samples: int) -> int:
    return (samples + 15) // 16 * 16


def _samples(t: Tensor) -> int:
    n = 1
    for size in t.shape[:-1]:
        n *= size
    return n


def _fake(x, values, bias, schedule, t_schedule, out_features, relu, keep):
    if x.device.type == "cuda":  # tiles of 128 bytes of samples in x's own dtype (csrc/cuda/linear_schedule.h)
        tile = 128 // x.dtype.itemsize
        padded, dtype = (_samples(x) + tile - 1) // tile * tile, x.dtype
    else:
        padded, dtype = _padded(_samples(x)), torch.float32
    packed = padded * x.shape[-1] if keep else 0
    return x.new_empty(*x.shape[:-1], out_features), x.new_empty(packed, dtype=dtype)


def _fake_backward(grad_y, packed_x, values, y, schedule, t_schedule, in_features, *need):
    need_x, need_values, need_bias = need
    return (
        grad_y.new_empty((*grad_y.shape[:-1], in_features) if need_x else (0,)),
        values.new_empty(values.shape[0] if need_values else 0),
        values.new_empty(grad_y.shape[-1] if need_bias else 0),
    )


def _fake_schedule(row_ptr, col, perm, width, columns):
    return col.new_empty(torch.library.get_ctx().new_dynamic_size())


if CPU_ERROR is None:
    torch.library.register_fake("pysparse_ticket::masked_linear", _fake)
    torch.library.register_fake("pysparse_ticket::masked_linear_backward", _fake_backward)
    torch.library.register_fake("pysparse_ticket::linear_schedule", _fake_schedule)
    torch.library.register_autograd("pysparse_ticket::masked_linear", _backward, setup_context=_setup)
