"""Chains of sparse convolutions on batch tiles: convolution, batch norm, residual add and ReLU in one op.

A tiled tensor holds ``[N, C, H, W]`` as ``[ceil(N / 16), C, H + 2 * halo, W + 2 * halo, 16]``: 16 samples innermost,
and zeros around each image so that a padded convolution reads them without a copy. ``halo`` is one number for a whole
chain, at least the largest padding in it. The lanes of the last tile behind sample N hold finite values that
nothing reads.

A chain is ``tile_pack``, then ``tiled_conv2d`` per layer, then ``tiled_mean`` (global average pool) or ``tile_unpack``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import tiled_reference as reference
from .library import CPU_ERROR, NAMESPACE, choose_backend
from .masked_conv2d import Pair, output_size
from .pattern import Pattern
from .tiled_reference import LANES

_ops = torch.ops.pysparse_ticket


def _tiles(n: int) -> int:
    return (n + LANES - 1) // LANES


def _backend(op: str, backend: str | None, x: Tensor) -> str:
    name = choose_backend(op, backend, x)
    if name == "cpu" and (x.dtype != torch.float32 or x.device.type != "cpu"):
        raise ValueError(f"the cpu backend's tiles are float32 on the CPU, not {x.dtype} on {x.device}")
    return name


def tile_pack(x: Tensor, halo: int = 1, *, backend: str | None = None) -> Tensor:
    """``[N, C, H, W]`` of any strides to tiles; half precision becomes float32; differentiable. ``backend`` as in
    :func:`tiled_conv2d`."""
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    return reference.pack(x, halo) if _backend("tile_pack", backend, x) == "reference" else _ops.tile_pack(x, halo)


def tile_unpack(
    tiles: Tensor, n: int, halo: int = 1, channels_last: bool = False, *, backend: str | None = None
) -> Tensor:
    """Tiles of n samples to ``[n, C, H, W]``, contiguous or channels_last; differentiable."""
    if _backend("tile_unpack", backend, tiles) == "reference":
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return reference.unpack(tiles, n, halo).contiguous(memory_format=memory_format)
    return _ops.tile_unpack(tiles.contiguous(), n, halo, channels_last)


def tiled_mean(tiles: Tensor, n: int, halo: int = 1, *, backend: str | None = None) -> Tensor:
    """Global average pool: tiles of n samples to ``[n, C]``; differentiable."""
    if _backend("tiled_mean", backend, tiles) == "reference":
        return reference.unpack(tiles, n, halo).mean((2, 3))
    return _ops.tiled_mean(tiles.contiguous(), n, halo)


class _TiledConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, values, weight, bias, mean, var, residual, row_ptr, col, t_row_ptr, t_col, t_perm, n, halo, geometry,
        norm, eps, relu,
    ):  # fmt: skip
        z, y, stats = _ops.tiled_conv2d(
            x, values, row_ptr, col, weight, bias, mean, var, residual, n, halo, *geometry, norm, eps, relu
        )
        ctx.rest = (n, halo, *geometry, norm, norm and mean is None, relu)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        # the ReLU's sign is recomputed from y, which is read anyway; where that cannot be, z has it
        gate = z if relu and (residual is not None or not norm) else None
        ctx.save_for_backward(x, y, gate, stats, values, row_ptr, col, t_row_ptr, t_col, t_perm, weight, bias)
        return z, x, stats

    @staticmethod
    def backward(ctx, grad, again, _stats):
        if grad is None:
            return again, *(None,) * 17
        need_x, need_values, need_weight, need_bias, _, _, need_residual = ctx.needs_input_grad[:7]
        grad = grad.contiguous()
        if again is not None:
            again = again.contiguous()
        dx, dvalues, dnorm, dres = _ops.tiled_conv2d_backward(
            grad, again, *ctx.saved_tensors, *ctx.rest, need_x, need_values, need_weight or need_bias, need_residual
        )
        return (
            dx if need_x else None,
            dvalues if need_values else None,
            dnorm[0] if need_weight else None,
            dnorm[1] if need_bias else None,
            None,
            None,
            dres if need_residual else None,
            *(None,) * 11,
        )


def tiled_conv2d(
    x: Tensor,
    n: int,
    halo: int,
    values: Tensor,
    pattern: Pattern,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    *,
    bias: Tensor | None = None,
    norm: nn.BatchNorm2d | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``act(norm(conv(x)) + residual)`` on tiles of n samples, and x again.

    x         tiles ``[T, C, H + 2 * halo, W + 2 * halo, 16]``
    values, pattern, bias, stride, padding, dilation   as in ``masked_conv2d``
    norm      a BatchNorm2d; in training its running statistics are updated as its own forward would
    residual  tiles of the output's shape
    relu      ends with a ReLU
    backend   None: the C++ kernel for float32 on the CPU, else the plain-torch reference; ``"cpu"`` or ``"reference"``
              to insist

    The second output is x itself. Whoever else reads x (the residual of the block, a second branch) should read this
    one: its gradient is then added inside the input gradient's kernel instead of in a pass over memory of its own.
    Raises ValueError on shapes that do not fit, on a halo that is too small and on images too large for the kernel.
    """
    out = _check_input(x, n, halo, pattern, stride, padding, dilation, residual)
    if _backend("tiled_conv2d", backend, x) == "reference":
        y = reference.conv(x, n, halo, values, pattern, stride, padding, dilation, bias, norm)
        return reference.act(y, residual, relu), x
    _check_range(x, out, pattern, dilation)
    if residual is not None:
        residual = residual.contiguous()
    x = x.contiguous()

    def run(weight, shift, mean, var, eps):
        return _TiledConv2d.apply(
            x, values.float(), weight, shift, mean, var, residual, *pattern.tensors, n, halo,
            (pattern.shape[2:], stride, padding, dilation), norm is not None, eps, relu,
        )  # fmt: skip

    bias = bias if bias is None else bias.float()
    if norm is None:
        z, again, _ = run(None, bias, None, None, 0.0)
        return z, again
    weight, shift, mean, var = _norm_arguments(norm, bias)
    z, again, stats = run(weight, shift, mean, var, norm.eps)
    if norm.training and norm.running_mean is not None:
        _update_running(norm, stats, bias, n * out[0] * out[1])
    return z, again


def _check_input(
    x: Tensor, n: int, halo: int, pattern: Pattern, stride: Pair, padding: Pair, dilation: Pair, residual: Tensor | None
) -> Pair:
    """Size of the output's images."""
    outputs, channels = pattern.shape[:2]
    if x.dim() != 5 or x.shape[0] != _tiles(n) or x.shape[1] != channels or x.shape[4] != LANES:
        raise ValueError(f"tiled_conv2d needs tiles [{_tiles(n)}, {channels}, Hp, Wp, 16], not {tuple(x.shape)}")
    out, shape = _output(x, halo, outputs, pattern.shape[2:], stride, padding, dilation)
    if max(padding) > halo:
        raise ValueError(f"a padding of {padding} needs a halo of {max(padding)}, not {halo}")
    if min(out) < 1:
        size = f"{x.shape[2] - 2 * halo}x{x.shape[3] - 2 * halo}"
        raise ValueError(f"an image of {size} is smaller than the kernel; use more padding")
    if residual is not None and residual.shape != shape:
        raise ValueError(f"the residual has shape {tuple(residual.shape)}, the output {shape}")
    return out


def _output(
    x: Tensor, halo: int, outputs: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[Pair, tuple[int, ...]]:
    """Size of the output's images, and shape of their tiles."""
    size = (x.shape[2] - 2 * halo, x.shape[3] - 2 * halo)
    oh, ow = output_size(size, kernel, stride, padding, dilation)
    return (oh, ow), (x.shape[0], outputs, oh + 2 * halo, ow + 2 * halo, LANES)


def _check_range(x: Tensor, out: Pair, pattern: Pattern, dilation: Pair) -> None:
    """The kernels' offsets within a tile are int32, in floats."""
    outputs, channels, *kernel = pattern.shape
    halo = [2 * d * k for d, k in zip(dilation, kernel, strict=True)]
    largest = LANES * max(
        channels * x.shape[2] * x.shape[3],
        outputs * max(out[0] + halo[0], x.shape[2]) * max(out[1] + halo[1], x.shape[3]),
    )
    if largest >= 2**31:
        raise ValueError(
            f"16 images of {max(channels, outputs)} channels and {x.shape[2]}x{x.shape[3]} pixels are too large for "
            "the tiled kernel's 32-bit offsets; run this layer outside the chain of tiles"
        )


def _norm_arguments(
    norm: nn.BatchNorm2d, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Weight, shift, mean and variance of a norm behind a convolution's bias; no mean: the batch's own."""
    if norm.training or norm.running_mean is None:
        # a constant before batch statistics changes nothing but the running mean: its gradient is zero, not absent
        shift = norm.bias
        if bias is not None and bias.requires_grad:
            shift = bias * 0.0 if shift is None else torch.add(shift, bias, alpha=0.0)
        return norm.weight, shift, None, None
    if bias is None:
        return norm.weight, norm.bias, norm.running_mean, norm.running_var
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = bias * scale if norm.bias is None else torch.addcmul(norm.bias, bias, scale)
    return norm.weight, shift, norm.running_mean, norm.running_var


@torch.no_grad()
def _update_running(norm: nn.BatchNorm2d, stats: Tensor, bias: Tensor | None, count: int) -> None:
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    mean = stats[0] if bias is None else stats[0] + bias
    norm.running_mean.lerp_(mean, momentum)
    # the running variance is the unbiased one
    norm.running_var.mul_(1 - momentum).add_(stats[2], alpha=momentum * count / max(count - 1, 1))


def _register() -> None:
    def fake(name):
        return torch.library.register_fake(f"{NAMESPACE}::{name}")

    @fake("tile_pack")
    def _(x, halo):
        n, c, h, w = x.shape
        return x.new_empty((_tiles(n), c, h + 2 * halo, w + 2 * halo, LANES))

    @fake("tile_unpack")
    def _(tiles, n, halo, channels_last):
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        size = (n, tiles.shape[1], tiles.shape[2] - 2 * halo, tiles.shape[3] - 2 * halo)
        return torch.empty(size, dtype=tiles.dtype, device=tiles.device, memory_format=memory_format)

    @fake("tiled_mean")
    def _(tiles, n, halo):
        return tiles.new_empty((n, tiles.shape[1]))

    @fake("tiled_mean_backward")
    def _(grad, h, w, halo):
        n, c = grad.shape
        return grad.new_empty((_tiles(n), c, h + 2 * halo, w + 2 * halo, LANES))

    @fake("tiled_conv2d")
    def _(
        x, values, row_ptr, col, weight, bias, mean, var, residual, n, halo, kernel_size, stride, padding, dilation,
        norm, eps, relu,
    ):  # fmt: skip
        outputs = row_ptr.shape[0] - 1
        out, shape = _output(x, halo, outputs, kernel_size, stride, padding, dilation)
        return (
            x.new_empty(shape),
            x.new_empty((x.shape[0] if norm else 0, outputs, *out, LANES)),
            x.new_empty((3, outputs)),
        )

    @fake("tiled_conv2d_backward")
    def _(
        grad, pass_grad, x, y, z, stats, values, row_ptr, col, t_row_ptr, t_col, t_perm, weight, bias, n, halo,
        kernel_size, stride, padding, dilation, norm, batch_stats, relu, need_x, need_values, need_norm, need_residual,
    ):  # fmt: skip
        return (
            x.new_empty(x.shape if need_x else (0,)),
            x.new_empty((values.shape[0] if need_values else 0,)),
            x.new_empty((2, row_ptr.shape[0] - 1)),
            x.new_empty(grad.shape if need_residual else (0,)),
        )

    def autograd(name, setup, backward):
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup)

    def keep_halo(ctx, inputs, output):
        ctx.halo = inputs[1] if len(inputs) == 2 else inputs[2]
        ctx.size = inputs[0].shape
        ctx.channels_last = inputs[0].dim() == 4 and not inputs[0].is_contiguous()

    autograd(
        "tile_pack",
        keep_halo,
        lambda ctx, grad: (_ops.tile_unpack(grad.contiguous(), ctx.size[0], ctx.halo, ctx.channels_last), None),
    )
    autograd("tile_unpack", keep_halo, lambda ctx, grad: (_ops.tile_pack(grad, ctx.halo), None, None, None))

    def mean_backward(ctx, grad):
        h, w = (size - 2 * ctx.halo for size in ctx.size[2:4])
        return _ops.tiled_mean_backward(grad, h, w, ctx.halo), None, None

    autograd("tiled_mean", keep_halo, mean_backward)


if not CPU_ERROR:
    _register()
