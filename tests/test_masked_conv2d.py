import pytest
import torch
import torch.nn.functional as F

from pysparse_ticket.ops.library import backend_of
from pysparse_ticket.ops.masked_conv2d import default_layout, masked_conv2d, masked_conv2d_reference
from pysparse_ticket.ops.pattern import Pattern

# (N, C, H, W, O, kernel, stride, padding, dilation)
SHAPES = {
    "3x3": (33, 5, 9, 11, 7, (3, 3), (1, 1), (1, 1), (1, 1)),
    "8x8 two tiles": (32, 16, 8, 8, 20, (3, 3), (1, 1), (1, 1), (1, 1)),
    "wide rows": (3, 2, 5, 37, 3, (3, 3), (1, 1), (1, 1), (1, 1)),
    "one sample": (1, 3, 7, 7, 4, (3, 3), (1, 1), (1, 1), (1, 1)),
    "1x1": (20, 6, 5, 4, 5, (1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1 stride 2": (18, 6, 8, 7, 5, (1, 1), (2, 2), (0, 0), (1, 1)),
    "3x3 stride 2": (17, 4, 16, 16, 6, (3, 3), (2, 2), (1, 1), (1, 1)),
    "stride 2 odd": (16, 4, 9, 13, 6, (3, 3), (2, 2), (1, 1), (1, 1)),
    "stride 3x2": (5, 3, 11, 10, 4, (3, 2), (3, 2), (1, 0), (1, 1)),
    "stride over kernel": (4, 3, 9, 9, 2, (2, 2), (4, 3), (0, 0), (1, 1)),
    "7x7 stride 2": (2, 3, 21, 19, 8, (7, 7), (2, 2), (3, 3), (1, 1)),
    "dilated": (6, 4, 10, 12, 3, (3, 3), (1, 1), (2, 3), (2, 3)),
    "dilated strided": (6, 4, 11, 12, 3, (3, 3), (2, 2), (2, 1), (2, 3)),
    "padding over image": (4, 2, 2, 3, 3, (3, 3), (1, 1), (5, 6), (1, 1)),
    "padding over kernel strided": (4, 2, 3, 3, 3, (1, 2), (2, 2), (3, 2), (1, 1)),
    "many channels": (16, 70, 6, 6, 3, (3, 3), (1, 1), (1, 1), (1, 1)),
    "1x1 image": (19, 7, 1, 1, 4, (3, 3), (1, 1), (1, 1), (1, 1)),
}


def mask_of(shape, density, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def filter_blocks(shape, density, filters=8):
    """Every ``filters`` neighbouring filters have the same weights."""
    blocks = mask_of((-(-shape[0] // filters), *shape[1:]), density)
    return blocks.repeat_interleave(filters, 0)[: shape[0]]


def half_full(shape):
    """Filters that are full, the last of them in the middle of four, then filters of few weights."""
    mask = mask_of(shape, 0.05)
    mask[: shape[0] // 2 + 1] = True
    return mask


# rows of four filters that share their pixels, in part or in all groups
GROUPED = {
    "blocks of 8 filters": lambda shape: filter_blocks(shape, 0.4),
    "half full": half_full,
    "full": lambda shape: torch.ones(shape, dtype=torch.bool),
}
GROUPED_SHAPES = {
    "blocks of channels": (17, 70, 6, 6, 19, (3, 3), (1, 1), (1, 1), (1, 1)),
    "blocks of rows": (17, 20, 9, 33, 22, (3, 3), (1, 1), (1, 1), (1, 1)),
    "blocks of rows, stride 2": (17, 20, 17, 33, 21, (3, 3), (2, 2), (1, 1), (1, 1)),
    "1x1": (20, 9, 5, 4, 17, (1, 1), (1, 1), (0, 0), (1, 1)),
}


def make_grouped(shape, mask):
    n, c, h, w, o, kernel, *geometry = GROUPED_SHAPES[shape]
    g = torch.Generator().manual_seed(0)
    pattern = Pattern.from_mask(GROUPED[mask]((o, c, *kernel)))
    x, bias = torch.randn(n, c, h, w, generator=g), torch.randn(o, generator=g)
    return x, torch.randn(pattern.nnz, generator=g), bias, pattern, geometry


def make(shape, density=0.3, seed=0):
    n, c, h, w, o, kernel, *geometry = SHAPES[shape] if isinstance(shape, str) else shape
    g = torch.Generator().manual_seed(seed)
    pattern = Pattern.from_mask(mask_of((o, c, *kernel), density, seed))
    x = torch.randn(n, c, h, w, generator=g)
    values, bias = torch.randn(pattern.nnz, generator=g), torch.randn(o, generator=g)
    return x, values, bias, pattern, geometry


def close(got, want, terms, name):
    """Relative to the largest entry: float32 sums of that many terms in any order."""
    scale = want.abs().max().clamp_min(1e-30) if want.numel() else 1.0
    error = ((got.double() - want).abs().max() / scale).item() if want.numel() else 0.0
    limit = 1.2e-7 * (8 + terms**0.5 * 2)
    assert got.shape == want.shape, name
    assert error <= limit, f"{name}: relative error {error:.2e} over {limit:.2e}"


@pytest.fixture(params=["tiles", "pixels"])
def layout(request):
    return request.param


def check(x, values, bias, pattern, geometry, grad_like=None, seed=1, layout=None):
    mine = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, values, bias)]
    oracle = [t.detach().double().requires_grad_() for t in (x, values, bias)]
    y = masked_conv2d(*mine, pattern, *geometry, layout=layout)
    want = masked_conv2d_reference(*oracle, pattern, *geometry)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)
    y.backward(grad_like(grad) if grad_like else grad)
    want.backward(grad.double())
    taps = pattern.shape[2] * pattern.shape[3]
    close(y, want, pattern.shape[1] * taps, "output")
    close(mine[0].grad, oracle[0].grad, pattern.shape[0] * taps, "input gradient")
    close(mine[1].grad, oracle[1].grad, x.shape[0] * want.shape[2] * want.shape[3], "values gradient")
    close(mine[2].grad, oracle[2].grad, x.shape[0] * want.shape[2] * want.shape[3], "bias gradient")
    return y, mine


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"{n} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_dense(shape, layout, isa, poison):
    check(*make(shape), layout=layout)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_dense_on_every_device(shape, memory, device):
    """On the backend that the device takes unasked."""
    x, values, bias, pattern, geometry = make(shape)
    there = Pattern.from_mask(pattern.mask().to(device))
    check(x.to(device, memory_format=memory), values.to(device), bias.to(device), there, geometry)


@pytest.mark.parametrize("shape", ["3x3", "8x8 two tiles", "1x1", "3x3 stride 2", "stride 3x2", "dilated strided"])
def test_channels_last(shape, layout, isa, poison):
    x, *rest = make(shape)
    last = lambda t: t.to(memory_format=torch.channels_last)  # noqa: E731
    y, mine = check(last(x), *rest, grad_like=last, layout=layout)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert mine[0].grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", ["3x3", "8x8 two tiles", "one sample", "stride 2 odd"])
def test_threads(shape, layout, threads):
    check(*make(shape), layout=layout)


@pytest.mark.parametrize("density", [0.0, 0.02, 1.0], ids=["zero mask", "empty rows", "full mask"])
@pytest.mark.parametrize("shape", ["3x3", "3x3 stride 2", "1x1"])
def test_densities(shape, density, layout, isa, poison):
    check(*make(shape, density), layout=layout)


@pytest.mark.parametrize("mask", GROUPED)
@pytest.mark.parametrize("shape", GROUPED_SHAPES)
def test_filters_that_share_columns(shape, mask, layout, isa, poison):
    check(*make_grouped(shape, mask), layout=layout)


@pytest.mark.parametrize("mask", GROUPED)
@pytest.mark.parametrize("shape", ["blocks of channels", "blocks of rows, stride 2"])
def test_filters_that_share_columns_on_threads(shape, mask, threads, poison):
    """Two tiles on three threads: each takes some of the filters of both."""
    check(*make_grouped(shape, mask), layout="tiles")


def test_values_of_a_later_call():
    """Plans are kept from call to call, values are not."""
    x, values, bias, pattern, geometry = make_grouped("1x1", "full")
    for scale in (1.0, 2.0):
        check(x, values * scale, bias, pattern, geometry, layout="tiles")


def test_empty_row_and_column(layout):
    x, _, bias, pattern, geometry = make("3x3")
    mask = pattern.mask()
    mask[2], mask[:, 1] = False, False
    pattern = Pattern.from_mask(mask)
    y, mine = check(x, torch.randn(pattern.nnz), bias, pattern, geometry, layout=layout)
    assert torch.equal(y[:, 2], bias[2].expand_as(y[:, 2]))
    assert not mine[0].grad[:, 1].any()


def test_empty_batch(layout):
    x, values, bias, pattern, geometry = make("3x3")
    x = x[:0].requires_grad_()
    values.requires_grad_()
    y = masked_conv2d(x, values, bias, pattern, *geometry, layout=layout)
    assert y.shape == (0, 7, 9, 11)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not values.grad.any()


def test_non_contiguous(layout):
    x, *rest = make("3x3")
    wide = torch.stack([x, x + 1], -1)[..., 0]
    assert not wide.is_contiguous()
    check(wide, *rest, grad_like=lambda g: torch.stack([g, g], -1)[..., 0], layout=layout)
    last = lambda g: g.to(memory_format=torch.channels_last)  # noqa: E731
    y, _ = check(x.transpose(2, 3), *rest, grad_like=last, layout=layout)
    assert y.is_contiguous()


def test_expanded_gradient(layout):
    x, values, bias, pattern, geometry = make("3x3")
    values.requires_grad_()
    masked_conv2d(x, values, bias, pattern, *geometry, layout=layout).sum().backward()
    oracle = values.detach().double().requires_grad_()
    masked_conv2d_reference(x.double(), oracle, bias.double(), pattern, *geometry).sum().backward()
    close(values.grad, oracle.grad, 33 * 99, "values gradient")


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)], ids=["x", "values", "bias", "no bias"])
def test_only_what_is_needed(needs, layout):
    x, values, bias, pattern, geometry = make("3x3 stride 2")
    tensors = [t.requires_grad_(bool(need)) for t, need in zip((x, values, bias), needs, strict=True)]
    if needs == (1, 1, 0):
        tensors[2] = None
    y = masked_conv2d(*tensors, pattern, *geometry, layout=layout)
    y.square().sum().backward()
    oracle = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    masked_conv2d_reference(*oracle, pattern, *geometry).square().sum().backward()
    for t, want, need in zip(tensors, oracle, needs, strict=True):
        if need:
            close(t.grad, want.grad, 17 * 64 * 2, "gradient")
        else:
            assert t is None or t.grad is None


def test_reference_takes_double_and_is_differentiable():
    x, values, bias, pattern, geometry = make((1, 2, 3, 4, 2, (3, 3), (2, 1), (1, 1), (1, 1)))
    tensors = [t.double().requires_grad_() for t in (x, values, bias)]
    assert torch.autograd.gradcheck(lambda *t: masked_conv2d(*t, pattern, *geometry), tensors)
    weight = pattern.scatter(tensors[1])
    want = F.conv2d(tensors[0], weight, tensors[2], *geometry)
    torch.testing.assert_close(masked_conv2d(*tensors, pattern, *geometry), want)


def check_bfloat16(x, values, bias, pattern, geometry, layout):
    """One rounding to 8 bits of a float32 result; the output gradient that comes in is rounded on both sides."""
    x = x.bfloat16().requires_grad_()
    values.requires_grad_()
    bias.requires_grad_()
    oracle = [t.detach().float().requires_grad_() for t in (x, values, bias)]
    y = masked_conv2d(x, values, bias, pattern, *geometry, layout=layout)
    want = masked_conv2d_reference(*oracle, pattern, *geometry)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, rtol=2**-8, atol=1e-4)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    y.backward(grad)
    want.backward(grad.float())
    assert (x.grad.dtype, values.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(x.grad.float(), oracle[0].grad, rtol=2**-8, atol=1e-4)
    close(values.grad, oracle[1].grad.double(), x.shape[0] * y.shape[2] * y.shape[3], "values gradient")
    close(bias.grad, oracle[2].grad.double(), x.shape[0] * y.shape[2] * y.shape[3], "bias gradient")
    return y, x.grad


@pytest.mark.parametrize("shape", ["many channels", "3x3 stride 2", "stride 3x2", "1x1", "8x8 two tiles"])
def test_bfloat16_accumulates_in_float32(shape, layout, isa, poison):
    check_bfloat16(*make(shape), layout)


@pytest.mark.parametrize("shape", ["3x3", "3x3 stride 2", "1x1"])
def test_bfloat16_channels_last(shape, layout, isa, poison):
    x, *rest = make(shape)
    y, grad = check_bfloat16(x.to(memory_format=torch.channels_last), *rest, layout)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mask", GROUPED)
def test_bfloat16_of_filters_that_share_columns(mask, layout, poison):
    check_bfloat16(*make_grouped("blocks of rows, stride 2", mask), layout)


def test_bfloat16_special_numbers(layout, isa):
    """Infinities and NaN pass, what is between two bfloat16 goes to the even one."""
    numbers = torch.tensor(
        [float("inf"), -float("inf"), float("nan"), 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, -0.0, 2.0**-130]
    )
    x = torch.ones(17, 1, 1, 1).bfloat16()
    pattern = Pattern.from_mask(torch.ones(len(numbers), 1, 1, 1, dtype=torch.bool))
    y = masked_conv2d(x, numbers, None, pattern, layout=layout)
    assert torch.equal(y.flatten(1).nan_to_num(nan=7.0), numbers.bfloat16().expand(17, -1).nan_to_num(nan=7.0))
    assert y[:, 2].isnan().all()


def test_bfloat16_is_never_widened_whole(layout):
    x, values, bias, pattern, geometry = make("3x3")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t.dtype, t.numel())) or t, lambda t: t):
        masked_conv2d(x.bfloat16(), values.requires_grad_(), bias, pattern, *geometry, layout=layout)
    assert (torch.bfloat16, x.numel()) in saved
    assert (torch.float32, x.numel()) not in saved


@pytest.mark.parametrize("size", [(1, 9, 7), (3, 8, 8), (3, 5, 17)], ids=["1 of 9x7", "3 of 8x8", "3 of 5x17"])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_small_batches(size, kernel, stride, padding, layout, poison):
    n, h, w = size
    check(*make((n, 3, h, w, 4, (kernel, kernel), (stride, stride), (padding, padding), (1, 1)), 0.4), layout=layout)


@pytest.mark.parametrize("shape", [(3, 40, 56, 56), (1, 24, 60, 33)], ids=["bands", "bands of one image"])
@pytest.mark.parametrize("stride", [1, 2])
def test_bands(shape, stride, threads, poison):
    """Images whose planes exceed a thread's share of L2 run in bands of rows."""
    n, c, h, w = shape
    geometry = ((3, 3), (stride, stride), (1, 1), (1, 1))
    check(*make((n, c, h, w, 3, *geometry), 0.05), layout="pixels")


def test_many_entries(threads):
    """More weight gradient sums than a thread holds from image to image."""
    check(*make((2, 64, 5, 5, 70, (3, 3), (1, 1), (1, 1), (1, 1)), 0.9), layout="pixels")


def test_layout_by_rule_and_by_name():
    cases = {"tiles": [((128, 64, 8, 8), (8, 8)), ((32, 16, 32, 32), (16, 16)), ((30, 9, 8, 8), (8, 8))]}
    cases["pixels"] = [((4, 64, 8, 8), (8, 8)), ((17, 64, 8, 8), (8, 8)), ((128, 16, 32, 32), (32, 32))]
    for layout, shapes in cases.items():
        assert [default_layout(size, output) for size, output in shapes] == [layout] * len(shapes)
    x, values, bias, pattern, geometry = make("one sample")
    results = {name: masked_conv2d(x, values, bias, pattern, *geometry, layout=name) for name in (None, "pixels")}
    assert torch.equal(results[None], results["pixels"])
    with pytest.raises(ValueError, match="unknown layout 'rows'; known: tiles, pixels"):
        masked_conv2d(x, values, bias, pattern, *geometry, layout="rows")


def test_backend_by_name():
    x, values, bias, pattern, geometry = make("3x3")
    masked_conv2d(x, values, bias, pattern, *geometry, backend="reference")
    assert backend_of("masked_conv2d") == "reference"
    masked_conv2d(x, values, bias, pattern, *geometry)
    assert backend_of("masked_conv2d") == "cpu"
    with pytest.raises(ValueError, match="takes float32 and bfloat16"):
        masked_conv2d(x.double(), values, bias, pattern, *geometry, backend="cpu")


@pytest.mark.parametrize("shape", ["3x3", "stride 3x2"])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_opcheck(shape, memory, dtype, layout):
    x, values, bias, pattern, geometry = make(shape)
    pixels = layout == "pixels"
    args = [x.to(dtype, memory_format=memory).requires_grad_(), values.requires_grad_(), bias.requires_grad_()]
    forward = (*args, *pattern.tensors, pattern.shape[2:], *geometry, pixels)
    torch.library.opcheck(torch.ops.pysparse_ticket.masked_conv2d, forward)
    y = torch.ops.pysparse_ticket.masked_conv2d(*forward)
    geometry = (x.shape, pattern.shape[2:], *geometry, pixels, memory is torch.channels_last, True, True)
    torch.library.opcheck(
        torch.ops.pysparse_ticket.masked_conv2d_backward,
        (y.detach(), args[0].detach(), values.detach(), *pattern.tensors, *geometry),
    )


@pytest.mark.parametrize("layout", ["tiles", "pixels", None])
def test_compiles_in_one_graph(layout):
    x, values, bias, pattern, geometry = make("3x3")
    values.requires_grad_()

    def f(x, values):
        return masked_conv2d(x.relu(), values, bias, pattern, *geometry, layout=layout).square().mean()

    want = torch.autograd.grad(f(x, values), values)[0]
    got = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(x, values), values)[0]
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 8, 8)}, r"input \[N, 5, H, W\]"),
        ({"values": torch.zeros(3)}, "weights, but values has shape"),
        ({"bias": torch.zeros(3)}, r"bias \[7\]"),
        ({"x": torch.zeros(2, 5, 1, 1), "padding": (0, 0)}, "smaller than the kernel"),
        ({"stride": (0, 1)}, "must be positive"),
        ({"pattern": Pattern.from_mask(torch.ones(3, 4, dtype=torch.bool))}, r"mask \[O, C, kh, kw\]"),
    ],
    ids=["channels", "values", "bias", "small image", "stride", "linear pattern"],
)
def test_bad_input(change, message):
    x, values, bias, pattern, (stride, padding, dilation) = make("3x3")
    args = {
        "x": x,
        "values": values,
        "bias": bias,
        "pattern": pattern,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
    }
    with pytest.raises(ValueError, match=message):
        masked_conv2d(**{**args, **change})
