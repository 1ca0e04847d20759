import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pysparse_ticket.ops.library import backend_of
from pysparse_ticket.ops.pattern import Pattern
from pysparse_ticket.ops.tiled_conv2d import tile_pack, tile_unpack, tiled_conv2d, tiled_mean

pytestmark = pytest.mark.usefixtures("poison")


def close(got, want, terms, name):
    """Relative to the largest entry: float32 sums of that many terms, through a batch norm."""
    assert got.shape == want.shape, name
    if not got.numel():
        return
    error = ((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()
    assert error <= 1.2e-7 * (20 + 4 * terms**0.5), f"{name}: relative error {error:.2e}"


def mask_of(kind, shape, g):
    """A share kept at random, or what the kernel with groups of four outputs has to get right."""
    mask = torch.ones(shape, dtype=torch.bool)
    if kind == "zero":
        mask[:] = False
    elif kind == "blocks of 8":
        mask &= (torch.rand(-(-shape[0] // 8), shape[1], generator=g) < 0.5).repeat_interleave(8, 0)[
            : shape[0], :, None, None
        ]
    elif kind == "no filter 2, no channel 1":
        mask[2], mask[:, 1] = False, False
    elif kind == "full and sparse groups":
        mask[4:8] = torch.rand(mask[4:8].shape, generator=g) < 0.1
    elif kind != "full":
        mask = torch.rand(shape, generator=g) < kind
    return mask


def layer(n=19, channels=(6, 8), size=(9, 10), kernel=3, stride=1, padding=1, bias=False, density=0.3, seed=0):
    """Input, pattern, values and conv bias with their float64 twins, norm and its twin, residual."""
    g = torch.Generator().manual_seed(seed)
    c, o = channels
    pattern = Pattern.from_mask(mask_of(density, (o, c, kernel, kernel), g))
    x = torch.randn(n, c, *size, generator=g)
    values, shift = torch.randn(pattern.nnz, generator=g), torch.randn(o, generator=g) if bias else None
    norm = nn.BatchNorm2d(o)
    with torch.no_grad():
        norm.weight.uniform_(-1, 2, generator=g)
        norm.bias.normal_(generator=g)
        norm.running_mean.normal_(generator=g)
        norm.running_var.uniform_(0.5, 2, generator=g)
    out = F.conv2d(x, pattern.scatter(values), None, stride, padding)
    residual = torch.randn(out.shape, generator=g)
    return x, values, shift, pattern, norm, residual, (stride, stride), (padding, padding)


def leaf(t, dtype):
    return None if t is None else t.detach().to(dtype).requires_grad_()


def run_both(x, values, shift, pattern, norm, residual, stride, padding, relu, halo=1, seed=1):
    n = x.shape[0]
    twin = copy.deepcopy(norm).double() if norm is not None else None
    mine = [leaf(t, torch.float32) for t in (x, values, shift, residual)]
    oracle = [leaf(t, torch.float64) for t in (x, values, shift, residual)]
    res = None if residual is None else tile_pack(mine[3], halo)
    z, _ = tiled_conv2d(
        tile_pack(mine[0], halo),
        n,
        halo,
        mine[1],
        pattern,
        stride,
        padding,
        bias=mine[2],
        norm=norm,
        residual=res,
        relu=relu,
    )
    got = tile_unpack(z, n, halo)
    want = F.conv2d(oracle[0], pattern.scatter(oracle[1]), oracle[2], stride, padding)
    want = twin(want) if twin is not None else want
    want = want if residual is None else want + oracle[3]
    want = want.relu() if relu else want
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(seed))
    got.backward(grad)
    want.backward(grad.double())
    pixels = want.numel() // want.shape[1]
    close(got, want, pattern.shape[1] * 9, "output")
    close(tiled_mean(z, n, halo), want.mean((2, 3)), pixels, "mean")
    names = ("input", "values", "conv bias", "residual")
    for name, a, b in zip(names, mine, oracle, strict=True):
        if a is None or (name == "conv bias" and norm is not None and norm.training):
            continue
        close(a.grad, b.grad, pixels, f"gradient of {name}")
    if norm is not None:
        for name, parameter in norm.named_parameters():
            close(parameter.grad, twin.get_parameter(name).grad, pixels, f"gradient of norm {name}")
        close(norm.running_mean, twin.running_mean, pixels, "running mean")
        close(norm.running_var, twin.running_var, pixels, "running variance")
        assert norm.num_batches_tracked == twin.num_batches_tracked
    return z, mine


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("stride", [1, 2], ids=["stride 1", "stride 2"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_matches_torch(training, stride, with_residual, relu):
    *rest, norm, residual, strides, padding = layer(stride=stride)
    norm.train(training)
    run_both(*rest, norm, residual if with_residual else None, strides, padding, relu)


@pytest.mark.parametrize("case", ["ragged", "1x1", "5x5 halo 2", "many channels", "one sample"])
def test_shapes(case, isa):
    arguments, halo = {
        "ragged": ({"n": 37}, 1),
        "1x1": ({"kernel": 1, "stride": 2, "padding": 0, "n": 32}, 1),
        "5x5 halo 2": ({"kernel": 5, "padding": 2, "size": (7, 6)}, 2),
        "many channels": ({"channels": (70, 5), "size": (8, 8)}, 1),
        "one sample": ({"n": 1}, 1),
    }[case]
    run_both(*layer(**arguments), relu=True, halo=halo)


@pytest.mark.parametrize("stride", [1, 2], ids=["stride 1", "stride 2"])
@pytest.mark.parametrize(
    "kind", ["zero", "full", "blocks of 8", "no filter 2, no channel 1", "full and sparse groups", 0.8, 0.5]
)
def test_masks(kind, stride, isa):
    run_both(*layer(density=kind, stride=stride, channels=(5, 14), size=(7, 8)), relu=True)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 1, "padding": 0},
        {"kernel": 5, "padding": 2, "size": (6, 7)},
        {"size": (13, 37)},
        {"channels": (70, 9)},
    ],
    ids=["1x1", "5x5", "many pixels", "blocks of channels"],
)
def test_full_masks(options, isa):
    x, values, bias, pattern, _, residual, *geometry = layer(density="full", bias=True, n=5, **options)
    run_both(x, values, bias, pattern, None, residual, *geometry, relu=True, halo=2)


def test_a_kept_plan_is_of_this_pattern():
    """Two masks of one shape and count, in turn; the values change from call to call."""
    for seed in (0, 1, 0):
        g = torch.Generator().manual_seed(seed)
        order = torch.rand(8, 6, 3, 3, generator=g)
        pattern = Pattern.from_mask(order > order.flatten().kthvalue(100).values)
        x, _, _, _, norm, residual, *geometry = layer()
        run_both(x, torch.randn(pattern.nnz), None, pattern, norm, residual, *geometry, relu=False)


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_no_norm(with_residual, relu):
    x, values, bias, pattern, _, residual, *geometry = layer(bias=not relu)
    run_both(x, values, bias, pattern, None, residual if with_residual else None, *geometry, relu=relu)


@pytest.mark.parametrize("training", [True, False, None], ids=["training", "eval", "no norm"])
def test_conv_bias(training):
    x, values, bias, pattern, norm, residual, *geometry = layer(bias=True)
    norm = None if training is None else norm.train(training)
    _, mine = run_both(x, values, bias, pattern, norm, residual, *geometry, relu=True)
    if training:
        assert not mine[2].grad.any()


@pytest.mark.parametrize("threads", [1, 2, 3], ids=lambda n: f"{n} threads")
def test_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    run_both(*layer(n=35), relu=True)
    run_both(*layer(n=35, density="full", channels=(3, 14)), relu=True)
    torch.set_num_threads(before)


def test_a_large_mean_costs_no_digits():
    """Channels of mean 1000 and variance 1: a plain sum of squares in float32 would lose the variance."""
    n, c = 32, 2
    x = torch.randn(n, c, 8, 8, generator=torch.Generator().manual_seed(0)) + 1000
    pattern = Pattern.from_mask(torch.eye(c, dtype=torch.bool)[:, :, None, None])
    norm = nn.BatchNorm2d(c)
    z, _ = tiled_conv2d(tile_pack(x), n, 1, torch.ones(c), pattern, norm=norm)
    want = F.batch_norm(x.double(), None, None, training=True)
    # the inputs carry 6e-5 of rounding at 1000
    torch.testing.assert_close(tile_unpack(z, n).double(), want, rtol=1e-4, atol=2e-4)


def test_ragged_tile_stays_out_of_statistics_and_gradients():
    """Garbage in the lanes behind the last sample must not reach anything."""
    x, values, _, pattern, norm, _, *geometry = layer(n=19)
    tiles = tile_pack(x).detach()
    twin = copy.deepcopy(norm)
    dirty = tiles.clone()
    dirty[1, ..., 3:] = 7.0

    def run(tiles, norm):
        v = values.clone().requires_grad_()
        z, _ = tiled_conv2d(tiles, 19, 1, v, pattern, *geometry, norm=norm, relu=True)
        z.square().sum().backward()
        return tile_unpack(z, 19), v.grad, norm.weight.grad, norm.running_var

    for clean, other in zip(run(tiles, norm), run(dirty, twin), strict=True):
        assert torch.equal(clean, other)


def test_halo_stays_zero():
    z, _ = run_both(*layer(), relu=False)
    inside = torch.zeros_like(z)
    inside[:, :, 1:-1, 1:-1] = 1
    assert not z[inside == 0].any()


def test_input_again_adds_its_gradient_in_the_kernel():
    """A residual block: x feeds the convolution and, through the second output, the sum."""
    x, values, _, pattern, norm, _, *geometry = layer(channels=(8, 8), n=32)
    first, second = norm, copy.deepcopy(norm)
    mine, oracle = leaf(x, torch.float32), leaf(x, torch.float64)
    v, w = leaf(values, torch.float32), leaf(values, torch.float64)
    twins = copy.deepcopy(first).double(), copy.deepcopy(second).double()
    y, again = tiled_conv2d(tile_pack(mine), 32, 1, v, pattern, *geometry, norm=first, relu=True)
    z, _ = tiled_conv2d(y, 32, 1, v, pattern, *geometry, norm=second, residual=again, relu=True)
    tiled_mean(z, 32).square().sum().backward()
    conv = lambda t: F.conv2d(t, pattern.scatter(w), None, *geometry)  # noqa: E731
    want = (twins[1](conv(twins[0](conv(oracle)).relu())) + oracle).relu()
    want.mean((2, 3)).square().sum().backward()
    close(mine.grad, oracle.grad, 32 * 90, "input gradient")
    close(v.grad, w.grad, 32 * 90, "values gradient")


def test_second_output_alone():
    x, values, _, pattern, _, _, *geometry = layer()
    x.requires_grad_()
    _, again = tiled_conv2d(tile_pack(x), 19, 1, values, pattern, *geometry)
    tile_unpack(again, 19).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_pack_and_unpack(layout, isa):
    x = torch.randn(19, 5, 7, 6).to(memory_format=layout).requires_grad_()
    tiles = tile_pack(x, 2)
    assert tiles.shape == (2, 5, 11, 10, 16)
    back = tile_unpack(tiles, 19, 2, layout is torch.channels_last)
    assert torch.equal(back, x)
    assert back.is_contiguous(memory_format=layout)
    assert torch.equal(tiles[0, 3, 2, 2], x[:16, 3, 0, 0])
    grad = torch.randn_like(x)
    back.backward(grad)
    assert torch.equal(x.grad, grad)


@pytest.mark.parametrize("norm_given", [True, False], ids=["norm", "no norm"])
def test_opcheck(norm_given):
    x, values, _, pattern, norm, residual, stride, padding = layer(n=17, size=(5, 4))
    ops = torch.ops.pysparse_ticket
    tiles, tests = tile_pack(x), ("test_schema", "test_faketensor")
    geometry = ((3, 3), stride, padding, (1, 1))
    forward = (tiles, values, pattern.row_ptr, pattern.col, norm.weight.data, norm.bias.data, None, None)
    forward += (tile_pack(residual), 17, 1, *geometry, norm_given, 1e-5, True)
    torch.library.opcheck(ops.tiled_conv2d, forward, test_utils=tests)
    z, y, stats = ops.tiled_conv2d(*forward)
    backward = (z, tiles, tiles, y, z, stats, values, *pattern.tensors, norm.weight.data, norm.bias.data)
    backward += (17, 1, *geometry, norm_given, norm_given, True, True, True, True, True)
    torch.library.opcheck(ops.tiled_conv2d_backward, backward, test_utils=tests)
    torch.library.opcheck(ops.tile_pack, (x.requires_grad_(), 1))
    torch.library.opcheck(ops.tile_unpack, (tiles.requires_grad_(), 17, 1, True))
    torch.library.opcheck(ops.tiled_mean, (tiles, 17, 1))


def test_reference_backend():
    """Plain torch: equal to the kernels in float32, and its own gradient's oracle in float64."""
    x, values, _, pattern, norm, residual, *geometry = layer(n=5, size=(4, 3), channels=(2, 3))

    def f(x, values, residual, backend=None, norm=norm):
        to = {"backend": backend}
        tiles, rest = tile_pack(x, **to), tile_pack(residual, **to)
        z, again = tiled_conv2d(tiles, 5, 1, values, pattern, *geometry, norm=norm, residual=rest, relu=True, **to)
        return tiled_mean(z, 5, **to).square().sum() + tile_unpack(again, 5, **to).pow(3).sum()

    inputs = [t.requires_grad_() for t in (x, values, residual)]
    twin = copy.deepcopy(norm)
    ours, theirs = f(*inputs), f(*inputs, backend="reference", norm=twin)
    assert backend_of("tiled_conv2d") == "reference"
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, twin.running_var)
    doubles, wide = [t.detach().double().requires_grad_() for t in inputs], copy.deepcopy(norm).double()
    assert torch.autograd.gradcheck(lambda *t: f(*t, norm=wide.eval()), doubles)


def test_half_precision_becomes_float32():
    x, values, _, pattern, *_ = layer()
    tiles = tile_pack(x.bfloat16())
    assert torch.equal(tiles, tile_pack(x.bfloat16().float()))
    z, _ = tiled_conv2d(tiles, 19, 1, values.bfloat16(), pattern, padding=(1, 1))
    assert torch.equal(z, tiled_conv2d(tiles, 19, 1, values.bfloat16().float(), pattern, padding=(1, 1))[0])


def test_images_beyond_32_bit_offsets_are_refused():
    x = torch.zeros(1, 1, 1, 1, 1).expand(1, 2048, 300, 302, 16)
    pattern = Pattern.from_mask(torch.ones(1, 2048, 1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="16 images of 2048 channels and 300x302 pixels are too large"):
        tiled_conv2d(x, 16, 1, torch.zeros(2048), pattern)


def test_compiles_in_one_graph():
    x, values, _, pattern, norm, residual, *geometry = layer()

    def f(x, values, residual):
        z, _ = tiled_conv2d(
            tile_pack(x), 19, 1, values, pattern, *geometry, norm=norm, residual=tile_pack(residual), relu=True
        )
        return tiled_mean(z, 19).square().sum()

    values.requires_grad_()
    want = torch.autograd.grad(f(x, values, residual), values)[0]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, values, residual), values)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 6, 11, 12, 16)}, r"needs tiles \[2, 6, Hp, Wp, 16\]"),
        ({"padding": (2, 2)}, "needs a halo of 2"),
        ({"residual": torch.zeros(2, 8, 3, 3, 16)}, "the residual has shape"),
        ({"x": torch.zeros(2, 6, 3, 3, 16), "padding": (0, 0)}, "smaller than the kernel"),
        ({"x": torch.zeros(2, 6, 11, 12, 16).double(), "backend": "cpu"}, "float32 on the CPU"),
    ],
    ids=["tiles", "halo", "residual", "small image", "double"],
)
def test_bad_input(change, message):
    x, values, _, pattern, _, _, stride, padding = layer()
    arguments = {"x": tile_pack(x), "n": 19, "halo": 1, "values": values, "pattern": pattern}
    with pytest.raises(ValueError, match=message):
        tiled_conv2d(**{**arguments, "stride": stride, "padding": padding, **change})


def test_freed_tiles_serve_the_next_tensor():
    """Above a MiB; a limit of 0 frees them, and nothing that is still in use."""
    x = torch.randn(16, 4, 64, 66)
    first = tile_pack(x, 1)
    want, where = first.clone(), first.data_ptr()
    second = tile_pack(x, 1)
    assert second.data_ptr() != where and where % 64 == 0
    del first
    again = tile_pack(x, 1)
    assert again.data_ptr() == where and torch.equal(again, want)
    torch.ops.pysparse_ticket.keep_tile_memory(0)
    del second
    assert torch.equal(again, want)
    torch.ops.pysparse_ticket.keep_tile_memory(1 << 30)
