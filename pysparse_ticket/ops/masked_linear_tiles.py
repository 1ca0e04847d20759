"""``F.linear(x, weight * mask, bias)`` over the tiles of a mask; GPU kernels in ``kernels/masked_linear.py``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import choose_backend, kernel_module, register_triton
from .linear_shapes import check_features
from .tile_mask import TileMask

ACTIVATIONS = (None, "relu", "gelu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def masked_linear_tiles(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    tiles: TileMask,
    activation: str | None = None,
    backend: str | None = None,
    clean: bool = False,
) -> Tensor:
    """``F.linear(x, weight * mask, bias)`` and the activation, where ``weight`` is ``tiles.scatter(values)``.

    x ``[..., in]``, values ``[tiles, bn, bk]`` (see ``TileMask``), bias ``[out]`` or None, activation None, ``"relu"``
    or ``"gelu"`` (exact); returns ``[..., out]`` of x's dtype. What values holds under the mask does not matter, and
    its gradient is zero there. ``clean=True`` promises that it holds zeros, which saves a pass over the values where
    they are of x's dtype already. An x that is not finite meets the skipped tiles nowhere: no NaN comes of them.

    The ``triton`` backend takes bfloat16, float16 and float32 x and sums in float32; float32 products are TF32 where
    ``torch.backends.cuda.matmul`` allows it. Under autocast x is cast, values stay as they are. Any other dtype, and a
    CPU tensor unless asked otherwise, runs on ``reference``. ValueError for shapes that do not fit.
    """
    check_features(x, bias, tiles.shape, "mask")
    if values.shape != (tiles.tiles, *tiles.tile):
        raise ValueError(f"values of shape {tuple(values.shape)} are not the mask's {(tiles.tiles, *tiles.tile)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: None, 'relu', 'gelu'")
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype in DTYPES:
        x = x.to(torch.get_autocast_dtype(device))
    if choose_backend("masked_linear_tiles", backend, x, {"cuda": "triton"}) == "reference":
        return _reference(x, values, bias, tiles, activation)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, values, bias))
    y, _, _ = torch.ops.pysparse_ticket.masked_linear_tiles(
        x, values, bias, list(tiles.tensors), tiles.shape, tiles.tile, activation or "", clean, keep
    )
    return y


def _reference(x: Tensor, values: Tensor, bias: Tensor | None, tiles: TileMask, activation: str | None) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, values.dtype)
        weight = tiles.scatter((values * tiles.survivors()).to(dtype))
        y = F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype))
        return (y.relu() if activation == "relu" else F.gelu(y) if activation == "gelu" else y).to(x.dtype)


def _precision() -> str:
    try:
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    except RuntimeError:  # set through the newer fp32_precision alone
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _flat(t: Tensor) -> Tensor:
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()


def _run(x, values, bias, tensors, shape, tile, activation, clean, keep):
    launch = kernel_module("tile_launch")
    tiles = TileMask(tuple(shape), tuple(tile), *tensors)
    keep_z = keep and activation == "gelu"
    with torch.cuda.device_of(x):
        w = values.contiguous() if clean and values.dtype == x.dtype else launch.masked_values(values, tiles, x.dtype)
        y, z = launch.forward(_flat(x), w, bias, tiles, activation or None, keep_z, _precision())
    kept = keep and not (clean and values.dtype == x.dtype)
    return y.view(*x.shape[:-1], shape[0]), z, w if kept else w.new_empty(0)


def _run_backward(grad, x, values, out, tensors, shape, tile, activation, dtype, need_x, need_values, need_bias):
    launch = kernel_module("tile_launch")
    tiles = TileMask(tuple(shape), tuple(tile), *tensors)
    dy = _flat(grad)
    if activation:
        through = torch.ops.aten.threshold_backward if activation == "relu" else torch.ops.aten.gelu_backward
        dy = through(dy, _flat(out), *([0] if activation == "relu" else []))
    grad_x, grad_values, grad_bias = (x.new_empty(0, dtype=t) for t in (x.dtype, dtype, torch.float32))
    with torch.cuda.device_of(x):
        if need_x:
            grad_x = launch.input_grad(dy, values.contiguous(), tiles, _precision()).view(x.shape)
        if need_values:
            grad_values, grad_bias = launch.weight_grad(_flat(x), dy, tiles, dtype, need_bias, _precision())
    if need_bias and not need_values:
        grad_bias = dy.sum(0, dtype=torch.float32)
    return grad_x, grad_values, grad_bias


def _setup(ctx, inputs, output) -> None:
    x, values, bias, tensors, shape, tile, activation, _, _ = inputs
    y, z, w = output
    ctx.mark_non_differentiable(z, w)
    ctx.set_materialize_grads(False)
    ctx.facts = shape, tile, activation, values.dtype, bias if bias is None else bias.dtype
    out = {"": None, "relu": y, "gelu": z}[activation]
    ctx.save_for_backward(x, w if w.numel() or not values.numel() else values, out, *tensors)


def _backward(ctx, grad, _grad_z, _grad_w) -> tuple:
    x, values, out, *tensors = ctx.saved_tensors
    shape, tile, activation, dtype, bias_dtype = ctx.facts
    need_x, need_values, need_bias = ctx.needs_input_grad[:3]
    need_bias = need_bias and bias_dtype is not None
    grads = torch.ops.pysparse_ticket.masked_linear_tiles_backward(
        grad, x, values, out, tensors, shape, tile, activation, dtype, need_x, need_values, need_bias
    )
    kept = [g if need else None for g, need in zip(grads, (need_x, need_values, need_bias), strict=True)]
    if need_bias:
        kept[2] = kept[2].to(bias_dtype)
    return *kept, [None] * len(tensors), *(None,) * 5


def _fake(x, values, bias, tensors, shape, tile, activation, clean, keep):
    y = x.new_empty(*x.shape[:-1], shape[0])
    tokens = y.numel() // shape[0]
    z = x.new_empty((tokens, shape[0]) if keep and activation == "gelu" else (0,))
    kept = keep and not (clean and values.dtype == x.dtype)
    return y, z, x.new_empty(values.shape if kept else (0,))


def _fake_backward(grad, x, values, out, tensors, shape, tile, activation, dtype, need_x, need_values, need_bias):
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty((values.shape[0], *tile) if need_values else (0,), dtype=dtype),
        x.new_empty(shape[0] if need_bias else 0, dtype=torch.float32),
    )


register_triton("masked_linear_tiles", _run, _run_backward, _fake, _fake_backward, _backward, _setup)
