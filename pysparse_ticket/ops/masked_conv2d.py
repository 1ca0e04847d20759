"""``F.conv2d(x, weight * mask)`` that multiplies the surviving weights alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import CPU_ERROR, NAMESPACE, choose_backend
from .pattern import Pattern

Pair = tuple[int, int]
LAYOUTS = ("tiles", "pixels")


def masked_conv2d_reference(
    x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """The definition, in plain torch; any device, any floating dtype."""
    weight = pattern.scatter(values.to(x.dtype))
    return F.conv2d(x, weight, bias if bias is None else bias.to(x.dtype), stride, padding, dilation)


def output_size(size: Pair, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """Height and width of the output image."""
    h, w = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True)
    )
    return h, w


def default_layout(size: tuple[int, ...], output: Pair) -> str:
    """The layout that ``masked_conv2d`` takes unasked for an input ``[N, C, H, W]`` and an output image of that size.

    Tiles where the batch fills at least seven lanes in eight of its tiles of 16 samples and either output images are
    small (128 pixels), so that packing the batch costs less than the planes of each image, or the convolution is
    strided; pixels elsewhere. docs/performance.md has the figures.
    """
    lanes, pixels = -(-size[0] // 16) * 16, output[0] * output[1]
    tiles = 8 * size[0] >= 7 * lanes and (pixels <= 128 or size[2] * size[3] >= 2 * pixels)
    return "tiles" if tiles else "pixels"


def masked_conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: Pattern,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    *,
    layout: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Equal to ``F.conv2d(x, pattern.scatter(values), bias, stride, padding, dilation)``.

    x        ``[N, C, H, W]`` of any strides; channels_last in gives channels_last out, anything else gives contiguous
    values   ``[nnz]`` surviving weights in the order of ``weight[mask]``
    bias     ``[O]`` or None
    pattern  of a mask ``[O, C, kh, kw]``

    layout   "tiles": 16 samples innermost; "pixels": the pixels of one image; None: :func:`default_layout`. Only speed
             and the order of sums depend on it
    backend  None: the C++ kernel for float32 and bfloat16 on the CPU (which computes bfloat16 in float32 and rounds the
             result once), else the plain-torch reference; ``"cpu"`` or ``"reference"`` to insist

    Raises ValueError on shapes that do not fit.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    if len(pattern.shape) != 4:
        raise ValueError(f"masked_conv2d needs the pattern of a mask [O, C, kh, kw], not of shape {pattern.shape}")
    if x.dim() != 4 or x.shape[1] != pattern.shape[1]:
        raise ValueError(f"masked_conv2d needs an input [N, {pattern.shape[1]}, H, W], not {tuple(x.shape)}")
    if values.shape != (pattern.nnz,):
        raise ValueError(f"the pattern has {pattern.nnz} weights, but values has shape {tuple(values.shape)}")
    if bias is not None and bias.shape != (pattern.shape[0],):
        raise ValueError(f"masked_conv2d needs a bias [{pattern.shape[0]}], not {tuple(bias.shape)}")
    kernel_size = pattern.shape[2:]
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
        raise ValueError(f"stride {stride} and dilation {dilation} must be positive, padding {padding} not negative")
    output = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    if min(output) < 1:
        raise ValueError(
            f"an image of {x.shape[2]}x{x.shape[3]} is smaller than the kernel "
            f"{kernel_size[0]}x{kernel_size[1]}; use more padding or drop the layer"
        )
    if choose_backend("masked_conv2d", backend, x) == "reference":
        return masked_conv2d_reference(x, values, bias, pattern, stride, padding, dilation)
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"the cpu backend takes float32 and bfloat16, not {x.dtype}; use the reference backend")
    pixels = (layout or default_layout(x.shape, output)) == "pixels"
    return torch.ops.pysparse_ticket.masked_conv2d(
        x, values.float(), bias if bias is None else bias.float(), *pattern.tensors,
        kernel_size, stride, padding, dilation, pixels,
    )  # fmt: skip


def is_channels_last(x: Tensor) -> bool:
    """What the kernels take for channels_last: the strides say so and are not those of a contiguous tensor too."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _image(like: Tensor, size: tuple[int, ...], channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _register() -> None:
    @torch.library.register_fake(f"{NAMESPACE}::masked_conv2d")
    def _(x, values, bias, row_ptr, col, t_row_ptr, t_col, t_perm, kernel_size, stride, padding, dilation, pixels):
        out = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
        return _image(x, (x.shape[0], row_ptr.shape[0] - 1, *out), is_channels_last(x))

    @torch.library.register_fake(f"{NAMESPACE}::masked_conv2d_backward")
    def _(
        grad, x, values, row_ptr, col, t_row_ptr, t_col, t_perm, input_size, kernel_size, stride, padding,
        dilation, pixels, channels_last, need_input, need_values,
    ):  # fmt: skip
        grad_input = _image(grad, tuple(input_size), channels_last) if need_input else grad.new_empty((0,))
        return grad_input, values.new_empty((values.shape[0] if need_values else 0,))

    def setup_context(ctx, inputs, output):
        x, values, _bias, *pattern, kernel_size, stride, padding, dilation, pixels = inputs
        ctx.geometry = (kernel_size, stride, padding, dilation, pixels)
        ctx.input_size, ctx.channels_last = x.shape, is_channels_last(x)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values, *pattern)

    def backward(ctx, grad):
        need_input, need_values, need_bias = ctx.needs_input_grad[:3]
        rest = (None,) * 10
        if grad is None:
            return None, None, None, *rest
        x, values, *pattern = ctx.saved_tensors
        grad_input = grad_values = None
        if need_input or need_values:
            grad_input, grad_values = torch.ops.pysparse_ticket.masked_conv2d_backward(
                grad,
                x,
                values,
                *pattern,
                ctx.input_size,
                *ctx.geometry,
                ctx.channels_last,
                need_input,
                need_values,
            )
        grad_bias = grad.sum((0, 2, 3), dtype=torch.float32) if need_bias else None
        return grad_input if need_input else None, grad_values if need_values else None, grad_bias, *rest

    torch.library.register_autograd(f"{NAMESPACE}::masked_conv2d", backward, setup_context=setup_context)


if not CPU_ERROR:
    _register()
