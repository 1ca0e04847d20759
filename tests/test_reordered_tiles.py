"""Format "reordered": a mask's rows and columns in an order that empties tiles, exact against F.linear."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from test_no_host_sync import NoCopyToHost, NoHostSync
from test_tile_order import blocks, uneven
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.nn import choose
from pysparse_ticket.nn.masked_linear import MaskedLinear
from pysparse_ticket.nn.swaps import carry
from pysparse_ticket.ops import reordered_tiles
from pysparse_ticket.ops.library import use_backend
from pysparse_ticket.ops.reordered_tiles import ReorderedTiles, reordered_linear_tiles
from pysparse_ticket.ops.tile_mask import TileMask

TILE = (16, 16)


def dead(mask, rows=(), cols=()):
    mask[list(rows)] = False
    mask[:, list(cols)] = False
    return mask


def bands(out, width):
    """Every fourth row and column alone holds weights: an order of both sides, and dead ones in between."""
    mask = torch.zeros(out, width, dtype=torch.bool)
    mask[1::4, 2::4] = True
    return mask


MASKS = {
    "shuffled blocks": blocks(4, 5, TILE, 0.4)[0],
    "dead rows and columns": bands(70, 90),
    "rows alone": bands(70, 90).any(1, keepdim=True).repeat(1, 40),
    "columns alone": bands(70, 90).any(0, keepdim=True).repeat(40, 1),
    "uneven": uneven(72, 100, 0.9, sigma=1.0),
}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
biases = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


def close(a, b, dtype=torch.float64):
    bound = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    a, b = a.detach().double(), b.detach().double()
    torch.testing.assert_close(a, b, rtol=bound, atol=bound * float(b.abs().max()))


def passes(function, leaves, grad):
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))


def compare(mask, bias, dtype, device="cpu", **how):
    layout = ReorderedTiles.from_mask(mask, TILE).to(device)
    assert not layout.order.identity and (layout.rows or layout.cols) and layout.empty > layout.empty_before
    gen = torch.Generator().manual_seed(1)
    x, weight, b, grad = (
        torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)
        for shape in ((3, 7, mask.shape[1]), mask.shape, mask.shape[:1], (3, 7, mask.shape[0]))
    )
    values = layout.gather(weight.to(device))
    inputs = [x.to(device), values] + ([b.to(device)] if bias else [])
    got = passes(lambda x, v, b=None: reordered_linear_tiles(x, v, b, layout, **how), inputs, grad.to(device))
    wide = [t.double() for t in ((x, weight * mask, b) if bias else (x, weight * mask))]
    want = list(passes(F.linear, wide, grad.double()))
    want[2] = want[2] * mask
    got = [t.cpu() for t in (got[0], got[1], layout.scatter(got[2]), *got[3:])]
    for a, e in zip(got, want, strict=True):
        assert a.dtype == dtype
        close(a, e, dtype)


@biases
@masks
def test_equals_the_masked_linear(mask, bias):
    compare(mask, bias, torch.float64)


@biases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["uneven", "dead rows and columns", "columns alone"])
def test_equals_it_on_the_kernels(gpu_or_interpreter, poison, name, dtype, bias):
    compare(MASKS[name], bias, dtype, gpu_or_interpreter, backend="triton", clean=True)


@masks
def test_the_layout_is_that_of_the_reordered_mask(mask):
    layout = ReorderedTiles.from_mask(mask, TILE)
    weight = torch.randn(mask.shape)
    values = layout.gather(weight)
    assert values.shape == (layout.tiles, *TILE) == layout.survivors().shape
    assert torch.equal(layout.scatter(values), weight * mask) and layout.scatter(values).is_contiguous()
    assert int(layout.survivors().sum()) == int(mask.sum())
    assert layout.empty == pytest.approx(layout.order.empty_after)
    assert layout.empty_before == pytest.approx(TileMask.from_mask(mask, TILE).empty)


def test_a_side_in_its_own_order_is_left_alone():
    rows, cols = (ReorderedTiles.from_mask(MASKS[f"{side} alone"], TILE) for side in ("rows", "columns"))
    assert rows.rows and rows.cols is None and cols.cols and cols.rows is None
    assert rows.rows.rest.tolist() == [i for i in range(70) if i % 4 != 1]
    assert rows.rows.index.tolist() == list(range(1, 70, 4))


def test_shuffled_blocks_come_back():
    mask, kept = blocks(8, 6, TILE, 0.3, seed=2)
    layout = ReorderedTiles.from_mask(mask, TILE)
    assert layout.tiles == kept and (layout.kept.partial == -1).all()


def test_what_dropped_columns_hold_meets_nothing():
    layout = ReorderedTiles.from_mask(MASKS["dead rows and columns"], TILE)
    x = torch.randn(5, 90)
    poisoned = x.clone()
    poisoned[:, 0::4] = float("nan")
    values, bias = torch.randn(layout.tiles, *TILE), torch.randn(70)
    y = reordered_linear_tiles(x, values, bias, layout)
    assert torch.equal(reordered_linear_tiles(poisoned, values, bias, layout), y)
    assert torch.equal(y[:, 0], bias[0].expand(5))


def test_the_size_of_least_estimated_time_is_taken():
    layout = ReorderedTiles.from_mask(blocks(4, 4, (128, 128), 0.4)[0])
    assert layout.tile == (128, 128) and layout.order.tile == (128, 128)
    mask, kept = blocks(8, 8, (64, 64), 0.3)
    layout = ReorderedTiles.from_mask(mask)
    assert layout.tile == (64, 64) and layout.tiles == kept
    assert ReorderedTiles.from_mask(torch.rand(128, 192) < 0.5).order.identity


def test_gradients_of_gradients():
    layout = ReorderedTiles.from_mask(bands(20, 24), TILE)
    gen = torch.Generator().manual_seed(0)
    x, bias = (torch.randn(n, generator=gen, dtype=torch.float64, requires_grad=True) for n in ((2, 24), 20))
    values = torch.randn(layout.tiles, *TILE, generator=gen, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda *a: reordered_linear_tiles(*a, layout), (x, values, bias))
    torch.autograd.gradgradcheck(lambda x, b: reordered_linear_tiles(x, values, b, layout), (x, bias))


def test_shapes_that_do_not_fit_are_refused():
    layout = ReorderedTiles.from_mask(bands(70, 90), TILE)
    values = torch.zeros(layout.tiles, *TILE)
    with pytest.raises(ValueError, match=r"x of shape \(3, 70\) does not end in the mask's 90 input features"):
        reordered_linear_tiles(torch.ones(3, 70), values, None, layout)
    with pytest.raises(ValueError, match=r"bias of shape \(90,\) does not match the mask's 70 output features"):
        reordered_linear_tiles(torch.ones(3, 90), values, torch.ones(90), layout)
    with pytest.raises(ValueError, match="are not the mask's"):
        reordered_linear_tiles(torch.ones(3, 90), values[1:], torch.ones(70), layout)


# --- the module


def layer(mask=MASKS["uneven"], fmt="reordered"):
    torch.manual_seed(0)
    masked = MaskedLinear.from_dense(nn.Linear(mask.shape[1], mask.shape[0]), mask)
    masked.tile = TILE
    masked.set_format(fmt)
    return masked


@pytest.fixture
def searches(monkeypatch):
    """How often an order was searched for."""
    count = []
    search = reordered_tiles.tile_order
    monkeypatch.setattr(reordered_tiles, "tile_order", lambda *a: count.append(1) or search(*a))
    return count


@masks
def test_the_module_equals_its_dense_format(mask):
    masked, dense = layer(mask), layer(mask, "dense")
    assert masked.values.shape == (masked.layout.tiles, *TILE) and torch.equal(masked.weight, dense.weight)
    assert torch.equal(masked.packed_values(), masked.weight[mask])
    x = torch.randn(9, mask.shape[1])
    for one in (masked, dense):
        one(x).square().sum().backward()
    close(masked(x), dense(x), torch.float32)
    close(masked.dense_like(masked.values.grad), dense.weight.grad, torch.float32)
    close(masked.bias.grad, dense.bias.grad, torch.float32)
    grad = masked.dense_like(masked.values.grad)
    for fmt in ("packed", "blocks", "reordered", "dense", "reordered"):
        masked.set_format(fmt)
        assert torch.equal(masked.weight, dense.weight)
        assert torch.equal(masked.dense_like(masked.weight_parameter.grad), grad)


def test_state_dicts_are_those_of_the_dense_module():
    masked = layer()
    plain = nn.Linear(100, 72)
    file = io.BytesIO()
    torch.save(masked.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(plain.weight, masked.weight) and torch.equal(masked.to_dense().weight, plain.weight)
    nn.init.normal_(plain.weight)
    for assign in (False, True):
        masked.load_state_dict(plain.state_dict(), assign=assign)
        assert torch.equal(masked.weight, plain.weight * MASKS["uneven"])


def test_an_optimizer_keeps_its_state_through_sparsify_and_back():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 192), nn.ReLU(), nn.Linear(192, 5))
    optimizer = torch.optim.Adam(net.parameters())
    x = torch.randn(6, 256)
    net(x).square().sum().backward()
    optimizer.step()
    moments = optimizer.state[net[0].weight]["exp_avg"].clone()
    mask = blocks(3, 4, (64, 64), 0.4)[0]
    sparse = pst.sparsify(net, pst.Ticket(masks={"0.weight": mask}), plan={"0": "reordered"}, optimizer=optimizer)
    values = sparse[0].values
    assert sparse[0].format == "reordered" and pst.plan(sparse).layers[0].why == "asked for"
    assert torch.equal(sparse[0].dense_like(optimizer.state[values]["exp_avg"]), moments * mask)
    optimizer.zero_grad()
    sparse(x).square().sum().backward()
    optimizer.step()
    assert (sparse[0].weight[~mask] == 0).all() and (sparse[0].weight[mask] != 0).all()
    moments = sparse[0].dense_like(optimizer.state[values]["exp_avg"])
    plain = pst.densify(sparse, optimizer=optimizer)
    assert torch.equal(optimizer.state[plain[0].weight]["exp_avg"], moments)


def test_another_mask_has_an_order_of_its_own(searches):
    masked, mask = layer(), blocks(5, 7, TILE, 0.3)[0][:72, :100]
    optimizer = torch.optim.Adam(masked.parameters())
    x = torch.randn(9, 100)
    masked(x).square().sum().backward()
    optimizer.step()
    old, weight = masked.values, masked.weight.detach().clone()
    moments = masked.dense_like(optimizer.state[old]["exp_avg"])
    carry(optimizer, {old: masked.set_mask(mask)})
    assert masked.format == "reordered" and torch.equal(masked.weight, weight * mask)
    assert torch.equal(masked.dense_like(optimizer.state[masked.values]["exp_avg"]), moments * mask)
    assert int(masked.layout.survivors().sum()) == int(mask.sum()) and len(searches) == 2
    close(masked(x), F.linear(x, weight * mask, masked.bias), torch.float32)
    masked.set_format("dense")
    masked.set_format("reordered")
    assert len(searches) == 2
    masked.set_mask(torch.rand(72, 100) < 0.5)  # no order is worth it, and the format stays
    assert masked.layout.order.identity and masked.layout.rows is None
    close(masked(x), F.linear(x, masked.weight, masked.bias), torch.float32)


def test_one_search_a_mask(searches):
    masked = layer(fmt="packed")
    for _ in range(2):
        masked.why_not("reordered")
        twin = copy.deepcopy(masked)
        twin.set_format("reordered")
        masked.set_format("reordered")
        masked.set_format("packed")
    assert len(searches) == 1
    masked.set_mask(~MASKS["uneven"])
    masked.why_not("reordered")
    assert len(searches) == 2


def saved_and_loaded(masked):
    file = io.BytesIO()
    torch.save(masked, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, saved_and_loaded], ids=["deepcopy", "pickle"])
def test_copies(searches, make):
    masked, x = layer(), torch.randn(9, 100)
    twin = make(masked)
    assert torch.equal(twin(x), masked(x)) and len(searches) == 1
    with torch.no_grad():
        twin.values.zero_()
    assert masked.weight.any() and not twin.weight.any()


def test_moves_to_another_dtype_and_device(searches):
    masked, x = layer(), torch.randn(9, 100)
    y = masked(x)
    close(masked.double()(x.double()), y, torch.float32)
    assert masked.float().layout is masked.tiles_of("reordered")
    meta = masked.to("meta")
    layout = meta.layout
    held = (layout.order.row_order, layout.rows.index, layout.cols.inverse, layout.rows.rest, *layout.kept.tensors)
    assert all(t is None or t.is_meta for t in held)
    other = layer(fmt="blocks")
    other.why_not("reordered")
    assert other.to("meta").tiles_of("reordered").kept.row.is_meta and len(searches) == 2


def test_autocast():
    masked, x = layer(MASKS["dead rows and columns"]), torch.randn(9, 90)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = masked(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and masked.values.grad.dtype == masked.bias.grad.dtype == torch.float32
    close(y, F.linear(x, masked.weight, masked.bias), torch.bfloat16)


@pytest.mark.parametrize("name", ["uneven", "dead rows and columns"])
def test_compiles_without_a_graph_break(name):
    masked = layer(MASKS[name])
    x, results = torch.randn(9, masked.in_features), []
    for module in (masked, torch.compile(copy.deepcopy(masked), fullgraph=True, backend="aot_eager")):
        module(x).square().sum().backward()
        results.append([p.grad for p in module.parameters()])
    for a, b in zip(*results, strict=True):
        close(a, b, torch.float32)


@pytest.mark.parametrize("name", ["uneven", "dead rows and columns"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_step_never_waits_for_the_device(gpu_or_interpreter, name, backend):
    if backend == "triton" and gpu_or_interpreter == "cpu":
        pytest.skip("the interpreter reads its tensors")
    masked = layer(MASKS[name]).to(gpu_or_interpreter)
    x = torch.randn(9, masked.in_features, device=gpu_or_interpreter)
    with use_backend(backend), NoHostSync(), NoCopyToHost():
        masked(x).square().sum().backward()
    assert masked.values.grad is not None


def test_a_mask_that_no_order_helps_says_so():
    reason = "no order of its rows and columns empties 5% of the tiles that hold a weight"
    masked = layer(torch.rand(72, 100) < 0.5, "packed")
    with pytest.raises(ValueError, match=f"cannot take format 'reordered': {reason}"):
        masked.set_format("reordered")
    assert masked.format == "packed"
    net = nn.Sequential(nn.Linear(100, 72))
    row = pst.plan(pst.sparsify(net, pst.Ticket(masks={"0.weight": masked.mask}), plan="reordered")).layers[0]
    assert (row.format, row.why) == ("packed", f"no reordered: {reason}")


def planned(monkeypatch, tmp_path, mask, **times):
    monkeypatch.setenv("PYSPARSE_TICKET_CACHE", str(tmp_path))
    monkeypatch.setattr(MaskedLinear, "on_gpu", True)
    monkeypatch.setattr("pysparse_ticket.nn.masked.why_missing", lambda backend: None)
    raced = []

    def race(arms, *_):
        raced.extend(arms)
        return {name: {"plain": 2.0, "other blocks": 3.0}.get(name, times.get(name, 9.0)) for name in arms}

    monkeypatch.setattr(choose, "race", race)
    monkeypatch.setattr(choose, "race_steps", lambda arms, x: dict.fromkeys(arms, 0.5) | {"dense": 1.0})
    net = nn.Sequential(nn.Linear(mask.shape[1], mask.shape[0]))
    sparse = pst.sparsify(net, pst.Ticket(masks={"0.weight": mask}), sample=torch.randn(5, mask.shape[1]))
    return sparse[0], pst.plan(sparse).layers[0], raced


def test_the_plan_on_a_gpu_races_it_and_reports_the_tiles(monkeypatch, tmp_path, searches):
    mask = dead(uneven(384, 512, 0.95, sigma=1.0), rows=(3, 4), cols=(5,))
    masked, row, raced = planned(monkeypatch, tmp_path, mask, reordered=1.0)
    layout = masked.tiles_of("reordered")
    order = layout.order
    assert masked.format == row.format == "reordered" and len(searches) == len(reordered_tiles.SEARCHED)
    assert "reordered" in raced and "blocks" not in raced and "other reordered" not in raced
    dead_ones = int((~mask.any(1)).sum()), int((~mask.any(0)).sum())
    assert dead_ones[0] >= 2 and dead_ones[1] >= 1 and layout.empty > 0.4
    assert row.why == (
        f"fastest here; 0% of the 128 x 128 tiles are empty, 0% of the 64 x 64 ones, {layout.empty:.0%} reordered"
        f" ({order.how}; {dead_ones[0]} rows, {dead_ones[1]} columns dead)"
    )


def test_the_plan_names_the_size_where_it_is_another(monkeypatch, tmp_path):
    mask, kept = blocks(8, 8, (64, 64), 0.3)
    masked, row, _ = planned(monkeypatch, tmp_path, mask, reordered=4.0)
    assert row.format == masked.format == "dense"
    assert row.why == (
        "reordered takes 2.00 of it; 0% of the 128 x 128 tiles are empty, 0% of the 64 x 64 ones,"
        f" {1 - kept / 64:.0%} reordered (overlap; 0 rows, 0 columns dead)"
    )


def test_an_order_that_gains_less_than_larger_tiles_is_not_raced(monkeypatch, tmp_path):
    mask = torch.eye(3, dtype=torch.bool).repeat_interleave(128, 0)  # a diagonal of blocks, in place
    _, row, raced = planned(monkeypatch, tmp_path, mask.repeat_interleave(128, 1), blocks=1.0)
    assert row.format == "blocks" and "reordered" not in raced and "reordered" not in row.why
