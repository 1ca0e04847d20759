"""masked_conv2d_tiles against F.conv2d on the masked weight in float64: on the GPU, or under triton's interpreter."""

import copy

import pytest
import torch
import torch.nn.functional as F
from convolutions import GEOMETRIES, TOLERANCE, relative
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.nn import choose
from pysparse_ticket.nn.masked_conv2d import MaskedConv2d
from pysparse_ticket.ops.conv_tiles import ConvTiles
from pysparse_ticket.ops.library import backend_of, kernel_module, use_backend
from pysparse_ticket.ops.masked_conv2d_tiles import masked_conv2d_tiles
from pysparse_ticket.ops.tile_mask import RATES

OP = torch.ops.pysparse_ticket


def some_mask(shape, tile, gen):
    """Empty, full and partial tiles, a dead block of output channels, one of input channels and a dead tap."""
    (o, c, kh, kw), (bn, bk) = shape, tile
    kind = torch.randint(0, 3, (-(-o // bn), -(-c // bk), kh, kw), generator=gen)
    kind[-1, -1, 0, 0], kind[0, 0, -1, -1] = 1, 2
    if len(kind) > 1:
        kind[1] = 0
    if kind.shape[1] > 1:
        kind[:, 1] = 0
    if kw > 1:
        kind[:, :, :, 1] = 0
    kind = kind.repeat_interleave(bn, 0).repeat_interleave(bk, 1)[:o, :c]
    return (kind == 2) | ((kind == 1) & (torch.rand(shape, generator=gen) < 0.4))


def case(device, name="3x3", tile=(16, 16), dtype=torch.float32, channels=None, mask=None, seed=0):
    """x, values that hold something under the mask too, bias, tiles"""
    gen = torch.Generator().manual_seed(seed)
    kernel, stride, padding, dilation, (n, h, w) = GEOMETRIES[name]
    inputs, outputs = channels or (2 * tile[1] + 5, 2 * tile[0] + 3)
    shape = (outputs, inputs, *kernel)
    if mask is None:
        mask = some_mask(shape, tile, gen)
    elif not isinstance(mask, torch.Tensor):
        mask = torch.rand(shape, generator=gen) < mask
    tiles = ConvTiles.from_mask(mask.to(device), tile, stride, padding, dilation)
    made = torch.randn(n, inputs, h, w, generator=gen), torch.randn(tiles.tiles, *tile, generator=gen)
    x, values, bias = (t.to(device, dtype) for t in (*made, torch.randn(outputs, generator=gen)))
    return x.contiguous(memory_format=torch.channels_last), values, bias, tiles


def run(x, values, bias, tiles, grad=None, backend="triton", **how):
    leaves = [t.detach().requires_grad_() for t in (x, values, bias)]
    y = masked_conv2d_tiles(*leaves, tiles, backend=backend, **how)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y) if grad is None else grad
    return y.detach(), *torch.autograd.grad(y, leaves, grad), grad


def check(x, values, bias, tiles, **how):
    dtype = x.dtype
    *actual, grad = run(x, values, bias, tiles, **how)
    leaves = [t.detach().double().cpu().requires_grad_() for t in (x, values, bias)]
    here = tiles.to("cpu")
    weight = here.scatter(leaves[1] * here.survivors())
    y = F.conv2d(leaves[0], weight, leaves[2], tiles.stride, tiles.padding, tiles.dilation)
    wanted = y.detach(), *torch.autograd.grad(y, leaves, grad.double().cpu())
    for name, a, e in zip(("y", "dx", "dvalues", "dbias"), actual, wanted, strict=True):
        assert a.shape == e.shape and a.dtype == dtype, name
        assert relative(a.cpu(), e) < TOLERANCE[dtype] if e.any() else not a.any() and not a.isnan().any(), name
    assert actual[0].is_contiguous(memory_format=torch.channels_last)


HALF = [(name, dtype) for name in ("3x3", "1x1 stride 2") for dtype in (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in GEOMETRIES), *HALF],
    ids=lambda one: str(one).removeprefix("torch.").replace(" ", "-"),
)
def test_equals_the_masked_convolution(gpu_or_interpreter, poison, name, dtype):
    inputs = case(gpu_or_interpreter, name, dtype=dtype)
    tiles = inputs[3]
    assert 0 < tiles.empty < 1 and (tiles.matrix.partial >= 0).any() and (tiles.matrix.partial < 0).any()
    check(*inputs)
    assert backend_of("masked_conv2d_tiles") == "triton"


@pytest.mark.parametrize("tile", [(128, 128), (64, 64), (32, 32), (32, 128), (64, 16)], ids=str)
def test_every_size_of_tile(gpu_or_interpreter, poison, tile):
    bn, bk = tile
    check(*case(gpu_or_interpreter, "3x3 stride 2", tile, torch.bfloat16, channels=(bk + 3, bn + 9)))


MASKS = {
    "zero mask": (0.0, (20, 24)),
    "full mask": (1.0, (20, 24)),
    "one input channel": (0.5, (1, 20)),
    "one output channel": (0.5, (20, 1)),
    "mostly empty": (0.002, (40, 50)),
    "tiles in groups": (1.0, (3 * 16, 16)),
}


@pytest.mark.parametrize(("density", "channels"), MASKS.values(), ids=MASKS)
def test_masks(gpu_or_interpreter, poison, density, channels):
    check(*case(gpu_or_interpreter, "3x3 stride 2", (16, 16), channels=channels, mask=density))


@pytest.mark.parametrize("name", ["3x3 stride 2", "3x3"])
def test_a_tap_alone(gpu_or_interpreter, poison, name):
    """Phases of the stride that meet no tile still get their zeros."""
    mask = torch.zeros(20, 20, 3, 3, dtype=torch.bool)
    mask[:, :, 2, 0] = True
    check(*case(gpu_or_interpreter, name, channels=(20, 20), mask=mask))


def test_the_weight_gradient_is_split_over_pixels(gpu_or_interpreter, poison, monkeypatch):
    kernels, splits = kernel_module("masked_conv2d_tiles"), []
    many = kernel_module("parts").Device(4, False, "interpreter")
    whole = kernels.split_tokens
    monkeypatch.setattr(kernels, "split_tokens", lambda *args: splits.append(whole(*args)) or splits[-1])
    monkeypatch.setattr(kernels, "device_of", lambda device: many)
    x, values, bias, tiles = case(gpu_or_interpreter, "1x1", (16, 16), channels=(16, 16), mask=0.3)
    x = torch.randn(19, 16, 11, 11, generator=torch.Generator().manual_seed(1)).to(x)
    check(x, values, bias, tiles)
    assert splits[0][0] > 1


def within(t, shape, where):
    """The same images as part of channels_last ones that are NaN elsewhere."""
    wide = torch.full(shape, torch.nan, device=t.device).contiguous(memory_format=torch.channels_last)
    wide[where] = t
    return wide[where]


def test_reads_any_strides(gpu_or_interpreter, poison):
    x, values, bias, tiles = case(gpu_or_interpreter, "3x3 stride 2", channels=(37, 19))
    *wanted, grad = run(x, values, bias, tiles)
    (n, c, h, w), o = x.shape, bias.numel()
    stretched = torch.stack([values, values], -1)[..., 0]
    every = slice(None)
    for one, of_y in (
        (x.contiguous(), grad.contiguous()),
        (within(x, (n, 2 * c, h, w), (every, slice(None, None, 2))), grad),
        (within(x, (n, c, h + 1, w + 2), (every, every, slice(1, None), slice(2, None))), grad),
        # behind the last channel, in reach of the last tile
        (within(x, (n, c + 3, h, w), (every, slice(c))), within(grad, (n, o + 3, *grad.shape[2:]), (every, slice(o)))),
    ):
        *got, dbias, _ = run(one, stretched, bias, tiles, of_y)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted[:3], strict=True))
        assert relative(dbias, wanted[3]) < 2e-6


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_each_gradient_alone(gpu_or_interpreter, needed):
    x, values, bias, tiles = case(gpu_or_interpreter)
    _, *together, grad = run(x, values, bias, tiles)
    leaves = [t.requires_grad_(n) for t, n in zip((x, values, bias), needed, strict=True)]
    masked_conv2d_tiles(*leaves, tiles, backend="triton").backward(grad)
    for leaf, wanted, need in zip(leaves, together, needed, strict=True):
        assert torch.equal(leaf.grad, wanted) if need else leaf.grad is None


def test_empty_batch(gpu_or_interpreter):
    x, values, bias, tiles = case(gpu_or_interpreter)
    y, dx, dvalues, dbias, _ = run(x[:0], values, bias, tiles)
    assert y.shape == (0, bias.numel(), 7, 9) and dx.shape == (0, *x.shape[1:])
    assert not dvalues.any() and not dbias.any()


def test_what_lies_under_the_mask_does_not_matter(gpu_or_interpreter):
    x, values, bias, tiles = case(gpu_or_interpreter, "1x1")
    clean = values * tiles.survivors()
    poisoned = torch.where(tiles.survivors(), values, float("nan"))
    results = [
        run(x, v, bias, tiles, clean=promise) for v, promise in ((clean, False), (poisoned, False), (clean, True))
    ]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert (results[0][2][~tiles.survivors()] == 0).all() and results[0][2].any()


def test_skipped_tiles_meet_no_input(gpu_or_interpreter):
    mask = torch.zeros(16, 32, 3, 3, dtype=torch.bool)
    mask[:, :16] = True
    x, values, bias, tiles = case(gpu_or_interpreter, channels=(32, 16), mask=mask)
    x[:, 16:] = torch.nan
    y, *grads, _ = run(x, values, bias, tiles)
    assert not y.isnan().any() and not grads[1].isnan().any() and not grads[0][:, 16:].any()


def test_tf32_where_torch_allows_it(gpu_or_interpreter, poison, monkeypatch):
    kernels = kernel_module("masked_conv2d_tiles")
    monkeypatch.setattr(kernels, "conv_precision", lambda dtype: "tf32")
    monkeypatch.setitem(TOLERANCE, torch.float32, 2**-9)  # factors of 10 bits
    check(*case(gpu_or_interpreter, "3x3 stride 2", (32, 32)))


def test_autocast_leaves_the_values_in_float32(gpu_or_interpreter):
    x, values, bias, tiles = case(gpu_or_interpreter, "1x1")
    values.requires_grad_()
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        y = masked_conv2d_tiles(x, values, bias, tiles, backend="triton")
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and values.grad.dtype == torch.float32 and values.grad.any()
    assert torch.equal(y, masked_conv2d_tiles(x.bfloat16(), values, bias, tiles, backend="triton"))


def test_opcheck(gpu_or_interpreter):
    x, values, bias, tiles = case(gpu_or_interpreter, "1x1", channels=(20, 18))
    leaves = [t.requires_grad_() for t in (x, values, bias)]
    facts = list(tiles.tensors), tiles.shape, tiles.tile, tiles.stride, tiles.padding, tiles.dilation
    torch.library.opcheck(OP.masked_conv2d_tiles.default, (*leaves, *facts, False, True))
    y, w = OP.masked_conv2d_tiles(*leaves, *facts, False, True)
    for need in ((True, True), (True, False), (False, True)):
        arguments = (y.detach(), x.detach(), w.detach(), *facts, torch.float32, *need)
        torch.library.opcheck(OP.masked_conv2d_tiles_backward.default, arguments)


def test_gradcheck_of_the_reference():
    x, values, bias, tiles = case("cpu", "3x3 stride 2", channels=(3, 4))
    leaves = [t.double().requires_grad_() for t in (x[:1, :, :4, :4], values, bias)]
    assert torch.autograd.gradcheck(lambda *a: masked_conv2d_tiles(*a, tiles), leaves, fast_mode=True)
    assert backend_of("masked_conv2d_tiles") == "reference"


# --- tiles


@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (128, 64)], ids=str)
def test_masks_are_cut_and_put_together(tile):
    gen = torch.Generator().manual_seed(0)
    for shape in ((16, 16, 3, 3), (1, 200, 1, 1), (130, 37, 2, 3)):
        mask = some_mask(shape, tile, gen)
        tiles, weight = ConvTiles.from_mask(mask, tile), torch.randn(shape)
        assert torch.equal(tiles.scatter(tiles.gather(weight)), weight * mask)
        assert torch.equal(tiles.scatter(tiles.survivors().float()) != 0, mask)
        assert torch.equal(tiles.cut(mask).walk, tiles.walk)


def test_tiles_by_hand():
    mask = torch.zeros(32, 20, 1, 3, dtype=torch.bool)
    mask[16:, :, 0, 2] = True  # both blocks of input channels, the second of them with 4 channels
    mask[3, 17, 0, 0] = True
    tiles = ConvTiles.from_mask(mask, (16, 16), (1, 2), (0, 1), (1, 1))
    assert tiles.matrix.row.tolist() == [1, 1, 0] and tiles.matrix.col.tolist() == [4, 5, 1]
    assert tiles.matrix.partial.tolist() == [-1, 0, 1] and tiles.empty == 1 - 3 / 12
    # two tiles for output channels 16.., one for 0..; taps 2 and 0 lie one to the right and one to the left
    steps = [*[0, 0, 0, 1], *[1, 1, 0, 1], *[2, 1, 0, -1]]
    assert tiles.walk.tolist() == [0, 2, 3, *[1, 0, 0], *[0, 0, 0], *steps, *[0] * 4]
    # pixels of odd columns alone are met: by tap 2 from the output of column (w + 1 - 2) / 2, by tap 0 from (w + 1) / 2
    outs = [*[1, 0, 1], *[0, 0, 1], *[0, 0, 0], *[1, 0, 0]]
    steps = [*[1, 1, 0, 0], *[2, 0, 0, 1], *[0, 1, 0, 0]]
    assert tiles.t_walk.tolist() == [0, 2, 3, 3, 3, *outs, *steps, *[0] * 4]


def test_the_size_of_tiles_follows_the_mask():
    gen = torch.Generator().manual_seed(0)
    for side in (128, 64, 32):
        kept = torch.rand(256 // side, 256 // side, 3, 3, generator=gen) < 0.1
        mask = kept.repeat_interleave(side, 0).repeat_interleave(side, 1)
        assert ConvTiles.from_mask(mask).tile == (side, side)
    assert ConvTiles.from_mask(torch.ones(16, 16, 3, 3, dtype=torch.bool)).tile == (16, 16)


def test_time_is_over_the_dense_one_of_as_many_channels():
    whole = torch.ones(256, 256, 3, 3, dtype=torch.bool)
    assert ConvTiles.from_mask(whole).time == pytest.approx(1 / max(RATES.values()))
    assert ConvTiles.from_mask(whole[:16, :16]).time == pytest.approx(1 / max(RATES.values()))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 4, 1, 1), "tiles are cut from a 4-D bool mask, not from torch.float32"),
        (torch.ones(4, 4, dtype=torch.bool), r"not from torch.bool of shape \(4, 4\)"),
    ],
)
def test_masks_that_cannot_be_cut_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        ConvTiles.from_mask(mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, v, b: (x[:, :3], v, b), "is not images of the mask's 37 channels"),
        (lambda x, v, b: (x, v[1:], b), "are not the mask's"),
        (lambda x, v, b: (x, v, b[:2]), r"bias of shape \(2,\) does not match the mask's 35 output channels"),
        (lambda x, v, b: (x[:, :, :0], v, b), "an image of 0x9 is smaller than the kernel"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    x, values, bias, tiles = case("cpu")
    with pytest.raises(ValueError, match=message):
        masked_conv2d_tiles(*change(x, values, bias), tiles)


# --- the module


@pytest.fixture
def on_triton(gpu_or_interpreter):
    with use_backend("triton"):
        yield gpu_or_interpreter


def layer(device, name="3x3 stride 2", fmt="blocks", tile=(16, 16)):
    torch.manual_seed(0)
    kernel, stride, padding, dilation, _ = GEOMETRIES[name]
    conv = nn.Conv2d(20, 24, kernel, stride, padding, dilation)
    masked = MaskedConv2d.from_dense(conv, some_mask(conv.weight.shape, (16, 16), torch.Generator().manual_seed(1)))
    masked.tile = tile
    masked.set_format(fmt)
    return masked.to(device)


@pytest.mark.parametrize("name", ["3x3 stride 2", "3x3 dilation 2"])
def test_the_module_equals_its_other_formats(on_triton, name):
    masked, dense = layer(on_triton, name), layer(on_triton, name, "dense")
    x = torch.randn(2, 20, 8, 7, device=on_triton)
    assert masked.values.shape == (masked.layout.tiles, 16, 16)
    grads = []
    for one in (masked, dense):
        one(x).square().sum().backward()
        grads.append(one.dense_like(one.weight_parameter.grad))
    assert relative(masked(x), dense(x)) < 2e-6 and relative(*grads) < 4e-6
    assert torch.equal(masked.weight, dense.weight)
    assert {k: v.shape for k, v in masked.state_dict().items()} == {k: v.shape for k, v in dense.state_dict().items()}
    twin = layer(on_triton, name)
    for p in twin.parameters():
        nn.init.normal_(p)
    twin.load_state_dict(dense.state_dict())
    assert torch.equal(twin(x), masked(x))
    masked.set_format("packed")
    assert masked.values.shape == (masked.nnz,) and torch.equal(masked.weight, dense.weight)


def test_the_mask_may_change(on_triton):
    masked, x = layer(on_triton), torch.randn(2, 20, 8, 7, device=on_triton)
    mask = some_mask(masked.mask.shape, (16, 16), torch.Generator().manual_seed(5)).to(on_triton)
    weight = masked.weight.detach()
    masked(x).sum().backward()
    masked.set_mask(mask)
    assert torch.equal(masked.mask, mask) and torch.equal(masked.weight, weight * mask)
    assert relative(masked(x), F.conv2d(x, weight * mask, masked.bias, 2, 1)) < 2e-6


def test_compiles_without_a_graph_break(on_triton):
    masked, x = layer(on_triton), torch.randn(2, 20, 8, 7, device=on_triton)
    compiled = torch.compile(copy.deepcopy(masked), fullgraph=True, backend="aot_eager")
    results = []
    for module in (masked, compiled):
        module(x).square().sum().backward()
        results.append([p.grad for p in module.parameters()])
    assert all(relative(a, b) < 2e-6 for a, b in zip(*results, strict=True))


def test_layouts_are_cut_once_a_mask(monkeypatch):
    cut, cuts = ConvTiles.from_mask, []
    monkeypatch.setattr(ConvTiles, "from_mask", lambda *a: cuts.append(a) or cut(*a))
    masked = layer("cpu")
    for fmt in ("dense", "blocks", "packed", "blocks"):
        masked.set_format(fmt)
    copy.deepcopy(masked).double().set_format("dense")
    assert len(cuts) == 1 and masked.layout is masked.tiles_of("blocks")
    masked.tile = (32, 16)
    assert masked.values.shape[1:] == masked.layout.tile == (16, 16)
    assert masked.tiles_of("blocks").tile == (32, 16) and len(cuts) == 2
    masked.set_mask(~masked.mask)
    assert masked.layout.tile == (16, 16) and len(cuts) == 3
    masked.set_format("packed")
    masked.set_mask(~masked.mask)
    masked.tile = (16, 16)
    masked.set_format("blocks")
    assert torch.equal(masked.layout.scatter(masked.layout.survivors().float()) != 0, masked.mask) and len(cuts) == 4
    assert masked.to("meta").layout.walk.is_meta


def test_grouped_convolutions_stay_dense():
    masked = MaskedConv2d.from_dense(nn.Conv2d(16, 16, 3, groups=2), torch.ones(16, 8, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="cannot be packed: groups=2"):
        masked.set_format("blocks")


@pytest.mark.parametrize(
    ("kept", "blocks_take", "fmt", "why"),
    [
        (32, 1.0, "blocks", "fastest here; 89% of the 32 x 32 tiles are empty"),
        (32, 4.0, "dense", "blocks takes 2.00 of it; 89% of the 32 x 32 tiles are empty"),
        (64, 1.0, "dense", "0% of the 64 x 64 tiles are empty"),
    ],
)
def test_the_plan_on_a_gpu_says_which_and_why(monkeypatch, tmp_path, kept, blocks_take, fmt, why):
    monkeypatch.setenv("PYSPARSE_TICKET_CACHE", str(tmp_path))
    monkeypatch.setattr(MaskedConv2d, "on_gpu", True)
    monkeypatch.setattr("pysparse_ticket.nn.masked.why_missing", lambda backend: None)
    times = dict.fromkeys(("packed", "other packed"), 9.0) | {"plain": 2.0, "dense": 2.0, "other blocks": 3.0}
    monkeypatch.setattr(choose, "race", lambda *_: times | {"blocks": blocks_take})
    monkeypatch.setattr(choose, "race_steps", lambda arms, x: dict.fromkeys(arms, 0.5) | {"dense": 1.0})
    mask = torch.rand(64, 64, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    if kept < 64:
        mask[:, :, 1:], mask[:, :, :, 1:] = False, False  # one tap
        mask[: 64 - kept] = False
        mask[:, : 64 - kept] = False
        mask[:32, :32, 0, 1] = mask[:32, 32:, 0, 1] = mask[32:, :32, 0, 1] = True
    ticket = pst.Ticket(masks={"0.weight": mask})
    sparse = pst.sparsify(nn.Sequential(nn.Conv2d(64, 64, 3)), ticket, sample=torch.randn(2, 64, 5, 5))
    row = pst.plan(sparse).layers[0]
    assert row.format == fmt and row.why.endswith(why)  # without a kernel for packed layers it says that first
