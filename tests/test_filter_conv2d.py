"""The Triton kernels of filter_conv2d: under the interpreter on a machine without a GPU, compiled on one with."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from pysparse_ticket.ops.filter_conv2d import filter_conv2d

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # a few roundings of the dtype

# kernel, stride, padding, dilation, images: odd sizes, strides that skip pixels, taps that no pixel of a phase meets
GEOMETRIES = {
    "3x3": ((3, 3), (1, 1), (1, 1), (1, 1), (2, 7, 9)),
    "1x1": ((1, 1), (1, 1), (0, 0), (1, 1), (3, 5, 5)),
    "3x3 stride 2": ((3, 3), (2, 2), (1, 1), (1, 1), (2, 8, 7)),
    "1x1 stride 2": ((1, 1), (2, 2), (0, 0), (1, 1), (2, 5, 6)),
    "2x5 stride 3x1": ((2, 5), (3, 1), (0, 2), (1, 1), (1, 7, 6)),
    "3x3 dilation 2": ((3, 3), (1, 1), (2, 2), (2, 2), (1, 7, 8)),
    "3x3 stride 2 dilation 2": ((3, 3), (2, 2), (1, 2), (2, 2), (1, 9, 8)),
    "smaller than the stride": ((1, 1), (4, 4), (0, 0), (1, 1), (2, 2, 1)),
}


def relative(actual, expected):
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


def kept(count, share, seed):
    mask = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < share
    mask[0] = True
    return mask.nonzero().flatten().to(DEVICE)


def tensors(name, dtype, channels=(11, 19), compact=(False, False), memory=torch.contiguous_format):
    """Inputs of the op, and the dense weight of the equal convolution."""
    torch.manual_seed(0)
    kernel, stride, padding, dilation, (n, h, w) = GEOMETRIES[name]
    inputs, outputs = channels
    in_index, out_index = kept(inputs, 0.6, 1), kept(outputs, 0.5, 2)
    weight = torch.randn(len(out_index), len(in_index), *kernel, device=DEVICE).to(dtype).requires_grad_()
    bias = torch.randn(len(out_index), device=DEVICE).to(dtype).requires_grad_()
    x = torch.randn(n, len(in_index) if compact[0] else inputs, h, w, device=DEVICE).to(dtype)
    x = x.contiguous(memory_format=memory).requires_grad_()
    index = (None if compact[0] else in_index, None if compact[1] else out_index)
    return x, weight, bias, *index, outputs, (stride, padding, dilation)


def expected(x, weight, bias, in_index, out_index, outputs, geometry):
    """By the definition, in float64: F.conv2d with a weight that is zero where nothing is kept."""
    rows = torch.arange(weight.shape[0], device=x.device) if out_index is None else out_index
    cols = torch.arange(weight.shape[1], device=x.device) if in_index is None else in_index
    full = weight.new_zeros((weight.shape[0] if out_index is None else outputs, x.shape[1], *weight.shape[2:]))
    full = full.index_put((rows[:, None], cols), weight)
    shift = bias.new_zeros(len(full)).index_put((rows,), bias)
    return F.conv2d(x, full, shift, *geometry)


def compare(arguments, dtype, **options):
    x, weight, bias, in_index, out_index, outputs, geometry = arguments
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    want = expected(*exact, in_index, out_index, outputs, geometry)
    y = filter_conv2d(x, weight, bias, in_index, out_index, outputs, *geometry, backend="triton", **options)
    y, stats = (y[0], y[1:]) if options.get("stats") else (y, ())
    assert y.shape == want.shape and y.is_contiguous(memory_format=torch.channels_last)
    assert relative(y, want) < TOLERANCE[dtype]
    if out_index is not None:
        removed = torch.ones(outputs, dtype=torch.bool, device=y.device).index_fill(0, out_index, False)
        assert (y[:, removed] == 0).all()
    grads = [torch.randn_like(want)]
    wants = [want]
    if stats:
        chosen = want if out_index is None else want.index_select(1, out_index)
        wants += [chosen.mean((0, 2, 3)), chosen.var((0, 2, 3), correction=0)]
        grads += [torch.randn_like(t) * 10 for t in wants[1:]]
        for got, right in zip(stats, wants[1:], strict=True):
            assert relative(got, right) < TOLERANCE[dtype]
    right = torch.autograd.grad(wants, exact, grads)
    got = torch.autograd.grad(
        [y, *stats], (x, weight, bias), [g.to(t) for g, t in zip(grads, [y, *stats], strict=True)]
    )
    for name, a, b in zip(("x", "weight", "bias"), got, right, strict=True):
        assert a.dtype == dtype and relative(a, b) < TOLERANCE[dtype], name


@pytest.mark.parametrize("name", GEOMETRIES, ids=lambda n: n.replace(" ", "-"))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
def test_equals_the_masked_convolution(name, dtype, poison):
    compare(tensors(name, dtype), dtype)


@pytest.mark.parametrize("compact", list(product([False, True], repeat=2)), ids=lambda c: f"in{c[0]:d}-out{c[1]:d}")
@pytest.mark.parametrize("stats", [False, True], ids=["plain", "stats"])
def test_full_or_compact_channels(compact, stats, poison):
    compare(tensors("3x3", torch.float32, compact=compact), torch.float32, stats=stats)


@pytest.mark.parametrize("channels", [(1, 1), (150, 5), (5, 150)], ids=str)
def test_one_channel_and_many(channels, poison):
    compare(tensors("3x3 stride 2", torch.float32, channels), torch.float32, stats=True)
