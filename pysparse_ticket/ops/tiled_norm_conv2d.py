"""Chains cut between convolution and norm, so that the norm costs no passes over memory of its own.

A layer's convolution is handed on as it is (:class:`Raw`), with the statistics of its batch norm. The next convolution
normalises, adds the residual and applies the ReLU to the few rows that it is about to read; in backward its input
gradient's kernel applies the ReLU's gate and gathers the norm's two sums as it stores.

Between the ops the gradient of a Raw's convolution is in two parts: with g the gradient behind the ReLU, that of
channel c is ``g * t[0, c] + t[1, c] + (conv - mean[c]) * t[2, c]``, where t travels as the gradient of ``stats``. Only
this file sees either tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import tiled_reference as reference
from .library import CPU_ERROR, NAMESPACE
from .masked_conv2d import Pair
from .pattern import Pattern
from .tiled_conv2d import _backend, _check_input, _check_range, _norm_arguments, _output, _update_running

_ops = torch.ops.pysparse_ticket


@dataclass
class Raw:
    """``act(norm(conv) + residual)`` on tiles, not yet computed; to be read once, by one of this file's functions.

    conv      ``[T, C, H + 2 * halo, W + 2 * halo, 16]``, the halo undefined
    stats     ``[3, C]``: mean, 1 / sqrt(var + eps), biased variance; None on the reference backend, where conv is the
              convolution behind its norm
    """

    conv: Tensor
    stats: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    batch_stats: bool
    residual: Tensor | None
    relu: bool
    backend: str = "cpu"


class _NormConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, stats, weight, bias, residual, values, mean, var, row_ptr, col, t_row_ptr, t_col, t_perm, relu, keep,
        batch_stats, n, halo, geometry, eps,
    ):  # fmt: skip
        y, own, z = _ops.tiled_norm_conv2d(
            x, stats, weight, bias, residual, relu, keep, values, row_ptr, col, mean, var, n, halo, *geometry, eps
        )
        ctx.rest = (relu, batch_stats, n, halo, geometry)
        ctx.set_materialize_grads(False)
        stored = z if stats is not None and keep else None
        ctx.save_for_backward(y, own, x, stored, stats, weight, bias, values, row_ptr, col, t_row_ptr, t_col, t_perm)
        return y, own, x if stats is None else z

    @staticmethod
    def backward(ctx, grad, terms, again):
        y, own, x, z, stats, weight, bias, *rest = ctx.saved_tensors
        relu, batch_stats, n, halo, geometry = ctx.rest
        need_x = any(ctx.needs_input_grad[:5])
        if grad is None:
            if again is None:
                return (None,) * 20
            grad, terms = torch.zeros_like(y), torch.zeros_like(own)
        if again is not None:
            again = again.contiguous()
        dx, dterms, dnorm, dvalues = _ops.tiled_norm_conv2d_backward(
            grad.contiguous(), terms.contiguous(), again, y, own, x, z, stats, weight, bias, relu, batch_stats, *rest,
            n, halo, *geometry, need_x, ctx.needs_input_grad[5],
        )  # fmt: skip
        return (
            dx if need_x else None,
            dterms if stats is not None else None,
            dnorm[0] if weight is not None else None,
            dnorm[1] if bias is not None else None,
            dx if ctx.needs_input_grad[4] else None,
            dvalues if ctx.needs_input_grad[5] else None,
            *(None,) * 14,
        )


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, stats, weight, bias, residual, relu, batch_stats, n, halo):
        z = _ops.tiled_norm(y, stats, weight, bias, residual, halo, relu)
        ctx.rest = (n, halo, relu, batch_stats)
        # the ReLU's sign is recomputed from y, which is read anyway; where that cannot be, z has it
        ctx.save_for_backward(y, z if relu and residual is not None else None, stats, weight, bias)
        return z

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        weight, bias = ctx.saved_tensors[3:]
        gated, terms, dnorm = _ops.tiled_norm_backward(grad, *ctx.saved_tensors, *ctx.rest)
        if not ctx.rest[2]:
            gated = grad
        return (
            gated,
            terms,
            dnorm[0] if weight is not None else None,
            dnorm[1] if bias is not None else None,
            gated if ctx.needs_input_grad[4] else None,
            *(None,) * 4,
        )


def tiled_norm(raw: Raw, n: int, halo: int) -> Tensor:
    """The tiles that a Raw of n samples stands for."""
    if raw.backend == "reference":
        return reference.act(raw.conv, raw.residual, raw.relu)
    return _Norm.apply(raw.conv, raw.stats, raw.weight, raw.bias, raw.residual, raw.relu, raw.batch_stats, n, halo)


def tiled_norm_conv2d(
    x: Tensor | Raw,
    n: int,
    halo: int,
    values: Tensor,
    pattern: Pattern,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    *,
    norm: nn.BatchNorm2d,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    keep: bool = False,
    backend: str | None = None,
) -> tuple[Raw, Tensor | None]:
    """``tiled_conv2d`` with a norm, its result as a Raw; and the tiles that it read.

    x         tiles, or the Raw of the layer before
    keep      whether others read a Raw x too. They get it as the second output, which is None otherwise
    backend   as in ``tiled_conv2d``; a Raw x is read on the backend that made it

    Everything else, the second output of tiles included, is as in ``tiled_conv2d``.
    """
    if isinstance(x, Raw):
        raw, backend = x, x.backend
    else:
        backend = _backend("tiled_norm_conv2d", backend, x)
        raw = Raw(x, None, None, None, False, None, False, backend)
    out = _check_input(raw.conv, n, halo, pattern, stride, padding, dilation, residual)
    if backend == "reference":
        read = tiled_norm(raw, n, halo) if isinstance(x, Raw) else x
        y = reference.conv(read, n, halo, values, pattern, stride, padding, dilation, bias, norm)
        kept = keep or raw.residual is not None or not isinstance(x, Raw)
        return Raw(y, None, None, None, False, residual, relu, backend), read if kept else None
    _check_range(raw.conv, out, pattern, dilation)
    bias = bias if bias is None else bias.float()
    # a sum with a residual is not worth computing twice
    stored = keep or raw.residual is not None
    weight, shift, mean, var = _norm_arguments(norm, bias)
    y, stats, read = _NormConv2d.apply(
        raw.conv.contiguous(), raw.stats, raw.weight, raw.bias, raw.residual, values.float(), mean, var,
        *pattern.tensors,
        raw.relu, stored, raw.batch_stats, n, halo, (pattern.shape[2:], stride, padding, dilation), norm.eps,
    )  # fmt: skip
    if norm.training and norm.running_mean is not None:
        _update_running(norm, stats.detach(), bias, n * out[0] * out[1])
    result = Raw(y, stats, weight, shift, mean is None, None if residual is None else residual.contiguous(), relu)
    return result, read if stored or raw.stats is None else None


def _register() -> None:
    def fake(name):
        return torch.library.register_fake(f"{NAMESPACE}::{name}")

    @fake("tiled_norm_conv2d")
    def _(
        x, stats, weight, bias, residual, relu, keep, values, row_ptr, col, mean, var, n, halo, kernel_size, stride,
        padding, dilation, eps,
    ):  # fmt: skip
        outputs = row_ptr.shape[0] - 1
        return (
            x.new_empty(_output(x, halo, outputs, kernel_size, stride, padding, dilation)[1]),
            x.new_empty((3, outputs)),
            x.new_empty(x.shape if keep and stats is not None else (0,)),
        )

    @fake("tiled_norm_conv2d_backward")
    def _(
        grad, grad_terms, pass_grad, y, y_stats, x, z, stats, weight, bias, relu, batch_stats, values, row_ptr, col,
        t_row_ptr, t_col, t_perm, n, halo, kernel_size, stride, padding, dilation, need_x, need_values,
    ):  # fmt: skip
        return (
            x.new_empty(x.shape if need_x else (0,)),
            x.new_empty((3, x.shape[1])),
            x.new_empty((2, x.shape[1])),
            x.new_empty((values.shape[0] if need_values else 0,)),
        )

    @fake("tiled_norm")
    def _(y, stats, weight, bias, residual, halo, relu):
        return torch.empty_like(y)

    @fake("tiled_norm_backward")
    def _(grad, y, z, stats, weight, bias, n, halo, relu, batch_stats):
        return (y.new_empty(y.shape if relu else (0,)), y.new_empty((3, y.shape[1])), y.new_empty((2, y.shape[1])))


if not CPU_ERROR:
    _register()
