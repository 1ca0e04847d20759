"""Convolution over kept filters and kept input channels of whole images; kernels in ``kernels/filter_conv2d.py``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import choose_backend, kernel_module, register_triton
from .masked_conv2d import Pair, output_size


def filter_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor | None,
    out_index: Tensor | None,
    out_channels: int,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """The definition, in plain torch; any device, any floating dtype."""
    x = x if in_index is None else x.index_select(1, in_index)
    y = F.conv2d(x, weight, bias, stride, padding, dilation)
    if out_index is None:
        return y
    return y.new_zeros((y.shape[0], out_channels, *y.shape[2:])).index_copy(1, out_index, y)


def filter_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    in_index: Tensor | None = None,
    out_index: Tensor | None = None,
    out_channels: int | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    *,
    stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Equal to ``F.conv2d(x, w, b, stride, padding, dilation)`` with w and b zero wherever nothing is kept.

    x          ``[N, C, H, W]``; the kernels read channels_last and write it
    weight     ``[kept filters, kept channels, kh, kw]``, bias ``[kept filters]`` or None
    in_index   int64, ascending: which channels of x the weight's are; None where x has those alone
    out_index  int64, ascending: which of ``out_channels`` outputs the filters are, the others being exactly zero; None
               where the output has the kept ones alone
    stats      also return mean and biased variance, float32 ``[kept filters]``, of the output's kept channels, summed
               where they are computed, as a batch norm behind it needs them; differentiable
    backend    None: Triton for CUDA tensors of float32, bfloat16 and float16, else the plain-torch reference

    Raises ValueError on shapes that do not fit.
    """
    if weight.dim() != 4 or x.dim() != 4:
        raise ValueError(f"filter_conv2d takes images and a 4-D weight, not {tuple(x.shape)} and {tuple(weight.shape)}")
    outputs, inputs, *kernel_size = weight.shape
    if in_index is None and x.shape[1] != inputs:
        raise ValueError(f"x has {x.shape[1]} channels and the weight {inputs}; say which by in_index")
    if (in_index is not None and in_index.shape != (inputs,)) or (
        out_index is not None and out_index.shape != (outputs,)
    ):
        raise ValueError(f"in_index and out_index name the weight's {inputs} channels and {outputs} filters one by one")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"filter_conv2d needs a bias [{outputs}], not {tuple(bias.shape)}")
    if out_index is not None and out_channels is None:
        raise ValueError("out_index needs out_channels, how many channels the output has")
    output = output_size(x.shape[2:], tuple(kernel_size), stride, padding, dilation)
    if min(output) < 1:
        raise ValueError(f"an image of {x.shape[2]}x{x.shape[3]} is smaller than the kernel; use more padding")
    out_channels = outputs if out_index is None else out_channels
    geometry = (list(stride), list(padding), list(dilation))
    if choose_backend("filter_conv2d", backend, x, {"cuda": "triton"}) == "triton":
        x, weight, bias = _autocast(x, weight, bias)
        y, found = torch.ops.pysparse_ticket.filter_conv2d(
            x, weight, bias, in_index, out_index, out_channels, *geometry, stats
        )
        return (y, *found.unbind()) if stats else y
    y = filter_conv2d_reference(x, weight, bias, in_index, out_index, out_channels, stride, padding, dilation)
    if not stats:
        return y
    kept = y if out_index is None else y.index_select(1, out_index)
    kept = kept.to(torch.promote_types(kept.dtype, torch.float32))
    var, mean = torch.var_mean(kept, (0, 2, 3), correction=0)
    return y, mean, var


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _programs(device: torch.device) -> int:
    """Twice the multiprocessors: what the weight gradient is split into."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _launch(x, weight, bias, in_index, out_index, out_channels, stride, padding, dilation, stats):
    output = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    geometry = (tuple(stride), tuple(padding), tuple(dilation))
    return kernel_module("filter_conv2d").forward(
        x, weight, bias, in_index, out_index, out_channels, output, *geometry, stats
    )


def _launch_backward(
    grad, x, weight, in_index, out_index, stride, padding, dilation, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    kernels, geometry = kernel_module("filter_conv2d"), (tuple(stride), tuple(padding), tuple(dilation))
    grad_x = grad_weight = grad.new_empty(0)
    if need_x:
        grad_x = kernels.input_gradient(grad, weight, in_index, out_index, x.shape, *geometry)
    if need_weight:
        programs = _programs(grad.device)
        grad_weight = kernels.weight_gradient(grad, x, in_index, out_index, weight.shape, *geometry, programs)
    return grad_x, grad_weight


def _image(like: Tensor, size: tuple[int, ...]) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _fake(x, weight, bias, in_index, out_index, out_channels, stride, padding, dilation, stats):
    size = (x.shape[0], out_channels, *output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation))
    found = (2, weight.shape[0]) if stats else (0,)
    return _image(x, size), x.new_empty(found, dtype=torch.float32)


def _fake_backward(grad, x, weight, in_index, out_index, stride, padding, dilation, need_x, need_weight):
    outputs, inputs, kh, kw = weight.shape
    grad_weight = weight.new_empty((outputs, kh, kw, inputs)).permute(0, 3, 1, 2) if need_weight else grad.new_empty(0)
    return _image(grad, tuple(x.shape)) if need_x else grad.new_empty(0), grad_weight


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, in_index, out_index, _, *geometry, stats = inputs
    y, found = output
    ctx.set_materialize_grads(False)
    ctx.geometry, ctx.has_bias = geometry, bias is not None
    if not stats:
        ctx.mark_non_differentiable(found)
    ctx.save_for_backward(x, weight, in_index, out_index, *((y, found) if stats else ()))


def _backward(ctx, grad, grad_stats):
    x, weight, in_index, out_index, *saved = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    if saved and grad_stats is not None:
        grad = _with_stats(grad, grad_stats, *saved, out_index)
    if grad is None:
        return (None,) * 10
    grad_x = grad_weight = grad_bias = None
    if need_x or need_weight:
        grad_x, grad_weight = torch.ops.pysparse_ticket.filter_conv2d_backward(
            grad, x, weight, in_index, out_index, *ctx.geometry, need_x, need_weight
        )
    if need_bias and ctx.has_bias:
        kept = grad if out_index is None else grad.index_select(1, out_index)
        grad_bias = kept.sum((0, 2, 3))
    return grad_x if need_x else None, grad_weight if need_weight else None, grad_bias, *(None,) * 7


def _with_stats(grad: Tensor | None, grad_stats: Tensor, y: Tensor, stats: Tensor, out_index: Tensor | None) -> Tensor:
    """Through mean and variance: d mean / dy = 1 / count, d var / dy = 2 (y - mean) / count."""
    kept = y if out_index is None else y.index_select(1, out_index)
    count = kept.numel() // kept.shape[1]
    by_mean, by_var = ((row / count)[:, None, None] for row in grad_stats)
    more = (by_mean + 2 * by_var * (kept.float() - stats[0][:, None, None])).to(y.dtype)
    if out_index is not None:
        more = torch.zeros_like(y).index_copy(1, out_index, more)
    return more if grad is None else grad + more


register_triton("filter_conv2d", _launch, _launch_backward, _fake, _fake_backward, _backward, _setup)
