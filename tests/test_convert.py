"""sparsify and densify: the same function as the masked network, nothing lost on the way."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import batch, resnet
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.measure import macs
from pysparse_ticket.planner import PlanCache


def ticket_of(model, granularity, **options):
    score = options.pop("score", "magnitude")
    data = [t.to(next(model.parameters()).device) for t in batch()]
    return pst.at_init(model, data, score=score, granularity=granularity, **options)


CASES = {
    "layer": {"granularity": "layer", "remove": 3},
    "filter": {"granularity": "filter", "remove": 150},
    "weight": {"granularity": "weight", "sparsity": 0.9},
    "2:4": {"granularity": "2:4"},
}


def masked_twin(model, ticket):
    """The ticket as research code runs it: zeros in the dense network, a removed block's residual branch included."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in ticket.masks.items():
            twin.get_parameter(name).mul_(mask.to(twin.get_parameter(name).device))
        for name in ticket.removed_blocks:
            twin.set_submodule(name, nn.Identity())
        for name, kept in ticket.filters.items():
            kept = kept.to(twin.get_parameter(f"{name}.weight").device)
            twin.get_parameter(f"{name}.weight").mul_(kept[:, None, None, None])
            norm = name.replace("conv", "norm").replace("stem", "stem_norm").replace("shortcut.0", "shortcut.1")
            for parameter in twin.get_submodule(norm).parameters():
                parameter.mul_(kept)
    return twin


@pytest.mark.parametrize("case", CASES)
def test_sparsified_model_is_the_masked_model(case, device):
    model, (x, y) = resnet().to(device), (t.to(device) for t in batch())
    ticket = ticket_of(model, **CASES[case])
    twin = masked_twin(model, ticket)
    sparse = pst.sparsify(copy.deepcopy(model), ticket)
    for train in (True, False):
        expected, actual = twin.train(train)(x), sparse.train(train)(x)
        # 40 layers deep in float32, each with sums of up to 576 products
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    F.cross_entropy(twin.train()(x), y).backward()
    F.cross_entropy(sparse.train()(x), y).backward()
    stem = (sparse.stem.values if hasattr(sparse.stem, "values") else sparse.stem.weight).grad
    expected = twin.stem.weight.grad[ticket.masks["stem.weight"]] if stem.dim() == 1 else twin.stem.weight.grad
    assert ((stem - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("case", CASES)
def test_state_dict_is_the_dense_one(case, device):
    model = resnet().to(device)
    ticket = ticket_of(model, **CASES[case])
    sparse = pst.sparsify(copy.deepcopy(model), ticket)
    state, dense = sparse.state_dict(), model.state_dict()
    gone = tuple(f"{b}." for b in ticket.removed_blocks)
    assert set(state) == {k for k in dense if not k.startswith(gone or "\0")}
    assert all(state[k].shape == dense[k].shape for k in state)
    fresh = resnet()
    fresh.load_state_dict(state, strict=not gone)
    sparse.load_state_dict(dense, strict=not gone)


@pytest.mark.parametrize("case", CASES)
def test_densify_gives_back_a_plain_model_with_the_same_output(case, device):
    model, x = resnet().to(device), batch()[0].to(device)
    sparse = pst.sparsify(model, ticket_of(model, **CASES[case])).eval()
    before = sparse(x)
    dense = pst.densify(sparse)
    assert not any(type(m).__module__.startswith("pysparse_ticket.nn") for m in dense.modules())
    torch.testing.assert_close(dense(x), before, rtol=1e-3, atol=1e-4)


def test_a_removed_block_leaves_nothing_behind(device):
    model = resnet(56).to(device)
    ticket = ticket_of(model, "layer", remove=12, score="random")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x, y = (t.to(device) for t in batch())
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    calls = []
    for name in ticket.removed_blocks:
        model.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    pst.sparsify(model, ticket, optimizer=optimizer)
    model(x)
    assert not calls
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()} and {id(p) for p in optimizer.state} == held
    x32 = torch.randn(1, 3, 32, 32, device=device)
    assert macs(model, x32) == 125_747_840 - 12 * 4_718_592


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_optimizer_state_is_carried_over_and_back(case, kind, device):
    """A step of the sparse model with carried state is the step of the masked network."""
    make = {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
        "adam": lambda p: torch.optim.Adam(p, 0.01),
    }[kind]
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    x, y = (t.to(device) for t in batch())
    # no bias before a batch norm: its gradient is rounding noise, which Adam would scale to full steps
    if case == "layer":
        model = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)) for _ in range(4))
        )
        model = nn.Sequential(model, nn.Flatten(), nn.Linear(192, 10))
    model = model.to(device)
    options = CASES[case] | ({"remove": 2} if "remove" in CASES[case] else {})
    ticket = ticket_of(model, **options)
    twin = copy.deepcopy(model)
    optimizer, other = make(model.parameters()), make(twin.parameters())
    for net, opt in ((model, optimizer), (twin, other)):
        F.cross_entropy(net(x), y).backward()
        opt.step()
        opt.zero_grad()
    sparse = pst.sparsify(model, ticket, optimizer=optimizer)
    dropped = [p for name in ticket.removed_blocks for p in twin.get_submodule(name).parameters()]
    filters = {"0.weight", "1.weight", "1.bias"} if case == "filter" else set()

    def to_ticket():
        for name in ticket.removed_blocks:
            twin.set_submodule(name, nn.Identity())
        with torch.no_grad():
            for name, mask in ticket.masks.items():
                for t in (twin.get_parameter(name), *_like(other, twin.get_parameter(name))):
                    t.mul_(mask.to(device))
            for name in filters:
                kept = ticket.filters["0"].to(device)
                p = twin.get_parameter(name)
                for t in (p, *_like(other, p)):
                    t.mul_(kept.reshape(-1, *[1] * (p.dim() - 1)))
            if filters:
                for t in (twin[3].weight, *_like(other, twin[3].weight)):
                    t.mul_(ticket.filters["0"].to(device)[None, :, None, None])

    to_ticket()
    for _ in range(2):
        for net, opt in ((sparse, optimizer), (twin, other)):
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            for name, mask in ticket.masks.items():
                if net is twin:
                    net.get_parameter(name).grad.mul_(mask.to(device))
            for p in dropped:
                p.grad = None
            opt.step()
        to_ticket()
    theirs, ours = twin.state_dict(), sparse.state_dict()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, _survivors(name, theirs[name], ticket, case), rtol=2e-4, atol=2e-5, msg=name)
    dense = pst.densify(sparse, optimizer=optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in dense.parameters()}


def _like(optimizer, parameter):
    return [
        v
        for v in optimizer.state.get(parameter, {}).values()
        if isinstance(v, torch.Tensor) and v.shape == parameter.shape
    ]


def _survivors(name, tensor, ticket, case):
    if case == "filter" and name in ("1.running_mean", "1.running_var"):
        kept = ticket.filters["0"].to(tensor.device)
        return torch.where(kept, tensor, torch.full_like(tensor, float(name.endswith("var"))))
    return tensor


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW], ids=lambda m: m.__name__)
@pytest.mark.parametrize("fmt", ["packed", "dense"])
def test_pruned_weights_stay_exactly_zero(make, fmt, device):
    model, (x, y) = resnet().to(device), (t.to(device) for t in batch())
    ticket = ticket_of(model, "weight", sparsity=0.8)
    sparse = pst.sparsify(model, ticket, plan=fmt)
    options = {"momentum": 0.9} if make is torch.optim.SGD else {}
    optimizer = make(sparse.parameters(), lr=0.01, weight_decay=0.1, **options)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(sparse(x), y).backward()
        optimizer.step()
    state = sparse.state_dict()
    for name, mask in ticket.masks.items():
        assert (state[name][~mask] == 0).all() and (state[name][mask] != 0).any()


def test_plan_races_the_formats_and_is_remembered(tmp_path, monkeypatch, device):
    monkeypatch.setenv("PYSPARSE_TICKET_CACHE", str(tmp_path))
    model, x = resnet().to(device), batch()[0].to(device)
    ticket = ticket_of(model, "weight", sparsity=0.9)
    sparse = pst.sparsify(copy.deepcopy(model), ticket, sample=x)
    rows = pst.plan(sparse).rows()
    assert {r["layer"] for r in rows} == {n.removesuffix(".weight") for n, m in ticket.masks.items() if not m.all()}
    assert all(r["dense_us"] > 0 and r["format"] in ("packed", "tiles", "pixels", "dense", "tiled") for r in rows)
    assert pst.plan(sparse).step_ratio > 0 and "whole training step" in str(pst.plan(sparse))
    for name in ("race", "race_steps"):
        monkeypatch.setattr(f"pysparse_ticket.nn.choose.{name}", lambda *_: pytest.fail("raced again"))
    again = pst.sparsify(copy.deepcopy(model), ticket, sample=x)
    assert [r["dense_us"] for r in pst.plan(again).rows()] == [r["dense_us"] for r in rows]


def test_a_race_is_kept_at_once_beside_those_of_other_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("PYSPARSE_TICKET_CACHE", str(tmp_path))
    one, other = PlanCache(), PlanCache()
    one.get_or_race("a", lambda: {"dense": 1.0})
    other.get_or_race("b", lambda: {"dense": 2.0})

    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        other.get_or_race("c", stopped)
    assert PlanCache().known == {"a": {"dense": 1.0}, "b": {"dense": 2.0}}


def raced(**fast):
    """A race of layers in which dense takes 2, the formats named what is given, and 5 at the other density."""
    times = dict.fromkeys(("packed", "tiles", "pixels"), 3.0) | fast
    others = {f"other {name}": 5.0 for name in times}
    return lambda arms, *_: {name: ({"plain": 2.0, "dense": 2.1} | times | others)[name] for name in arms}


@pytest.mark.parametrize("fast", ["pixels", "tiles"])
def test_a_convolution_takes_the_layout_that_won(fast, monkeypatch, tmp_path):
    monkeypatch.setenv("PYSPARSE_TICKET_CACHE", str(tmp_path))
    monkeypatch.setattr("pysparse_ticket.nn.choose.race", raced(**{fast: 0.5}))
    n, side = (128, 8) if fast == "pixels" else (1, 32)  # the rule takes the other one
    layer, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(n, 4, side, side)
    ticket = pst.at_init(layer, score="magnitude", granularity="weight", sparsity=0.8)
    monkeypatch.setattr("pysparse_ticket.nn.choose.race_steps", lambda *_: {"dense": 2.0, "layers": 1.0})
    dense, sparse = copy.deepcopy(layer), pst.sparsify(layer, ticket, sample=x)
    (row,) = pst.plan(sparse).rows()
    assert (row["format"], row["speedup"], sparse.format) == (fast, 4.0, fast)
    assert row["break_even"] is not None and fast in str(pst.plan(sparse))
    monkeypatch.setattr("pysparse_ticket.nn.choose.race", lambda *_: pytest.fail("raced again"))
    again = pst.sparsify(dense, ticket, sample=x)
    assert again.format == fast and torch.equal(again(x), sparse(x))


def test_the_whole_step_is_never_slower(monkeypatch, tmp_path):
    monkeypatch.setenv("PYSPARSE_TICKET_CACHE", str(tmp_path))
    monkeypatch.setattr("pysparse_ticket.nn.choose.race_steps", lambda *_: {"dense": 1.0, "layers": 1.5, "tiled": 1.2})
    monkeypatch.setattr("pysparse_ticket.nn.choose.race", raced(packed=1.0))
    model, (x, _) = resnet(), batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sparse = pst.sparsify(model, ticket_of(model, "weight", sparsity=0.9), sample=x, optimizer=optimizer)
    assert {r["format"] for r in pst.plan(sparse).rows()} == {"dense"}
    assert "1.20 of the dense one's with sparse layers, so every masked layer runs dense" in str(pst.plan(sparse))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in sparse.parameters()}


def test_filter_tickets_that_are_slower_run_dense(monkeypatch, device):
    monkeypatch.setattr("pysparse_ticket.nn.choose.race_steps", lambda *_: {"dense": 1.0, "layers": 1.5, "tiled": 1.2})
    monkeypatch.setattr("pysparse_ticket.nn.choose.PlanCache.get_or_race", lambda self, key, make: make())
    model, x = resnet().to(device), batch()[0].to(device)
    ticket = ticket_of(model, "filter", remove=40)
    twin = masked_twin(model, ticket)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    again = pst.sparsify(copy.deepcopy(model), ticket, plan={"stage1.1.conv1": "dense"})
    sparse = pst.sparsify(model, ticket, sample=x, optimizer=optimizer)
    for found in (sparse, again):
        assert {r["format"] for r in pst.plan(found).rows()} == {"dense"}
        assert not any(isinstance(m, pst.nn.FilterSparseConv2d) for m in found.modules())
        torch.testing.assert_close(found.eval()(x), twin.eval()(x), rtol=1e-4, atol=1e-4)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in sparse.parameters()}
    sparse.train()(x).square().sum().backward()
    optimizer.step()
    for name, kept in ticket.filters.items():
        assert (sparse.get_submodule(name).weight[~kept] == 0).all()


@pytest.mark.parametrize(
    ("times", "formats"),
    [
        ({"dense": 3.0, "layers": 2.0, "tiled": 1.0}, {"tiled", "packed"}),
        ({"dense": 3.0, "layers": 1.0, "tiled": 2.0}, {"packed"}),
    ],
    ids=["tiled", "layers"],
)
def test_the_fastest_way_to_run_the_model_is_kept(times, formats, monkeypatch):
    monkeypatch.setattr("pysparse_ticket.nn.choose.race_steps", lambda *_: times)
    monkeypatch.setattr("pysparse_ticket.nn.choose.race", raced(packed=1.0))
    monkeypatch.setattr("pysparse_ticket.nn.choose.PlanCache.get_or_race", lambda self, key, make: make())
    model, (x, _) = resnet(), batch()
    sparse = pst.sparsify(model, ticket_of(model, "weight", sparsity=0.9), sample=x)
    rows = pst.plan(sparse).rows()
    assert {r["format"] for r in rows} == formats and pst.plan(sparse).step_ratio == pytest.approx(1 / 3)
    # packed takes 1 at density d and 5 at 0.5, so 2 a quarter of the way between
    sparser = [r for r in rows if r["sparsity"] > 0.6]
    assert sparser and all(
        r["break_even"] == pytest.approx(r["sparsity"] - (r["sparsity"] - 0.5) / 4, abs=1e-9) for r in sparser
    )
    again = pst.sparsify(
        resnet(), ticket_of(resnet(), "weight", sparsity=0.9), plan={r["layer"]: r["format"] for r in rows}
    )
    assert torch.equal(again(x), sparse(x))


def random_states(device):
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if device == "cuda" else [])]


def test_planning_moves_no_random_state_and_no_buffer(tmp_path, monkeypatch, device):
    monkeypatch.setenv("PYSPARSE_TICKET_CACHE", str(tmp_path))
    model, x = resnet().to(device), batch()[0].to(device)
    ticket = ticket_of(model, "weight", sparsity=0.9)
    states = random_states(device)
    sparse = pst.sparsify(model, ticket, sample=x)
    assert all(map(torch.equal, states, random_states(device))) and (sparse.stem_norm.running_mean == 0).all()


def test_a_single_layer_can_be_the_model(device):
    layer = nn.Linear(20, 10).to(device)
    ticket = pst.at_init(layer, score="magnitude", granularity="weight", sparsity=0.5)
    sparse = pst.sparsify(layer, ticket)
    assert isinstance(sparse, pst.nn.MaskedLinear) and isinstance(pst.densify(sparse), nn.Linear)


def test_bad_input_leaves_the_model_unchanged():
    model = resnet()
    ticket = ticket_of(model, "weight", sparsity=0.9)
    before = [id(m) for m in model.modules()]
    with pytest.raises(ValueError, match="unknown format 'fast'"):
        pst.sparsify(model, ticket, plan={"stem": "fast"})
    with pytest.raises(ValueError, match="the plan names nowhere"):
        pst.sparsify(model, ticket, plan={"nowhere": "dense"})
    one = torch.arange(16) != 3
    ticket.filters = {"stage1.0.conv1": one}
    with pytest.raises(ValueError, match="both a mask and filters"):
        pst.sparsify(model, ticket)
    stem = pst.Ticket(filters={"stem": one})
    with pytest.raises(ValueError, match=r"keeps filter 3 of stage1\.0\.conv2 and removes the one of stem"):
        pst.sparsify(model, stem)
    norm = pst.Ticket(masks={"stem_norm.weight": torch.zeros(16, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"stem_norm\.weight of a BatchNorm2d cannot be sparse"):
        pst.sparsify(model, norm)
    assert [id(m) for m in model.modules()] == before
    with torch.no_grad():
        model.stem.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"stem\.weight holds NaN"):
        pst.sparsify(model, ticket)
    with pytest.raises(ValueError, match="was not sparsified"):
        pst.plan(model)


@pytest.mark.parametrize(
    ("ticket", "ratio", "stays"),
    [("weight", 0.98, False), ("weight", 0.96, True), ("filter", 1.02, True), ("filter", 1.04, False)],
)
def test_masked_layers_have_to_win_and_compact_ones_not_to_lose(ticket, ratio, stays, monkeypatch):
    torch.manual_seed(0)
    model, (x, _) = resnet(), batch()
    found = ticket_of(model, ticket, **({"sparsity": 0.5} if ticket == "weight" else {"remove": 40}))
    monkeypatch.setattr(
        "pysparse_ticket.nn.choose.race_steps", lambda arms, _: dict.fromkeys(arms, ratio) | {"dense": 1.0}
    )
    monkeypatch.setattr("pysparse_ticket.nn.choose.race", lambda arms, *_: dict.fromkeys(arms, 0.5) | {"plain": 1.0})
    monkeypatch.setattr("pysparse_ticket.nn.choose.PlanCache.get_or_race", lambda self, key, make: make())
    formats = {row["format"] for row in pst.plan(pst.sparsify(model, found, x)).rows()}
    assert (formats != {"dense"}) == stays
