"""Convolutions whose input's norm, residual and ReLU run as they load: two in a row against torch in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pysparse_ticket.ops.pattern import Pattern
from pysparse_ticket.ops.tiled_conv2d import tile_pack, tile_unpack
from pysparse_ticket.ops.tiled_norm_conv2d import Raw, tiled_norm, tiled_norm_conv2d

pytestmark = pytest.mark.usefixtures("poison")


def close(got, want, terms, name):
    """Relative to the largest entry: float32 sums of that many terms, through two batch norms."""
    assert got.shape == want.shape, name
    error = ((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()
    assert error <= 1.2e-7 * (40 + 8 * terms**0.5), f"{name}: relative error {error:.2e}"


def batch_norm(channels, g, affine=True, momentum=0.1):
    norm = nn.BatchNorm2d(channels, affine=affine, momentum=momentum)
    with torch.no_grad():
        if affine:
            norm.weight.uniform_(0.5, 2, generator=g)
            norm.bias.normal_(generator=g)
        norm.running_mean.normal_(generator=g)
        norm.running_var.uniform_(0.5, 2, generator=g)
    return norm


def check_pair(
    n=19, channels=(6, 8, 5), size=(9, 10), kernel=3, stride=1, padding=1, halo=1, training=True, with_residual=False,
    relu=True, read_again=False, bias=False, affine=True, momentum=0.1, density=0.4,
):  # fmt: skip
    """relu(norm(conv(x)) [+ residual]), then conv, norm and ReLU; the first result may be read a second time."""
    g = torch.Generator().manual_seed(0)
    c, m, o = channels
    patterns = [
        Pattern.from_mask(torch.rand(m, c, 3, 3, generator=g) < density),
        Pattern.from_mask(torch.rand(o, m, kernel, kernel, generator=g) < density),
    ]
    data = [torch.randn(n, c, *size, generator=g), torch.randn(n, m, *size, generator=g)]
    data += [torch.randn(p.nnz, generator=g) for p in patterns]
    data += [torch.randn(m, generator=g), torch.randn(o, generator=g)]
    norms = [batch_norm(k, g, affine, momentum).train(training) for k in (m, o)]
    twins = [copy.deepcopy(norm).double() for norm in norms]
    mine, oracle = ([t.detach().to(d).requires_grad_() for t in data] for d in (torch.float32, torch.float64))

    x, residual, v1, v2, b1, b2 = mine
    first, again = tiled_norm_conv2d(
        tile_pack(x, halo), n, halo, v1, patterns[0], (1, 1), (1, 1), norm=norms[0], bias=b1 if bias else None,
        residual=tile_pack(residual, halo) if with_residual else None, relu=relu,
    )  # fmt: skip
    assert torch.equal(tile_unpack(again, n, halo), x)
    second, z = tiled_norm_conv2d(
        first, n, halo, v2, patterns[1], (stride, stride), (padding, padding), norm=norms[1], bias=b2 if bias else None,
        relu=True, keep=read_again,
    )  # fmt: skip
    got = [tile_unpack(tiled_norm(second, n, halo), n, halo)]
    assert (z is not None) == (read_again or with_residual)
    if read_again:
        got.append(tile_unpack(z, n, halo))

    x, residual, v1, v2, b1, b2 = oracle
    mid = twins[0](F.conv2d(x, patterns[0].scatter(v1), b1 if bias else None, 1, 1))
    mid = mid + residual if with_residual else mid
    mid = mid.relu() if relu else mid
    end = F.conv2d(mid, patterns[1].scatter(v2), b2 if bias else None, stride, padding)
    want = [twins[1](end).relu(), *([mid] if read_again else [])]
    grads = [torch.randn(t.shape, generator=g) for t in want]
    torch.autograd.backward(got, grads)
    torch.autograd.backward(want, [t.double() for t in grads])

    pixels = n * size[0] * size[1]
    for a, b in zip(got, want, strict=True):
        close(a, b, 9 * m, "output")
    for name, a, b in zip(("x", "residual", "values 1", "values 2", "bias 1", "bias 2"), mine, oracle, strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and not (training and "bias" in name):
            close(a.grad, b.grad, pixels, name)
        elif a.grad is not None:
            assert not a.grad.any()
    for norm, twin in zip(norms, twins, strict=True):
        for name, parameter in norm.named_parameters():
            close(parameter.grad, twin.get_parameter(name).grad, pixels, f"norm {name}")
        close(norm.running_mean, twin.running_mean, pixels, "running mean")
        close(norm.running_var, twin.running_var, pixels, "running variance")
        assert norm.num_batches_tracked == twin.num_batches_tracked
    return second


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("read_again", [False, True], ids=["read once", "read again"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
def test_matches_torch(training, with_residual, read_again, relu):
    check_pair(training=training, with_residual=with_residual, read_again=read_again, relu=relu)


SHAPES = {
    "one sample": {"n": 1},
    "many bands": {"n": 20, "channels": (4, 40, 33), "size": (30, 31)},
    "stride 2": {"stride": 2},
    "stride 2, many bands": {"stride": 2, "n": 4, "channels": (2, 40, 3), "size": (41, 33), "read_again": True},
    "1x1 stride 2": {"kernel": 1, "padding": 0, "stride": 2, "read_again": True},
    "1x1 stride 3 skips rows": {"kernel": 1, "padding": 0, "stride": 3, "size": (12, 12)},
    "5x5 halo 2": {"kernel": 5, "padding": 2, "halo": 2, "size": (7, 6)},
    "no padding": {"padding": 0, "n": 4, "channels": (2, 40, 30), "size": (31, 30)},
    "padding beyond the kernel": {"kernel": 1, "padding": 1},
    "full": {"density": 1, "with_residual": True, "read_again": True},
    "full, stride 2": {"density": 1, "stride": 2},
    "full, many bands": {"density": 1, "n": 4, "channels": (2, 40, 3), "size": (30, 31)},
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes(case, isa):
    check_pair(**SHAPES[case])


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    "options",
    [{"bias": True}, {"affine": False}, {"affine": False, "bias": True}, {"momentum": None}],
    ids=["conv bias", "not affine", "conv bias, not affine", "momentum none"],
)
def test_norms(options, training):
    check_pair(training=training, **options)


@pytest.mark.parametrize("threads", [1, 2, 3], ids=lambda n: f"{n} threads")
def test_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    check_pair(n=35, read_again=True)
    torch.set_num_threads(before)


def test_garbage_behind_the_last_sample_reaches_nothing():
    g = torch.Generator().manual_seed(0)
    pattern = Pattern.from_mask(torch.rand(4, 4, 3, 3, generator=g) < 0.5)
    tiles = tile_pack(torch.randn(19, 4, 6, 6, generator=g)).detach()
    dirty = tiles.clone()
    dirty[1, ..., 3:] = 7.0

    def run(tiles):
        v, norms = torch.linspace(-1, 1, pattern.nnz).requires_grad_(), (nn.BatchNorm2d(4), nn.BatchNorm2d(4))
        raw, _ = tiled_norm_conv2d(tiles, 19, 1, v, pattern, padding=(1, 1), norm=norms[0], relu=True)
        raw, _ = tiled_norm_conv2d(raw, 19, 1, v, pattern, padding=(1, 1), norm=norms[1], relu=True)
        z = tile_unpack(tiled_norm(raw, 19, 1), 19)
        z.square().sum().backward()
        return z, v.grad, norms[0].weight.grad, norms[0].running_var

    for clean, other in zip(run(tiles), run(dirty), strict=True):
        assert torch.equal(clean, other)


def test_frozen_parts_need_no_gradient():
    """Only the first norm's weight is trained: its gradient comes out of the second convolution's kernel alone."""
    g = torch.Generator().manual_seed(0)
    pattern = Pattern.from_mask(torch.rand(4, 4, 3, 3, generator=g) < 0.5)
    values, x = torch.randn(pattern.nnz, generator=g), torch.randn(5, 4, 6, 6, generator=g)
    norms = nn.BatchNorm2d(4), nn.BatchNorm2d(4).requires_grad_(False)
    twins = copy.deepcopy(norms[0]).double(), copy.deepcopy(norms[1]).double()
    raw, _ = tiled_norm_conv2d(tile_pack(x), 5, 1, values, pattern, padding=(1, 1), norm=norms[0], relu=True)
    raw, _ = tiled_norm_conv2d(raw, 5, 1, values, pattern, padding=(1, 1), norm=norms[1])
    tile_unpack(tiled_norm(raw, 5, 1), 5).pow(3).sum().backward()
    conv = lambda t: F.conv2d(t, pattern.scatter(values).double(), None, 1, 1)  # noqa: E731
    twins[1](conv(twins[0](conv(x.double())).relu())).pow(3).sum().backward()
    close(norms[0].weight.grad, twins[0].weight.grad, 180, "weight")


def test_second_output_alone():
    x = torch.randn(5, 4, 6, 6)
    pattern, values, norms = Pattern.from_mask(torch.ones(4, 4, 1, 1) > 0), torch.randn(16), [nn.BatchNorm2d(4)] * 2
    values.requires_grad_()
    raw, _ = tiled_norm_conv2d(tile_pack(x), 5, 1, values, pattern, norm=norms[0], relu=True)
    _, z = tiled_norm_conv2d(raw, 5, 1, values.detach(), pattern, norm=norms[1], keep=True)
    (grad,) = torch.autograd.grad(tile_unpack(z, 5).pow(3).sum(), values)
    weights = values.detach().double().requires_grad_()
    conv = F.conv2d(x.double(), pattern.scatter(weights))
    want = F.batch_norm(conv, None, None, training=True).relu().pow(3).sum()
    close(grad, torch.autograd.grad(want, weights)[0], 180, "values")


def test_reference_backend():
    g = torch.Generator().manual_seed(0)
    pattern = Pattern.from_mask(torch.rand(4, 4, 3, 3, generator=g) < 0.5)
    x, values = torch.randn(5, 4, 6, 6, generator=g), torch.randn(pattern.nnz, generator=g)
    norms = [batch_norm(4, g, True, 0.1) for _ in range(2)]

    def run(x, values, norms, backend=None):
        same = {"padding": (1, 1), "relu": True, "backend": backend}
        raw, again = tiled_norm_conv2d(tile_pack(x, backend=backend), 5, 1, values, pattern, norm=norms[0], **same)
        raw, z = tiled_norm_conv2d(raw, 5, 1, values, pattern, norm=norms[1], residual=again, keep=True, **same)
        return tile_unpack(tiled_norm(raw, 5, 1) + z, 5, backend=backend).pow(3).mean()

    twins = copy.deepcopy(norms)
    leaves = [t.requires_grad_() for t in (x, values)]
    ours, theirs = run(*leaves, norms), run(*leaves, twins, "reference")
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(norms[1].running_var, twins[1].running_var)


@pytest.mark.parametrize("with_norm", [True, False], ids=["norm", "tiles"])
def test_opcheck(with_norm):
    g = torch.Generator().manual_seed(0)
    ops, tests = torch.ops.pysparse_ticket, ("test_schema", "test_faketensor")
    pattern = Pattern.from_mask(torch.rand(5, 4, 3, 3, generator=g) < 0.5)
    values, tiles = torch.randn(pattern.nnz, generator=g), tile_pack(torch.randn(17, 4, 6, 5, generator=g))
    norm = (torch.ones(3, 4), torch.ones(4), torch.zeros(4)) if with_norm else (None, None, None)
    geometry = ([3, 3], [2, 2], [1, 1], [1, 1])
    forward = (tiles, *norm, tiles if with_norm else None, True, True, values, pattern.row_ptr, pattern.col, None, None)
    forward += (17, 1, *geometry, 1e-5)
    torch.library.opcheck(ops.tiled_norm_conv2d, forward, test_utils=tests)
    y, stats, z = ops.tiled_norm_conv2d(*forward)
    backward = (y, stats, tiles, y, stats, tiles, z if with_norm else None, *norm, True, True, values, *pattern.tensors)
    backward += (17, 1, *geometry, True, True)
    torch.library.opcheck(ops.tiled_norm_conv2d_backward, backward, test_utils=tests)
    if with_norm:
        torch.library.opcheck(ops.tiled_norm, (tiles, *norm, tiles, 1, True), test_utils=tests)
        arguments = (tiles, tiles, None, *norm, 17, 1, True, True)
        torch.library.opcheck(ops.tiled_norm_backward, arguments, test_utils=tests)


def test_compiles_in_one_graph():
    g = torch.Generator().manual_seed(0)
    pattern = Pattern.from_mask(torch.rand(4, 4, 3, 3, generator=g) < 0.5)
    values, x = torch.randn(pattern.nnz, generator=g).requires_grad_(), torch.randn(5, 4, 6, 6, generator=g)
    norms = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def f(x, values):
        raw, _ = tiled_norm_conv2d(tile_pack(x), 5, 1, values, pattern, padding=(1, 1), norm=norms[0], relu=True)
        raw, z = tiled_norm_conv2d(raw, 5, 1, values, pattern, padding=(1, 1), norm=norms[1], keep=True)
        return tile_unpack(tiled_norm(Raw(**{**vars(raw), "residual": z}), 5, 1), 5).pow(3).sum()

    want = torch.autograd.grad(f(x, values), values)[0]
    got = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(x, values), values)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_shape_of_a_raw_is_checked():
    pattern = Pattern.from_mask(torch.ones(4, 4, 1, 1) > 0)
    raw, _ = tiled_norm_conv2d(torch.zeros(1, 4, 6, 6, 16), 5, 1, torch.ones(16), pattern, norm=nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=r"needs tiles \[2, 4, Hp, Wp, 16\]"):
        tiled_norm_conv2d(raw, 17, 1, torch.ones(16), pattern, norm=nn.BatchNorm2d(4))
