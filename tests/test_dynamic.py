"""SET and RigL: updates worked out by hand, exact counts, the masked dense network's trajectory, resumed runs."""

import copy
import io
import itertools
import math
import subprocess
import sys
from pathlib import Path

import dynamic_worker
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.models import build
from pysparse_ticket.scores import prunable
from pysparse_ticket.search.drop_and_grow import drop_and_grow, drop_fraction
from pysparse_ticket.select import budget, erk_budgets

METHODS = ("rigl", "set")


def test_cosine_drop_fraction():
    assert drop_fraction(0, 0.3, "cosine", 100) == 0.3
    assert drop_fraction(50, 0.3, "cosine", 100) == pytest.approx(0.15)
    assert drop_fraction(25, 0.3, "cosine", 100) == pytest.approx(0.15 * (1 + math.sqrt(0.5)))
    assert drop_fraction(100, 0.3, "cosine", 100) == 0
    assert drop_fraction(99, 0.3, "constant", None) == 0.3


def test_erk_counts_by_hand():
    shapes = {"a": (2, 3), "b": (10, 20), "c": (4, 3, 3, 3)}
    # 314 weights, of which 157 stay. In shares of 5 : 30 : 13 a would get 157 * 5 / 48 = 16 of its 6, so it stays
    # whole. Of the other 151 b gets 151 * 30 / 43 = 105.35 and c 45.65: 105 and 45, and the one left over goes to c.
    assert erk_budgets(shapes, 0.5) == {"a": 6, "b": 105, "c": 46}
    assert erk_budgets(shapes, 0) == {"a": 6, "b": 200, "c": 108}


def test_erk_counts_of_a_resnet_sum_to_the_budget():
    shapes = {name: tuple(w.shape) for name, w in prunable(build("resnet20", 10, (3, 32, 32))).items()}
    counts = erk_budgets(shapes, 0.9)
    assert sum(counts.values()) == 27_090  # of 270,896
    assert all(0 < n <= math.prod(shapes[name]) for name, n in counts.items())
    # eps = rest / sum of sizes: a convolution of 64 to 64 has 134 of them, one of 16 to 16 has 38, the stem 25
    ratio = counts["stage3.1.conv1.weight"] / 134
    assert counts["stage1.1.conv1.weight"] / 38 == pytest.approx(ratio, rel=0.01)
    assert counts["stem.weight"] == min(432, round(ratio * 25))


WEIGHT = torch.tensor([[4.0, -1, 0], [0, 3, -2]])
GROWTH = torch.tensor([[9.0, 5, 7], [2, 9, 6]])
# -1 and -2 go. Then the candidates are worth 5, 7, 2 and 6: 7 and 6 come, of which 6 has just gone.
UPDATES = {
    "keep": ([[1, 0, 1], [0, 1, 1]], [[1, 0, 0], [0, 1, 1]]),
    "zero": ([[1, 0, 1], [0, 1, 1]], [[1, 0, 0], [0, 1, 0]]),
    "never": ([[1, 0, 1], [1, 1, 0]], [[1, 0, 0], [0, 1, 0]]),
}


@pytest.mark.parametrize(("regrow", "masks"), UPDATES.items(), ids=UPDATES)
def test_drop_and_grow_by_hand(regrow, masks):
    new, stays = drop_and_grow(WEIGHT, WEIGHT != 0, GROWTH, 2, regrow)
    assert (new.int().tolist(), stays.int().tolist()) == masks


def test_of_equal_weights_the_earlier_survives_and_of_equal_gradients_the_earlier_comes():
    mask = torch.tensor([[True, True, True, False, False, False]])
    new, _ = drop_and_grow(torch.tensor([[1.0, -1, 1, 0, 0, 0]]), mask, torch.ones(1, 6), 2, "never")
    assert new.int().tolist() == [[1, 0, 0, 1, 1, 0]]


# all four go, and 9, 9, 7 and 6 come; where none may return, -1 and -2 go and the two that were absent come
ALL_GO = {
    "keep": ([[1, 0, 1], [0, 1, 1]], [[1, 0, 0], [0, 1, 1]]),
    "zero": ([[1, 0, 1], [0, 1, 1]], [[0, 0, 0], [0, 0, 0]]),
    "never": ([[1, 0, 1], [1, 1, 0]], [[1, 0, 0], [0, 1, 0]]),
}


@pytest.mark.parametrize(("regrow", "masks"), ALL_GO.items(), ids=ALL_GO)
def test_all_or_none_of_the_weights_go(regrow, masks):
    mask = WEIGHT != 0
    new, stays = drop_and_grow(WEIGHT, mask, GROWTH, 4, regrow)
    assert (new.int().tolist(), stays.int().tolist()) == masks
    new, stays = drop_and_grow(WEIGHT, mask, GROWTH, 0, regrow)
    assert torch.equal(new, mask) and torch.equal(stays, mask)


def test_no_more_go_than_can_come_when_none_may_return():
    mask = torch.tensor([[True, True, True, False]])
    new, stays = drop_and_grow(torch.tensor([[3.0, 1, 2, 0]]), mask, torch.ones(1, 4), 3, "never")
    assert new.tolist() == [[True, False, True, True]] and stays.tolist() == [[True, False, True, False]]


def by_hand(plan, **options):
    """W [2, 3] with the mask and the weights given; the loss is ``sum(c * W x)``, so its gradient is c x^T."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings = {"sparsity": 0.5, "every": 1, "decay": "constant", "drop": 1 / 3, "plan": plan} | options
    schedule = pst.dynamic(model, optimizer, **settings)
    state = schedule.state_dict()
    mask = torch.tensor([[True, True, False], [False, True, False]])
    state["masks"]["0.weight"] = mask
    state["ever"]["0.weight"] = mask.clone()
    schedule.load_state_dict(state)
    model.load_state_dict({"0.weight": torch.tensor([[1.0, 0.3, 9], [9, 2, 9]])})
    return model, optimizer, schedule


X, C = torch.tensor([1.0, 2, 3]), torch.tensor([1.0, -2])  # c x^T = [[1, 2, 3], [-2, -4, -6]]


@pytest.mark.parametrize("plan", ["packed", "dense"])
def test_rigl_step_by_hand(plan):
    model, optimizer, schedule = by_hand(plan)
    (model(X) * C).sum().backward()
    optimizer.step()  # 1 - 0.1, 0.3 - 0.2, 2 + 0.4
    assert schedule.step()
    # one of three weights moves: 0.1 goes, and of the gradients 2 (its own), 3, -2 and -6 the last is the largest
    layer = model[0]
    assert layer.mask.int().tolist() == [[1, 0, 0], [0, 1, 1]]
    torch.testing.assert_close(layer.weight.detach(), torch.tensor([[0.9, 0, 0], [0, 2.4, 0]]))
    momentum = layer.dense_like(optimizer.state[layer.weight_parameter]["momentum_buffer"])
    assert momentum.tolist() == [[1, 0, 0], [0, -4, 0]]
    assert schedule.exploration == pytest.approx(4 / 6)
    assert schedule.history == [{"step": 1, "drop": 1 / 3, "moved": 1, "exploration": schedule.exploration}]
    # the next step: 0.9 - 0.1 (0.9 + 1) = 0.71, 2.4 + 0.1 (3.6 + 4) = 3.16, 0 + 0.6: 0.6 is the smallest, but its
    # gradient the largest, so it comes back with its value
    optimizer.zero_grad()
    (model(X) * C).sum().backward()
    optimizer.step()
    schedule.step()
    torch.testing.assert_close(layer.weight.detach(), torch.tensor([[0.71, 0, 0], [0, 3.16, 0.6]]))
    assert schedule.history[1]["moved"] == 0 and layer.mask.int().tolist() == [[1, 0, 0], [0, 1, 1]]


def test_gradients_of_several_passes_add_up():
    model, optimizer, schedule = by_hand("packed")
    (model(X) * C).sum().backward()
    (model(torch.tensor([0.0, 0, 4])) * -C).sum().backward()  # together [[1, 2, -1], [-2, -4, 2]]
    optimizer.step()  # 0.3 - 0.2 goes again; now its own 2 is the largest of 2, 1, 2, 2 in model order
    schedule.step()
    assert model[0].mask.int().tolist() == [[1, 1, 0], [0, 1, 0]]


def test_evaluation_between_the_steps_does_not_count():
    model, optimizer, schedule = by_hand("packed")
    with torch.no_grad():
        model(X)
    (model(X) * C).sum().backward()
    model(X)  # never sent back
    optimizer.step()
    schedule.step()
    assert model[0].mask.int().tolist() == [[1, 0, 0], [0, 1, 1]]


def test_the_input_may_be_overwritten_after_the_layer():
    model, optimizer, schedule = by_hand("packed")
    x = X.clone()
    y = model(x)
    x.zero_()
    (y * C).sum().backward()
    optimizer.step()
    schedule.step()
    assert model[0].mask.int().tolist() == [[1, 0, 0], [0, 1, 1]]


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),  # Adam would scale a bias's rounding noise to full steps
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 12),
        nn.ReLU(),
        nn.Linear(12, 5),
    )


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 2, 8, 8, generator=generator), torch.randint(5, (16,), generator=generator))
        for _ in range(count)
    ]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
}
OPTIONS = {"sparsity": 0.7, "every": 2, "until": 9, "drop": 0.4}


def build_run(make=OPTIMIZERS["sgd"], **options):
    model = network()
    optimizer = make(model.parameters())
    return model, optimizer, pst.dynamic(model, optimizer, **(OPTIONS | options))


def train(model, optimizer, schedule, data):
    seen = [schedule.masks()]
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if schedule.step():
            seen.append(schedule.masks())
    return seen


@pytest.mark.parametrize("plan", ["packed", "dense"])
@pytest.mark.parametrize("method", METHODS)
def test_updates_on_every_device(method, plan, device):
    model = network().to(device)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    schedule = pst.dynamic(model, optimizer, **(OPTIONS | {"method": method, "plan": plan}))
    seen = train(model, optimizer, schedule, [(x.to(device), y.to(device)) for x, y in batches(9)])
    assert len(seen) == 5  # after steps 2, 4, 6 and 8
    for earlier, later in itertools.pairwise(seen):
        for name, mask in later.items():
            assert int(mask.sum()) == int(earlier[name].sum())
    assert any(not torch.equal(seen[0][name], mask) for name, mask in seen[-1].items())
    for name, mask in seen[-1].items():
        weight = model.get_submodule(name.rpartition(".")[0]).weight
        assert weight.device.type == device and (weight[~mask.to(device)] == 0).all()
    state = optimizer.state_dict()["state"].values()
    assert all(t.device.type == device for one in state for t in one.values() if t.dim())


@pytest.mark.parametrize("plan", ["packed", "dense", "tiled"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_rigl_trains_as_a_masked_dense_network(make, plan):
    model, optimizer, schedule = build_run(make, plan=plan)
    masks = schedule.masks()
    twin = network()
    other = make(twin.parameters())
    weights = {name: twin.get_parameter(name) for name in masks}

    def mask_all(tensors):
        for name, w in weights.items():
            for tensor in tensors(w):
                tensor.data.mul_(masks[name])

    mask_all(lambda w: [w])
    for step, (x, y) in enumerate(batches(10), 1):
        for net, opt in ((model, optimizer), (twin, other)):
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
        full = {name: w.grad.clone() for name, w in weights.items()}
        mask_all(lambda w: [w.grad])
        optimizer.step()
        schedule.step()
        other.step()
        mask_all(lambda w: [w])
        if step in (2, 4, 6, 8):
            for name, w in weights.items():
                share = 0.2 * (1 + math.cos(math.pi * step / 9))
                alive = int(masks[name].sum())
                keep = alive - round(share * alive)
                by_size = sorted(range(w.numel()), key=lambda i, w=w: -w.data.abs().view(-1)[i].item())
                kept = [i for i in by_size if masks[name].view(-1)[i]][:keep]
                rest = sorted(set(range(w.numel())) - set(kept), key=lambda i, g=full[name]: -abs(g.view(-1)[i].item()))
                masks[name] = torch.zeros(w.numel(), dtype=torch.bool)
                masks[name][kept + rest[: alive - keep]] = True
                masks[name] = masks[name].view(w.shape)
            mask_all(lambda w: [w, *(v for v in other.state[w].values() if v.shape == w.shape)])
        ours = schedule.masks()
        assert all(torch.equal(ours[name], mask) for name, mask in masks.items()), step
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name], rtol=2e-3, atol=2e-5, msg=name)
    assert [row["step"] for row in schedule.history] == [2, 4, 6, 8]
    assert sum(row["moved"] for row in schedule.history) > 50


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
@pytest.mark.parametrize("method", METHODS)
def test_counts_stay_exact_and_absent_weights_zero(method, distribution):
    model, optimizer, schedule = build_run(method=method, distribution=distribution, dense=("8",))
    shapes = {name: tuple(mask.shape) for name, mask in schedule.masks().items()}
    assert list(shapes) == ["0.weight", "3.weight", "6.weight"] and type(model[8]) is nn.Linear
    uniform = {name: budget(0.7, math.prod(shape)) for name, shape in shapes.items()}
    counts = erk_budgets(shapes, 0.7) if distribution == "erk" else uniform
    seen = train(model, optimizer, schedule, batches(9))
    assert len(seen) == 5
    for masks in seen:
        assert {name: int(mask.sum()) for name, mask in masks.items()} == counts
    state = model.state_dict()
    for name, mask in seen[-1].items():
        assert (state[name][~mask] == 0).all() and state[name][mask].any() and not torch.equal(mask, seen[0][name])
    ever = {name: torch.stack([masks[name] for masks in seen]).any(0) for name in shapes}
    total = sum(mask.numel() for mask in ever.values())
    assert schedule.exploration == sum(int(mask.sum()) for mask in ever.values()) / total
    assert [row["exploration"] for row in schedule.history] == sorted(r["exploration"] for r in schedule.history)


def test_layers_that_the_distribution_leaves_whole_stay_plain():
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = pst.dynamic(model, optimizer, sparsity=0.4, until=4, every=2)
    # 1260 weights, 756 of which stay, 70 : 32: the last layer would get 237 of its 60
    assert type(model[2]) is nn.Linear and schedule.masks()["2.weight"].all()
    assert int(schedule.masks()["0.weight"].sum()) == 696 and schedule.exploration == pytest.approx(0.6)


def test_set_grows_at_random_by_its_seed():
    def run(seed):
        return train(*build_run(method="set", seed=seed), batches(3))[-1]

    first, again, other = run(0), run(0), run(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_random_growth_moves_no_random_state():
    model, optimizer, schedule = build_run(method="set")
    state = torch.get_rng_state()
    train(model, optimizer, schedule, batches(3))
    assert torch.equal(state, torch.get_rng_state())


def test_the_dense_gradient_is_computed_before_updates_alone(monkeypatch):
    calls = []
    for cls in (pst.nn.MaskedLinear, pst.nn.MaskedConv2d):
        own = cls.dense_gradient
        monkeypatch.setattr(cls, "dense_gradient", lambda self, *a, own=own: calls.append(self) or own(self, *a))
    model, optimizer, schedule = build_run(plan="tiled")
    for step, data in enumerate(batches(10), 1):
        before = len(calls)
        train(model, optimizer, schedule, [data])
        assert len(calls) - before == (4 if step in (2, 4, 6, 8) else 0)
    calls.clear()
    train(*build_run(method="set"), batches(4))
    assert not calls


def test_a_tiled_model_runs_tiled_between_the_updates():
    model, optimizer, schedule = build_run(plan="tiled")
    called = []
    model[0].register_forward_hook(lambda *_: called.append(1))
    for step, data in enumerate(batches(8), 1):
        called.clear()
        train(model, optimizer, schedule, [data])
        assert bool(called) == (step in (2, 4, 6, 8))
    schedule.load_state_dict(schedule.state_dict() | {"step": 1})
    schedule.close()
    called.clear()
    model(batches(1)[0][0])
    assert not called


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", [3, 4], ids=["before an update", "after an update"])
def test_a_resumed_run_ends_with_the_same_bits(method, make, at):
    data = batches(9)
    whole = build_run(make, method=method)
    train(*whole, data)
    cut = build_run(make, method=method)
    train(*cut, data[:at])
    file = io.BytesIO()
    torch.save([part.state_dict() for part in cut], file)
    file.seek(0)
    model, optimizer, schedule = build_run(make, method=method)
    train(model, optimizer, schedule, data[5:8])  # whatever went on in it before
    states = torch.load(file, weights_only=True)
    schedule.load_state_dict(states[2])
    model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    train(model, optimizer, schedule, data[at:])
    for ours, theirs in zip((model, optimizer, schedule), whole, strict=True):
        same(ours.state_dict(), theirs.state_dict())


def same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, two in zip(a, b, strict=True):
            same(one, two)
    else:
        assert a == b


def test_the_masks_make_a_ticket(tmp_path):
    model, optimizer, schedule = build_run()
    train(model, optimizer, schedule, batches(9))
    schedule.ticket().save(tmp_path / "t")
    ticket = pst.Ticket.load(tmp_path / "t", network())
    assert ticket.sparsity == pytest.approx(0.7, abs=1e-3) and ticket.provenance["step"] == 9
    fresh = network()
    fresh.load_state_dict(ticket.rewind)
    x = batches(1)[0][0]
    torch.testing.assert_close(pst.sparsify(fresh, ticket).eval()(x), model.eval()(x), rtol=1e-5, atol=1e-5)


def test_two_ddp_processes_keep_the_same_masks(tmp_path):
    words = [sys.executable, str(Path(dynamic_worker.__file__))]
    ranks = [
        subprocess.Popen([*words, str(rank), str(tmp_path / "store"), str(tmp_path / f"{rank}.pt")])
        for rank in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    same(one, two)
    for method in METHODS:
        assert "the ranks chose different masks at step 8" in one[method]["refused"]
        model, optimizer, schedule = dynamic_worker.build(method)
        dynamic_worker.train(model, model, optimizer, schedule, slice(None))  # one process, both halves of each batch
        same(schedule.masks(), one[method]["masks"])
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(one[method]["model"][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


BAD = {
    "method": ({"method": "rigle"}, "unknown method 'rigle'; known: rigl, set"),
    "distribution": ({"distribution": "er"}, "unknown distribution 'er'; known: erk, uniform"),
    "decay": ({"decay": "linear"}, "unknown decay 'linear'; known: cosine, constant"),
    "regrow": ({"regrow": True}, "unknown regrow True; known: keep, zero, never"),
    "every": ({"every": 0}, "every must be 1 step or more, not 0"),
    "until": ({"until": 0}, "until must be 1 step or more, not 0"),
    "no end": ({"until": None}, "decay='cosine' needs until="),
    "drop": ({"drop": 1.5}, r"drop is a share of the active weights in \[0, 1\], not 1.5"),
    "sparsity": ({"sparsity": 1.0}, r"sparsity must lie in \[0, 1\), not 1.0"),
    "emptied": ({"sparsity": 0.999, "distribution": "uniform"}, "leaves 0.weight no weight; lower it or name it in"),
    "dense": ({"dense": ("1",)}, "dense= names 1, which is no Linear or Conv2d"),
    "dense string": ({"dense": "0"}, "dense is a list of names"),
    "all dense": ({"dense": ("0", "3", "6", "8")}, "names every layer"),
    "plan": ({"plan": "fast"}, "unknown format 'fast'"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_settings_change_nothing(options, message):
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    held, state = [id(p) for p in model.parameters()], copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        pst.dynamic(model, optimizer, **(OPTIONS | options))
    assert [id(p) for p in model.parameters()] == held == [id(p) for p in optimizer.param_groups[0]["params"]]
    same(dict(model.state_dict()), dict(state))


def test_models_and_optimizers_that_cannot_be_scheduled():
    model, optimizer, schedule = build_run()
    with pytest.raises(ValueError, match="0 is masked already; densify the model first"):
        pst.dynamic(model, optimizer, **OPTIONS)
    with pytest.raises(ValueError, match=r"the optimizer does not hold 0\.weight"):
        pst.dynamic(network(), optimizer, **OPTIONS)
    frozen = network()
    frozen[3].requires_grad_(False)
    with pytest.raises(ValueError, match=r"3\.weight is frozen; name its layer in dense="):
        pst.dynamic(frozen, OPTIMIZERS["sgd"](frozen.parameters()), **OPTIONS)
    with pytest.raises(ValueError, match="DataParallel wraps the model"):
        pst.dynamic(nn.DataParallel(network()), optimizer, **OPTIONS)
    with pytest.raises(ValueError, match="the schedule's seed was 0 and is 7 here"):
        build_run(seed=7)[2].load_state_dict(schedule.state_dict())
    with pytest.raises(ValueError, match="no state of a dynamic"):
        schedule.load_state_dict({})


def test_steps_without_a_gradient_or_with_a_broken_one_are_refused():
    model, optimizer, schedule = build_run(every=1)
    masks = schedule.masks()
    with pytest.raises(RuntimeError, match="no gradient reached a sparse layer in the passes before step 1"):
        schedule.step()
    (model(batches(1)[0][0]) * torch.inf).sum().backward()
    with pytest.raises(ValueError, match=r"the gradient of 0\.weight is not finite at step 2"):
        schedule.step()
    same(schedule.masks(), masks)
    train(model, optimizer, schedule, batches(1))
    assert schedule.steps == 3 and schedule.history[0]["step"] == 3
