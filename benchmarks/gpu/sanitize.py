"""Every format of every module at small odd shapes, forward and backward, compared with the dense module in fp64.

    python -m gpu.sanitize [--device cuda]        what compute-sanitizer watches

Small, so that the tool's slowness leaves it a few seconds; odd, so that every edge of a tile is cut.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator

import torch
from bf16 import avoid_broken_amx
from torch import Tensor, nn

from gpu.checks import LIMITS, relative_error
from gpu.tickets import block_mask
from pysparse_ticket.granularity import expand_blocks
from pysparse_ticket.nn import FilterSparseConv2d, MaskedConv2d, MaskedLinear
from pysparse_ticket.ops.filter_conv2d_norm import filter_conv2d_norm
from pysparse_ticket.ops.masked_linear import linear_schedule
from pysparse_ticket.same_function import strict_float32

LINEAR = ((37, 70, 53), (130, 200, 136))  # samples, input and output features
CONV = ((3, 20, 9, 24, 1), (2, 17, 10, 19, 2))  # images, input channels, side, filters, stride


def masks(rows: int, columns: int) -> dict[str, Tensor]:
    """Unstructured and block masks, with dead rows and columns."""
    generator = torch.Generator().manual_seed(0)
    found = {"unstructured": torch.rand(rows, columns, generator=generator) < 0.1}
    for side in (32, 64):
        grid = (-(-rows // side), -(-columns // side))
        kept = torch.rand(grid, generator=generator) < 0.6
        kept.view(-1)[0] = True
        found[f"blocks of {side}"] = expand_blocks(kept, (rows, columns), side, side)
    found["unstructured"][rows // 2] = False
    found["unstructured"][:, columns // 3] = False
    return found


def modules(device: str) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(name, module, input), each in each of its formats."""
    for samples, inputs, outputs in LINEAR:
        for name, mask in masks(outputs, inputs).items():
            for fmt in MaskedLinear.FORMATS:
                layer = nn.Linear(inputs, outputs).to(device)
                masked = MaskedLinear.from_dense(layer, mask.to(device))
                yield from _in_format(masked, fmt, f"{samples}x{inputs}x{outputs}, {name}", (samples, inputs), device)
            for tiles in (1, 2):
                windows = MaskedLinear.from_dense(nn.Linear(inputs, outputs).to(device), mask.to(device))
                windows.schedule, windows.t_schedule = linear_schedule(windows.pattern, tiles)
                shape = f"{samples}x{inputs}x{outputs}, {name}, windows of {tiles} tiles"
                yield from _in_format(windows, "packed", shape, (samples, inputs), device)
    for images, channels, side, filters, stride in CONV:
        shape, size = f"{images}x{channels}x{side}x{side} to {filters}", (images, channels, side, side)
        conv = nn.Conv2d(channels, filters, 3, stride, 1).to(device)
        found = {"": torch.rand(conv.weight.shape) < 0.2, ", blocks": block_mask(tuple(conv.weight.shape), 16, 0.5)}
        for name, mask in found.items():
            for fmt in MaskedConv2d.FORMATS:
                masked = MaskedConv2d.from_dense(conv, mask.to(device))
                yield from _in_format(masked, fmt, shape + name, size, device)
        keep_out, keep_in = torch.arange(filters) % 3 != 1, torch.arange(channels) % 2 == 0
        for fmt in getattr(FilterSparseConv2d, "FORMATS", (None,)):
            sparse = FilterSparseConv2d.from_dense(conv, keep_out.to(device), keep_in.to(device))
            yield from _in_format(sparse, fmt, f"{shape}, filters", size, device)


def _in_format(module: nn.Module, fmt: str | None, shape: str, size: tuple[int, ...], device: str):
    if fmt is not None:
        try:
            module.set_format(fmt)
        except (ValueError, RuntimeError) as reason:  # a format that this device or this mask has not
            print(f"not there: {type(module).__name__} {shape} in {fmt}: {reason}")
            return
    x = torch.randn(size, device=device)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    yield f"{type(module).__name__} {shape} in {fmt or 'its format'}", module, x


def check(name: str, module: nn.Module, x: Tensor, dtype: torch.dtype) -> float:
    """The largest relative error of the output and all gradients; SystemExit when it is over what the dtype allows."""
    dense = module.to_dense().double()
    leaf, own = x.double().requires_grad_(), x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    expected = dense(leaf)
    grad = torch.randn(expected.shape, device=x.device)
    with torch.autocast(x.device.type, dtype, enabled=dtype is not torch.float32):
        y = module(own)
    y.backward(grad.to(y.dtype))
    expected.backward(grad.double())
    weight = dense.weight.grad
    if hasattr(module, "weight_parameter"):
        pairs = [(module.dense_like(module.weight_parameter.grad), weight * module.mask)]
    else:
        pairs = [(module.expand_like("weight", module.weight.grad), weight * module.mask)]
    pairs += [(y, expected), (own.grad, leaf.grad)]
    worst = max(relative_error(a, b) for a, b in pairs)
    if not worst < LIMITS[dtype]:
        raise SystemExit(f"{name}, {dtype}: wrong by {worst:.1e}")
    return worst


def check_fused_norm(size: tuple[int, ...], filters: int, stride: int, dtype: torch.dtype, device: str) -> float:
    """The same of a filter convolution with batch norm, add and ReLU behind it in one op, in training."""
    images, channels, side = size
    keep = torch.arange(filters, device=device) % 3 != 1, torch.arange(channels, device=device) % 2 == 0
    conv = FilterSparseConv2d.from_dense(nn.Conv2d(channels, filters, 3, stride, 1, bias=False).to(device), *keep)
    conv.set_format("fused")
    norm = nn.BatchNorm2d(filters, device=device)
    exact, wide = copy.deepcopy(conv).double(), copy.deepcopy(norm).double()
    exact.set_format("compact")
    x = torch.randn(images, channels, side, side, device=device, requires_grad=True)
    leaf = x.detach().double().requires_grad_()
    sums = wide(exact(leaf))
    residual = torch.randn(sums.shape, device=device).to(dtype).requires_grad_()
    more = residual.detach().double().requires_grad_()
    sums = sums + more
    with torch.autocast(x.device.type, dtype, enabled=dtype is not torch.float32):
        y = filter_conv2d_norm(x, *conv.operands(), norm=norm, residual=residual, relu=True)
    # near zero a rounding decides whether the ReLU passes a gradient
    grad = torch.randn(sums.shape, device=device) * (sums.detach().abs() > 0.1)
    y.backward(grad.to(y.dtype))
    sums.relu().backward(grad.double())
    pairs = [(y, sums.relu()), (x.grad, leaf.grad), (residual.grad, more.grad), (conv.weight.grad, exact.weight.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(norm.parameters(), wide.parameters(), strict=True)]
    pairs += [(norm.running_mean, wide.running_mean), (norm.running_var, wide.running_var)]
    worst = max(relative_error(a, b) for a, b in pairs)
    if not worst < LIMITS[dtype]:
        raise SystemExit(f"fused norm of {size}, {dtype}: wrong by {worst:.1e}")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.device == "cpu":
        avoid_broken_amx()
    torch.manual_seed(0)
    count = 0
    with strict_float32():
        for dtype in (torch.float32, torch.bfloat16):
            for name, module, x in modules(options.device):
                print(f"{name}, {dtype}: {check(name, module, x, dtype):.1e}", flush=True)
                count += 1
            for *size, filters, stride in CONV:
                error = check_fused_norm(tuple(size), filters, stride, dtype, options.device)
                print(f"fused norm of {size}, {dtype}: {error:.1e}", flush=True)
                count += 1
    if options.device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} cases agree with the dense module in fp64")


if __name__ == "__main__":
    main()
