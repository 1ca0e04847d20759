"""Chains of sparse linear layers on tiles of samples: nothing is packed or unpacked between two layers.

``[n, features]`` in tiles is a flat tensor of ``16 * ceil(n / 16) * features`` floats: tile after tile of up to 64
samples, each as ``[features, samples]``, so that one weight multiplies whole vectors of samples
(csrc/cpu/masked_linear.h). The places behind sample n hold finite values that no result depends on.

A chain is ``linear_pack``, then ``tiled_linear`` per layer, then ``linear_unpack``; an elementwise operation may stand
between two of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import CPU_ERROR, NAMESPACE
from .linear_shapes import check_packed
from .masked_linear import Schedules, linear_schedule
from .pattern import Pattern

_ops = torch.ops.pysparse_ticket


def _padded(samples: int) -> int:
    return (samples + 15) // 16 * 16


def _check(tensor: Tensor) -> None:
    if CPU_ERROR:
        raise RuntimeError(f"no cpu backend: {CPU_ERROR}")
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise ValueError(f"tiles of samples are float32 on the CPU, not {tensor.dtype} on {tensor.device}")


def _check_tiles(tiles: Tensor, samples: int, features: int) -> None:
    _check(tiles)
    if tiles.shape != (_padded(samples) * features,):
        raise ValueError(
            f"{samples} samples of {features} features are a tensor of shape ({_padded(samples) * features},) in "
            f"tiles, not {tuple(tiles.shape)}; make it with linear_pack"
        )


def linear_pack(x: Tensor) -> Tensor:
    """``[n, features]`` to tiles; differentiable."""
    _check(x)
    if x.dim() != 2:
        raise ValueError(f"linear_pack takes [n, features], not a tensor of shape {tuple(x.shape)}; flatten it first")
    return _ops.linear_pack(x)


def linear_unpack(tiles: Tensor, samples: int, features: int) -> Tensor:
    """Tiles to ``[samples, features]``; differentiable."""
    _check_tiles(tiles, samples, features)
    return _ops.linear_unpack(tiles.contiguous(), samples, features)


def tiled_linear(
    x: Tensor,
    samples: int,
    values: Tensor,
    bias: Tensor | None,
    pattern: Pattern,
    *,
    relu: bool = False,
    gated: bool = False,
    gate_x: bool = False,
    schedules: Schedules | None = None,
) -> Tensor:
    """``masked_linear`` with x and the result in tiles of ``samples`` samples, then a ReLU where ``relu`` is True.

    x ``[16 * ceil(samples / 16) * in]`` from ``linear_pack`` or another ``tiled_linear``, values ``[nnz]``, bias
    ``[out]`` or None, pattern of shape ``[out, in]``. ``schedules`` is ``linear_schedule(pattern)``, made anew in each
    call that does not give it. ValueError for shapes that do not fit.

    A ReLU's gate on the gradient costs a pass over memory in the layer's own backward pass, but next to nothing in the
    next layer's, whose result is in the cache and whose x is the ReLU's output. So where nothing but that layer reads
    the output, give ``gated=True`` to the layer with the ReLU and ``gate_x=True`` to the next; a dropout may stand
    between them.
    """
    check_packed("tiled_linear", None, values, bias, pattern)
    out_features, in_features = pattern.shape
    _check_tiles(x, samples, in_features)
    if schedules is None:
        schedules = linear_schedule(pattern)
    return _ops.tiled_linear(
        x.contiguous(), values, bias, *schedules, samples, in_features, out_features, relu, gated, gate_x
    )


def _register() -> None:
    fake = torch.library.register_fake

    @fake(f"{NAMESPACE}::linear_pack")
    def _(x):
        return x.new_empty(_padded(x.shape[0]) * x.shape[1])

    @fake(f"{NAMESPACE}::linear_unpack")
    def _(tiles, samples, features):
        return tiles.new_empty(samples, features)

    @fake(f"{NAMESPACE}::tiled_linear")
    def _(x, values, bias, schedule, t_schedule, samples, in_features, out_features, relu, gated, gate_x):
        return x.new_empty(_padded(samples) * out_features)

    @fake(f"{NAMESPACE}::tiled_linear_backward")
    def _(grad, x, values, y, schedule, t_schedule, samples, in_features, out_features, gate_x, *need):
        need_x, need_values, need_bias = need
        return (
            x.new_empty(x.shape if need_x else (0,)),
            x.new_empty(values.shape if need_values else (0,)),
            x.new_empty(out_features if need_bias else 0),
        )

    def keep(ctx, inputs, output):
        x, values, _, schedule, t_schedule, *sizes, relu, gated, gate_x = inputs
        ctx.rest = (*sizes, gate_x)
        ctx.save_for_backward(x, values, output if relu and not gated else None, schedule, t_schedule)

    def backward(ctx, grad):
        need = tuple(ctx.needs_input_grad[:3])
        grads = _ops.tiled_linear_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.rest, *need)
        return *(g if n else None for g, n in zip(grads, need, strict=True)), *(None,) * 8

    torch.library.register_autograd(f"{NAMESPACE}::tiled_linear", backward, setup_context=keep)

    def keep_size(ctx, inputs, output):
        ctx.size = inputs[0].shape

    torch.library.register_autograd(
        f"{NAMESPACE}::linear_pack",
        lambda ctx, grad: _ops.linear_unpack(grad.contiguous(), *ctx.size),
        setup_context=keep_size,
    )
    torch.library.register_autograd(
        f"{NAMESPACE}::linear_unpack",
        lambda ctx, grad: (_ops.linear_pack(grad), None, None),
        setup_context=keep_size,
    )


if not CPU_ERROR:
    _register()
