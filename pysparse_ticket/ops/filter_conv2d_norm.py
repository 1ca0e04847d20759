"""Filter convolution with batch norm, residual add and ReLU behind it; kernels in ``kernels/filter_conv2d_norm.py``.

The convolution's epilogue gathers the batch statistics, one pass does the rest; backward takes one pass for the
gradients of weight and bias and one for that of the convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .filter_conv2d import _programs, filter_conv2d, filter_conv2d_reference
from .library import choose_backend, kernel_module, register_triton
from .masked_conv2d import Pair


def filter_conv2d_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor | None,
    out_index: Tensor | None,
    out_channels: int,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    norm: nn.BatchNorm2d,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """The definition, in plain torch; any device, any floating dtype."""
    z = norm(filter_conv2d_reference(x, weight, bias, in_index, out_index, out_channels, stride, padding, dilation))
    z = z if residual is None else z + residual
    return F.relu(z) if relu else z


def filter_conv2d_norm(
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
    norm: nn.BatchNorm2d,
    residual: Tensor | None = None,
    relu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Equal to ``F.relu(norm(filter_conv2d(x, weight, ...)) + residual)``, the ReLU with ``relu``.

    norm      over the output's channels. In training its running statistics move as they would in its own call; a
              removed channel of an output at full width is normalised as the zeros that it holds, to the norm's bias
    residual  of the output's shape, or None

    Everything else as in :func:`filter_conv2d`; ValueError also for a norm or a residual that does not fit, and for
    batch statistics of a single value a channel.
    """
    channels = weight.shape[0] if out_index is None else out_channels
    if norm.num_features != channels:
        raise ValueError(f"the norm has {norm.num_features} channels, the convolution's output {channels}")
    arguments = (x, weight, bias, in_index, out_index, channels, stride, padding, dilation)
    if choose_backend("filter_conv2d_norm", backend, x, {"cuda": "triton"}) == "reference":
        return filter_conv2d_norm_reference(*arguments, norm, residual, relu)
    batch_stats = norm.training or norm.running_mean is None
    if batch_stats:
        y, *stats = filter_conv2d(*arguments, stats=True, backend="triton")
        mean, var = (_spread(t.detach(), out_index, channels) for t in stats)
        _update_running(norm, mean, var, y.numel() // channels)
    else:
        y = filter_conv2d(*arguments, backend="triton")
        mean, var = norm.running_mean.float(), norm.running_var.float()
    if residual is not None:
        if residual.shape != y.shape:
            raise ValueError(f"the residual has shape {tuple(residual.shape)}, the output {tuple(y.shape)}")
        residual = residual.to(torch.promote_types(residual.dtype, y.dtype))
    return torch.ops.pysparse_ticket.filter_conv2d_norm(
        y, mean, var, norm.weight, norm.bias, residual, norm.eps, relu, batch_stats
    )


def _spread(stats: Tensor, out_index: Tensor | None, channels: int) -> Tensor:
    """Over all channels: mean and variance of a removed one are zero."""
    return stats if out_index is None else stats.new_zeros(channels).index_copy(0, out_index, stats)


@torch.no_grad()
def _update_running(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    if count < 2:
        raise ValueError(f"batch statistics of {count} value a channel; use more samples, larger images or eval mode")
    if not norm.training or norm.running_mean is None:
        return
    share = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if share is None:  # the mean of all batches, counted where the device is
            share = norm.num_batches_tracked.to(norm.running_mean.dtype).reciprocal()
    for running, found in ((norm.running_mean, mean), (norm.running_var, var * (count / (count - 1)))):
        running.lerp_(found.to(running.dtype), 0.0 if share is None else share)


def _launch(y, mean, var, weight, bias, residual, eps, relu, batch_stats):
    return kernel_module("filter_conv2d_norm").forward(y, mean, var, weight, bias, residual, eps, relu)


def _launch_backward(grad, y, z, mean, var, weight, bias, eps, relu, batch_stats, need_y, need_sum):
    programs = 4 * _programs(grad.device)  # eight a multiprocessor: these wait for memory alone
    return kernel_module("filter_conv2d_norm").backward(
        grad, y, z, mean, var, weight, bias, eps, relu, batch_stats, need_y, need_sum, programs
    )


def _image(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(like.shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)


def _fake(y, mean, var, weight, bias, residual, eps, relu, batch_stats):
    return _image(y, y.dtype if residual is None else residual.dtype)


def _fake_backward(grad, y, z, mean, var, weight, bias, eps, relu, batch_stats, need_y, need_sum):
    out = _image(y, y.dtype) if need_y else y.new_empty(0)
    return out, _image(y, grad.dtype) if need_sum else grad.new_empty(0), mean.new_empty((2, y.shape[1]))


def _setup(ctx, inputs, output) -> None:
    y, mean, var, weight, bias, residual, *ctx.rest = inputs
    relu = ctx.rest[1]
    # the ReLU's sign is computed again from y, which backward reads anyway; behind a sum z has it
    ctx.save_for_backward(y, output if relu and residual is not None else None, mean, var, weight, bias)


def _backward(ctx, grad):
    y, z, mean, var, weight, bias = ctx.saved_tensors
    need_y, _, _, need_weight, need_bias, need_residual, *_ = ctx.needs_input_grad
    relu = ctx.rest[1]
    grad_y, grad_sum, grad_affine = torch.ops.pysparse_ticket.filter_conv2d_norm_backward(
        grad, y, z, mean, var, weight, bias, *ctx.rest, need_y, need_residual and relu
    )
    return (
        grad_y if need_y else None,
        None,
        None,
        grad_affine[1].to(weight.dtype) if need_weight else None,
        grad_affine[0].to(bias.dtype) if need_bias else None,
        (grad_sum if relu else grad) if need_residual else None,
        *(None,) * 3,
    )


register_triton("filter_conv2d_norm", _launch, _launch_backward, _fake, _fake_backward, _backward, _setup)
