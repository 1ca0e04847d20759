"""``F.conv2d(x, weight * mask, bias)`` over the tiles of a mask; GPU kernels in ``kernels/masked_conv2d_tiles.py``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv_tiles import ConvTiles
from .library import choose_backend, kernel_module, register_triton
from .masked_conv2d import output_size
from .masked_linear_tiles import DTYPES


def masked_conv2d_tiles(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    tiles: ConvTiles,
    backend: str | None = None,
    clean: bool = False,
) -> Tensor:
    """``F.conv2d(x, weight * mask, bias, stride, padding, dilation)``, where ``weight`` is ``tiles.scatter(values)``
    and the tiles were cut for the other three.

    x ``[N, C, H, W]``, values ``[tiles, bn, bk]`` (see ``ConvTiles``), bias ``[O]`` or None; returns ``[N, O, ., .]``
    of x's dtype. The kernels read and write channels_last. What values holds under the mask does not matter, and its
    gradient is zero there. ``clean=True`` promises that it holds zeros, which saves a pass over the values where they
    are of x's dtype already. An x that is not finite meets the skipped tiles nowhere: no NaN comes of them.

    The ``triton`` backend takes bfloat16, float16 and float32 x and sums in float32; float32 products are TF32 where
    ``torch.backends.cudnn`` allows it. Under autocast x is cast, values stay as they are. Any other dtype, and a CPU
    tensor unless asked otherwise, runs on ``reference``. ValueError for shapes that do not fit.
    """
    outputs, channels, *kernel_size = tiles.shape
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"x of shape {tuple(x.shape)} is not images of the mask's {channels} channels")
    if values.shape != (tiles.tiles, *tiles.tile):
        raise ValueError(f"values of shape {tuple(values.shape)} are not the mask's {(tiles.tiles, *tiles.tile)}")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias of shape {tuple(bias.shape)} does not match the mask's {outputs} output channels")
    geometry = tiles.stride, tiles.padding, tiles.dilation
    if min(output_size(x.shape[2:], kernel_size, *geometry)) < 1:
        raise ValueError(f"an image of {x.shape[2]}x{x.shape[3]} is smaller than the kernel; use more padding")
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype in DTYPES:
        x = x.to(torch.get_autocast_dtype(device))
    if choose_backend("masked_conv2d_tiles", backend, x, {"cuda": "triton"}) == "reference":
        return _reference(x, values, bias, tiles)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, values, bias))
    y, _ = torch.ops.pysparse_ticket.masked_conv2d_tiles(
        x, values, bias, list(tiles.tensors), tiles.shape, tiles.tile, *geometry, clean, keep
    )
    return y


def _reference(x: Tensor, values: Tensor, bias: Tensor | None, tiles: ConvTiles) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, values.dtype)
        weight = tiles.scatter((values * tiles.survivors()).to(dtype))
        bias = None if bias is None else bias.to(dtype)
        return F.conv2d(x.to(dtype), weight, bias, tiles.stride, tiles.padding, tiles.dilation).to(x.dtype)


def _run(x, values, bias, tensors, shape, tile, stride, padding, dilation, clean, keep):
    tiles = ConvTiles.of_tensors(tensors, shape, tile, stride, padding, dilation)
    own = clean and values.dtype == x.dtype
    with torch.cuda.device_of(x):
        w = values.contiguous() if own else kernel_module("tile_launch").masked_values(values, tiles.matrix, x.dtype)
        y = kernel_module("masked_conv2d_tiles").forward(x, w, bias, tiles)
    return y, w if keep and not own else w.new_empty(0)


def _run_backward(grad, x, values, tensors, shape, tile, stride, padding, dilation, dtype, need_x, need_values):
    kernels = kernel_module("masked_conv2d_tiles")
    tiles = ConvTiles.of_tensors(tensors, shape, tile, stride, padding, dilation)
    grad_x, grad_values = x.new_empty(0), x.new_empty(0, dtype=dtype)
    with torch.cuda.device_of(x):
        if need_x:
            grad_x = kernels.input_grad(grad, values.contiguous(), tiles, tuple(x.shape))
        if need_values:
            grad_values = kernels.weight_grad(x, grad, tiles, dtype)
    return grad_x, grad_values


def _setup(ctx, inputs, output) -> None:
    x, values, bias, tensors, *facts, _, _ = inputs
    _, w = output
    ctx.mark_non_differentiable(w)
    ctx.set_materialize_grads(False)
    ctx.facts = facts, values.dtype, bias if bias is None else bias.dtype
    ctx.save_for_backward(x, w if w.numel() or not values.numel() else values, *tensors)


def _backward(ctx, grad, _grad_w) -> tuple:
    x, values, *tensors = ctx.saved_tensors
    facts, dtype, bias_dtype = ctx.facts
    need_x, need_values, need_bias = ctx.needs_input_grad[:3]
    grad_x = grad_values = grad_bias = None
    if grad is not None and (need_x or need_values):
        grad_x, grad_values = torch.ops.pysparse_ticket.masked_conv2d_tiles_backward(
            grad, x, values, tensors, *facts, dtype, need_x, need_values
        )
    if grad is not None and need_bias and bias_dtype is not None:
        grad_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(bias_dtype)
    grads = grad_x if need_x else None, grad_values if need_values else None, grad_bias
    return *grads, [None] * len(tensors), *(None,) * 7


def _image(like: Tensor, size: tuple[int, ...]) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _fake(x, values, bias, tensors, shape, tile, stride, padding, dilation, clean, keep):
    y = _image(x, (x.shape[0], shape[0], *output_size(x.shape[2:], shape[2:], stride, padding, dilation)))
    kept = keep and not (clean and values.dtype == x.dtype)
    return y, x.new_empty(values.shape if kept else (0,))


def _fake_backward(grad, x, values, tensors, shape, tile, stride, padding, dilation, dtype, need_x, need_values):
    grad_x = _image(x, tuple(x.shape)) if need_x else x.new_empty(0)
    return grad_x, x.new_empty((values.shape[0], *tile) if need_values else (0,), dtype=dtype)


register_triton("masked_conv2d_tiles", _run, _run_backward, _fake, _fake_backward, _backward, _setup)
