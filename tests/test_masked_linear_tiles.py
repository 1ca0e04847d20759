"""masked_linear_tiles against F.linear on the masked weight in float64: on the GPU, or under triton's interpreter."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pysparse_ticket.nn.masked_linear import MaskedLinear
from pysparse_ticket.ops.library import backend_of, kernel_module, why_missing
from pysparse_ticket.ops.masked_linear_tiles import masked_linear_tiles
from pysparse_ticket.ops.tile_mask import RATES, TileMask, choose_tile

OP = torch.ops.pysparse_ticket
HALF = (torch.bfloat16, torch.float16)
# what one rounding of the result costs; float32 sums of products of 8 or 11 bits are exact beside that
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}
descriptors = pytest.mark.parametrize("described", [True, False], ids=["descriptors", "pointers"], indirect=True)


@pytest.fixture
def described(request, monkeypatch):
    launch = kernel_module("tile_launch")
    if request.param and not launch.INTERPRETED and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("descriptors need compute capability 9.0")
    monkeypatch.setattr(launch, "DESCRIPTORS", request.param)


def some_mask(out_features, in_features, tile, gen):
    """Empty, full and partial tiles, a dead row of tiles and a dead column."""
    bn, bk = tile
    kind = torch.randint(0, 3, (-(-out_features // bn), -(-in_features // bk)), generator=gen)
    kind[len(kind) // 2] = 0
    kind[:, kind.shape[1] // 2] = 0
    kind[0, 0], kind[-1, -1] = 2, 1
    kind = kind.repeat_interleave(bn, 0).repeat_interleave(bk, 1)[:out_features, :in_features]
    return (kind == 2) | ((kind == 1) & (torch.rand(kind.shape, generator=gen) < 0.4))


def case(device, tokens, tile, mask=None, dtype=torch.float32, shape=None, seed=0):
    """x, values that hold something under the mask too, bias, tiles, gradient of y"""
    gen = torch.Generator().manual_seed(seed)
    out_features, in_features = shape or (2 * tile[0] + 8, 3 * tile[1] + 16)
    if mask is None:
        mask = some_mask(out_features, in_features, tile, gen)
    elif not isinstance(mask, torch.Tensor):
        mask = torch.rand(out_features, in_features, generator=gen) < mask
    tiles = TileMask.from_mask(mask.to(device), tile)
    x = torch.randn(tokens, in_features, generator=gen).to(device, dtype)
    values = torch.randn(tiles.tiles, *tile, generator=gen).to(device, dtype)
    bias = torch.randn(out_features, generator=gen).to(device, dtype)
    return x, values, bias, tiles, torch.randn(tokens, out_features, generator=gen).to(device, dtype)


def run(x, values, bias, tiles, grad, dtype=None, **how):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, values, bias)]
    y = masked_linear_tiles(*leaves, tiles, **how)
    return y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))


def expected(x, values, bias, tiles, grad, activation=None):
    leaves = [t.detach().double().cpu().requires_grad_() for t in (x, values, bias)]
    tiles = tiles.to("cpu")
    y = F.linear(leaves[0], tiles.scatter(leaves[1] * tiles.survivors()), leaves[2])
    y = y.relu() if activation == "relu" else F.gelu(y) if activation == "gelu" else y
    return y.detach(), *torch.autograd.grad(y, leaves, grad.double().cpu())


def check(actual, wanted, dtype, factor=2.0):
    for name, a, e in zip(("y", "dx", "dvalues", "dbias"), actual, wanted, strict=True):
        assert a.shape == e.shape and a.dtype == dtype, name
        if e.numel():
            deviation = (a.double().cpu() - e).abs().max().item()
            assert deviation <= factor * ROUNDING[dtype] * (e.abs().max().item() or 1.0), name


@descriptors
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("tile", RATES, ids=str)
def test_equals_the_dense_linear(gpu_or_interpreter, poison, described, tile, dtype):
    inputs = case(gpu_or_interpreter, 70, tile, dtype=dtype)
    tiles = inputs[3]
    assert 0 < tiles.empty < 1 and (tiles.partial >= 0).any() and (tiles.partial < 0).any()
    check(run(*inputs, backend="triton"), expected(*inputs), dtype)
    assert backend_of("masked_linear_tiles") == "triton"


SHAPES = {
    "one token": (1, 0.5, (40, 50)),
    "no token": (0, 0.5, (40, 50)),
    "many tokens": (300, 0.02, (32, 64)),
    "zero mask": (33, 0.0, (40, 56)),
    "full mask": (33, 1.0, (40, 56)),
    "one output": (33, 0.5, (1, 70)),
    "one input": (33, 0.5, (70, 1)),
    "odd rows": (65, 0.3, (33, 47)),
    "mostly empty": (40, 0.002, (150, 70)),
}


@descriptors
@pytest.mark.parametrize("tile", [(16, 16), (64, 32)], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(gpu_or_interpreter, poison, described, shape, tile):
    tokens, density, size = shape
    inputs = case(gpu_or_interpreter, tokens, tile, density, torch.bfloat16, size)
    check(run(*inputs, backend="triton"), expected(*inputs), torch.bfloat16)


@descriptors
def test_tf32_where_torch_allows_it(gpu_or_interpreter, poison, described, monkeypatch):
    monkeypatch.setattr("pysparse_ticket.ops.masked_linear_tiles._precision", lambda: "tf32")
    inputs = case(gpu_or_interpreter, 70, (32, 32))
    check(
        run(*inputs, backend="triton"), expected(*inputs), torch.float32, 2.0**11
    )  # factors of 10 bits, 2 ** -9 in sum


def test_configurations_are_timed_once_and_remembered(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    tuning, configs = kernel_module("tile_tuning"), kernel_module("tile_configs")
    slow, fast = configs.Config(64, 4, 2), configs.Config(128, 8, 3)
    ran, timed, capturing = [], [], []

    def bench(run, **_):
        run()
        timed.append(ran[-1])
        return 1.0 if ran[-1] == fast else 2.0

    monkeypatch.setenv("PYSPARSE_TICKET_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning.triton.testing, "do_bench", bench)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_stored", None)

    def pick(tokens):
        tuning.pick("a GPU", ("matmul", True, tokens), [slow, fast], ran.append)
        return ran[-1]

    capturing.append(True)
    assert pick(1000) == slow and not timed  # the first one, and the choice stays open
    capturing.clear()
    assert pick(1000) == fast and timed == [slow, fast]
    assert pick(1100) == fast and len(timed) == 2  # the same octave
    assert pick(4000) == fast and len(timed) == 4
    tuning._chosen.clear()
    tuning._stored = None  # another process
    assert pick(1000) == fast and len(timed) == 4


@descriptors
def test_tiles_of_a_row_in_groups(gpu_or_interpreter, poison, described):
    mask = torch.ones(64, 7 * 64, dtype=torch.bool)  # 7 = 4 + 3
    mask[3, 5] = False
    inputs = case(gpu_or_interpreter, 40, (64, 64), mask, torch.float16, mask.shape)
    check(run(*inputs, backend="triton"), expected(*inputs), torch.float16)


@descriptors
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_activations(gpu_or_interpreter, poison, described, activation):
    inputs = case(gpu_or_interpreter, 70, (32, 32))
    check(run(*inputs, backend="triton", activation=activation), expected(*inputs, activation), torch.float32, 8.0)


def test_what_lies_under_the_mask_does_not_matter(gpu_or_interpreter):
    x, values, bias, tiles, grad = case(gpu_or_interpreter, 40, (16, 16))
    clean = values * tiles.survivors()
    poisoned = torch.where(tiles.survivors(), values, float("nan"))
    results = [
        run(x, v, bias, tiles, grad, backend="triton", clean=promise)
        for v, promise in ((clean, False), (poisoned, False), (clean, True))
    ]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert (results[0][2][~tiles.survivors()] == 0).all() and results[0][2].any()


@pytest.mark.parametrize("tile", [(128, 64), (32, 32)], ids=str)
def test_the_weight_gradient_is_split_over_tokens(gpu_or_interpreter, poison, tile, monkeypatch):
    launch, splits = kernel_module("tile_launch"), []
    whole = launch.split_tokens

    def watched(*args):
        splits.append(whole(*args))
        return splits[-1]

    monkeypatch.setattr(launch, "split_tokens", watched)
    many = launch.Device(64, launch.device_of(torch.device(gpu_or_interpreter)).descriptors, "interpreter")
    monkeypatch.setattr(launch, "device_of", lambda device: many)
    inputs = case(gpu_or_interpreter, 64 * 34 + 5, tile, 0.3, torch.bfloat16, tile)
    once = run(*inputs, backend="triton")
    check(once, expected(*inputs), torch.bfloat16)
    assert splits[-1][0] > 1 and splits[-1][1] % 64 == 0
    if gpu_or_interpreter == "cuda":
        assert all(torch.equal(a, b) for a, b in zip(run(*inputs, backend="triton"), once, strict=True))


def test_splits_cover_the_tokens():
    split = kernel_module("tile_launch").split_tokens
    for tokens, items, programs, block in itertools.product((1, 64, 5000, 8192), (1, 50, 300), (132, 264), (32, 64)):
        count, chunk = split(tokens, items, programs, block)
        assert (count - 1) * chunk < tokens <= count * chunk and (count == 1 or chunk % block == 0)
    assert split(8192, 20, 132, 64)[0] >= 6 and split(8192, 1000, 132, 64)[0] == 1


def test_rows_are_visited_once_whatever_the_spin():
    spin = kernel_module("tile_launch")._spin
    for rows in (1, 2, 3, 12, 32, 33, 132):
        assert {(c + 5 * spin(rows)) % rows for c in range(rows)} == set(range(rows))
        assert rows < 3 or 0 < spin(rows) < rows


def test_strided_inputs(gpu_or_interpreter):
    x, values, bias, tiles, grad = case(gpu_or_interpreter, 40, (16, 16), dtype=torch.bfloat16)
    wanted = run(x, values, bias, tiles, grad, backend="triton")
    wide = torch.stack([values, values], -1)[..., 0]
    for stretched in (x.t().contiguous().t(), torch.cat([x, x], 1)[:, : x.shape[1]], x[:, None].expand(-1, 1, -1)):
        y, dx, dv, db = run(stretched, wide, bias, tiles, grad.view(*stretched.shape[:-1], -1), backend="triton")
        results = y.view_as(wanted[0]), dx.reshape(x.shape), dv, db
        assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_each_gradient_alone(gpu_or_interpreter, needed):
    x, values, bias, tiles, grad = case(gpu_or_interpreter, 40, (16, 16))
    together = run(x, values, bias, tiles, grad, backend="triton")[1:]
    leaves = [t.requires_grad_(n) for t, n in zip((x, values, bias), needed, strict=True)]
    masked_linear_tiles(*leaves, tiles, backend="triton").backward(grad)
    for leaf, wanted, need in zip(leaves, together, needed, strict=True):
        assert torch.allclose(leaf.grad, wanted, rtol=1e-5, atol=1e-5) if need else leaf.grad is None


def test_autocast_leaves_the_values_in_float32(gpu_or_interpreter):
    x, values, bias, tiles, _ = case(gpu_or_interpreter, 40, (16, 16))
    values.requires_grad_()
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        y = masked_linear_tiles(x, values, bias, tiles, backend="triton")
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and values.grad.dtype == torch.float32
    assert torch.equal(y, masked_linear_tiles(x.bfloat16(), values, bias, tiles, backend="triton"))


def test_opcheck(gpu_or_interpreter):
    x, values, bias, tiles, grad = case(gpu_or_interpreter, 9, (16, 16), shape=(20, 18))
    leaves = [t.requires_grad_() for t in (x, values, bias)]
    facts = list(tiles.tensors), tiles.shape, tiles.tile, "gelu"
    torch.library.opcheck(OP.masked_linear_tiles.default, (*leaves, *facts, False, True))
    _, z, w = OP.masked_linear_tiles(*leaves, *facts, False, True)
    for need in ((True, True, True), (True, False, False), (False, False, True)):
        arguments = (grad, x.detach(), w.detach(), z.detach(), *facts, torch.float32, *need)
        torch.library.opcheck(OP.masked_linear_tiles_backward.default, arguments)


def test_gradcheck_of_the_reference():
    x, values, bias, tiles, _ = case("cpu", 3, (16, 16), shape=(20, 18))
    leaves = [t.double().requires_grad_() for t in (x, values, bias)]
    for activation in (None, "gelu"):
        assert torch.autograd.gradcheck(lambda *a, act=activation: masked_linear_tiles(*a, tiles, act), leaves)
    assert backend_of("masked_linear_tiles") == "reference"


def model(device, fmt="blocks"):
    torch.manual_seed(0)
    layers = nn.Linear(48, 40), nn.Linear(40, 32)
    gen = torch.Generator().manual_seed(1)
    masks = [some_mask(*layer.weight.shape, (16, 16), gen) for layer in layers]
    masked = [MaskedLinear.from_dense(layer, mask) for layer, mask in zip(layers, masks, strict=True)]
    for layer in masked:
        layer.tile = (16, 16)
        layer.set_format(fmt)
    return nn.Sequential(masked[0], nn.GELU(), masked[1]).to(device)


@pytest.fixture
def on_triton(gpu_or_interpreter):
    from pysparse_ticket.ops.library import use_backend

    with use_backend("triton"):
        yield gpu_or_interpreter


def test_compiles_without_a_graph_break(on_triton):
    net, x = model(on_triton), torch.randn(33, 48, device=on_triton)
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    results = []
    for module in (net, compiled):
        module(x).square().sum().backward()
        results.append([p.grad for p in module.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    ],
    ids=["sgd", "adamw"],
)
def test_training_keeps_pruned_weights_at_zero(on_triton, make_optimizer):
    net, x = model(on_triton), torch.randn(33, 48, device=on_triton)
    before = net[0].weight.detach().clone()
    optimizer = make_optimizer(net.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    after, mask = net[0].weight.detach(), net[0].mask
    assert (after[~mask] == 0).all() and (after[mask] != before[mask]).all()


def test_the_module_equals_its_other_formats(on_triton):
    net, x = model(on_triton), torch.randn(33, 48, device=on_triton)
    dense = copy.deepcopy(net)
    for layer in (dense[0], dense[2]):
        layer.set_format("dense")
    assert net[0].values.shape == (net[0].layout.tiles, 16, 16)
    assert torch.allclose(net(x), dense(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(net[0].weight, dense[0].weight)
    dense.load_state_dict(net.state_dict())
    twin = model(on_triton)
    for p in twin.parameters():
        nn.init.normal_(p)
    twin.load_state_dict(dense.state_dict())
    assert torch.equal(twin(x), net(x))


def test_the_mask_may_change(on_triton):
    layer, x = model(on_triton)[0], torch.randn(33, 48, device=on_triton)
    gen = torch.Generator().manual_seed(5)
    mask = some_mask(40, 48, (16, 16), gen).to(on_triton)
    weight = layer.weight.detach()
    layer(x).sum().backward()
    layer.set_mask(mask)
    assert torch.equal(layer.mask, mask) and torch.equal(layer.weight, weight * mask)
    assert torch.allclose(layer(x), F.linear(x, weight * mask, layer.bias), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("columns", "blocks_take", "fmt", "why"),
    [
        (64, 1.0, "blocks", "fastest here; 75% of the 128 x 64 tiles are empty"),
        (64, 4.0, "dense", "blocks takes 2.00 of it; 75% of the 128 x 64 tiles are empty"),
        (256, 1.0, "dense", "0% of the 128 x 128 tiles are empty"),
    ],
)
def test_the_plan_on_a_gpu_says_which_and_why(monkeypatch, tmp_path, columns, blocks_take, fmt, why):
    import pysparse_ticket as pst
    from pysparse_ticket.nn import choose

    monkeypatch.setenv("PYSPARSE_TICKET_CACHE", str(tmp_path))
    monkeypatch.setattr(MaskedLinear, "on_gpu", True)
    monkeypatch.setattr("pysparse_ticket.nn.masked.why_missing", lambda backend: None)
    times = dict.fromkeys(("packed", "other packed"), 9.0) | {"plain": 2.0, "dense": 2.0, "other blocks": 3.0}
    monkeypatch.setattr(choose, "race", lambda *_: times | {"blocks": blocks_take})
    monkeypatch.setattr(choose, "race_steps", lambda arms, x: dict.fromkeys(arms, 0.5) | {"dense": 1.0})
    net, x = nn.Sequential(nn.Linear(256, 128)), torch.randn(5, 256)
    mask = torch.rand(128, 256, generator=torch.Generator().manual_seed(0)) < 0.5
    if columns < 256:
        mask[:, columns:] = False
    ticket = pst.Ticket(masks={"0.weight": mask})
    row = pst.plan(pst.sparsify(net, ticket, sample=x)).layers[0]
    assert row.format == fmt and row.why.endswith(why)  # without a kernel for packed layers it says that first


def test_masks_are_cut_and_put_together():
    gen = torch.Generator().manual_seed(0)
    for tile, (out_features, in_features) in itertools.product(RATES, ((16, 16), (1, 200), (300, 129))):
        mask = some_mask(out_features, in_features, tile, gen)
        tiles, weight = TileMask.from_mask(mask, tile), torch.randn(out_features, in_features)
        assert torch.equal(tiles.scatter(tiles.gather(weight)), weight * mask)
        assert torch.equal(tiles.scatter(tiles.survivors().float()) != 0, mask)


def test_tiles_by_hand():
    mask = torch.zeros(48, 40, dtype=torch.bool)
    mask[16:32] = True
    mask[0, 17] = mask[15, 16] = True
    tiles = TileMask.from_mask(mask, (16, 16))
    assert tiles.row.tolist() == [1, 1, 1, 0] and tiles.col.tolist() == [0, 1, 2, 1]  # the longest row first
    assert tiles.partial.tolist() == [-1, -1, 0, 1]  # the last column of tiles reaches over the edge
    assert tiles.bits.tolist() == [[[0xFF]] * 16, [[2], *[[0]] * 14, [1]]]
    assert tiles.walk.tolist() == [0, 3, 4, 5, *[1, 0, 2], *[0, 1, 2, 3, 4], *[0, 1, -3, -2, -1]]
    assert tiles.t_walk.tolist() == [0, 2, 3, 4, *[1, 0, 2], *[1, 3, 0, 2], *[1, -1, -2, -2]]
    assert tiles.items.tolist() == [[1, 0, 3], [0, 3, 1], [1, 0, 0], [0, 0, 0], [2, 0, 0]]
    assert tiles.empty == 1 - 4 / 9


def test_the_size_of_tiles_follows_the_mask():
    gen = torch.Generator().manual_seed(0)
    for side in (128, 64, 32):
        blocks = torch.rand(1024 // side, 1024 // side, generator=gen) < 0.1
        assert choose_tile(blocks.repeat_interleave(side, 0).repeat_interleave(side, 1)) == (side, side)
    assert choose_tile(torch.rand(1024, 1024, generator=gen) < 0.1) == (128, 128)  # no tile is empty at any size


@pytest.mark.parametrize(
    ("mask", "tile", "message"),
    [
        (torch.ones(4, 4), None, "tiles are cut from a 2-D bool mask, not from torch.float32"),
        (torch.ones(4, 4, dtype=torch.bool), (24, 16), "a tile's sides are 16, 32, 64 or 128, not 24 x 16"),
        (torch.zeros(1, 1, dtype=torch.bool).expand(50_000, 50_000), None, "too large for 32-bit indices"),
    ],
)
def test_masks_that_cannot_be_cut_are_refused(mask, tile, message):
    with pytest.raises(ValueError, match=message):
        TileMask.from_mask(mask, tile)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, v, b: (x[:, :3], v, b), r"x of shape \(4, 3\) does not end in the mask's 64 input features"),
        (lambda x, v, b: (x, v[1:], b), "are not the mask's"),
        (lambda x, v, b: (x, v, b[:2]), r"bias of shape \(2,\) does not match the mask's 40 output features"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    x, values, bias, tiles, _ = case("cpu", 4, (16, 16))
    with pytest.raises(ValueError, match=message):
        masked_linear_tiles(*change(x, values, bias), tiles)


def test_backends_without_a_kernel_are_refused():
    x, values, bias, tiles, _ = case("cpu", 4, (16, 16))
    with pytest.raises(RuntimeError, match="masked_linear_tiles has no cpu backend, only reference, triton"):
        masked_linear_tiles(x, values, bias, tiles, backend="cpu")


def test_a_machine_without_a_gpu_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA GPU is visible" in why_missing("triton") and "TRITON_INTERPRET=1" in why_missing("triton")


def test_nothing_imports_triton_for_the_cpu():
    code = (
        "import sys, torch, pysparse_ticket as pst; from pysparse_ticket.nn import masked_linear as m;"
        "m.MaskedLinear.from_dense(torch.nn.Linear(8, 8), torch.ones(8, 8) > 0)(torch.ones(2, 8)).sum().backward();"
        "assert not any(n == 'triton' or '.kernels' in n for n in sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
