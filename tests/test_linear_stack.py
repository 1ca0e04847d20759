"""Dense linear layers as one node of autograd: what the layers compute one by one, in the op and in the model."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import pysparse_ticket as pst
from pysparse_ticket.models import build
from pysparse_ticket.nn import choose
from pysparse_ticket.nn.linear_stack import LinearStacks, stack_linears
from pysparse_ticket.ops.linear_stack import linear_stack, linear_stack_reference

WIDTHS = (7, 5, 6, 3)


def operands(biased=(True, False, True), dtype=torch.float32, samples=(4,)):
    torch.manual_seed(0)
    x = torch.randn(*samples, WIDTHS[0], dtype=dtype, requires_grad=True)
    weights = [torch.randn(o, i, dtype=dtype, requires_grad=True) for i, o in pairwise(WIDTHS)]
    biases = [
        torch.randn(o, dtype=dtype, requires_grad=True) if b else None for o, b in zip(WIDTHS[1:], biased, strict=True)
    ]
    return x, weights, biases


def tensors(x, weights, biases):
    return [x, *weights, *(b for b in biases if b is not None)]


def close(ours, theirs):
    """float32 sums of another order, against float64: 4 eps of the largest value for each term and layer"""
    scale = theirs.abs().max().clamp(min=1) if theirs.numel() else 1
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    assert not ours.numel() or (ours - theirs).abs().max() <= 4 * 2**-24 * max(WIDTHS) * len(WIDTHS) * scale


@pytest.mark.parametrize("samples", [(4,), (0,), (1,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("relus", [(True, True, False), (False, True, True), (False, False, False)], ids=str)
def test_equals_the_layers_one_by_one(samples, relus):
    results = []
    for run in (linear_stack, linear_stack_reference):
        x, weights, biases = operands(samples=samples)
        given = torch.randn(*samples, WIDTHS[-1])
        if run is linear_stack_reference:
            x, weights, given = x.double(), [w.double() for w in weights], given.double()
            biases = [b if b is None else b.double() for b in biases]
        y = run(x, weights, biases, relus)
        assert y.is_contiguous()
        results.append((y, *torch.autograd.grad(y, tensors(x, weights, biases), given)))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("relus", [(True, True, False), (True, False, True)], ids=str)
def test_gradients_and_theirs_numerically(relus):
    x, weights, biases = operands(dtype=torch.float64)

    def run(*given):
        given = iter(given)
        return linear_stack(
            next(given), [next(given) for _ in weights], [next(given) if b else None for b in biases], relus
        )

    inputs = [t.detach().requires_grad_() for t in tensors(x, weights, biases)]
    biases = [b is not None for b in biases]
    assert gradcheck(run, inputs) and gradgradcheck(run, inputs)


@pytest.mark.parametrize("frozen", range(6))
@pytest.mark.parametrize("others", [True, False], ids=["all but", "alone"])
def test_each_gradient_alone(frozen, others):
    grads = []
    for run in (linear_stack, linear_stack_reference):
        x, weights, biases = operands()
        every = tensors(x, weights, biases)
        for i, tensor in enumerate(every):
            tensor.requires_grad_((i != frozen) == others)
        run(x, weights, biases, (True, True, False)).square().sum().backward()
        grads.append([tensor.grad for tensor in every])
    for ours, theirs in zip(*grads, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            close(ours, theirs)


def test_the_caller_may_change_the_output_and_keeps_the_gradient():
    x, weights, biases = operands()
    y = linear_stack(x, weights, biases, (True, True, False))
    y.mul_(2)
    given = torch.ones_like(y)
    y.backward(given)
    assert torch.equal(given, torch.ones_like(y)) and x.grad.abs().sum() > 0


def masked_mlp(name="lenet-300-100", plan="dense", sparsity=0.5):
    torch.manual_seed(0)
    model = build(name, 10, (1, 8, 8))
    ticket = pst.at_init(model, score="random", granularity="weight", sparsity=sparsity)
    return pst.sparsify(model, ticket, plan=plan)


def train(model, steps=4):
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for _ in range(steps):
        x, labels = torch.randn(9, 1, 8, 8), torch.randint(10, (9,))
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model


def equal_state(a, b, error=0.0):
    return all(torch.allclose(v, b.state_dict()[k], 0, error) for k, v in a.state_dict().items())


def test_a_model_trains_as_its_layers_do_and_its_pruned_weights_stay_zero(monkeypatch):
    plain = masked_mlp()
    stacked = stack_linears(copy.deepcopy(plain))
    assert isinstance(stacked, LinearStacks) and isinstance(stacked, type(plain))
    calls = []
    monkeypatch.setattr(
        "pysparse_ticket.nn.linear_stack.linear_stack", lambda *a: calls.append(len(a[1])) or linear_stack(*a)
    )
    before = copy.deepcopy(stacked)
    assert equal_state(train(plain), train(stacked), 1e-5)  # weights of 0.1 and 4 steps of about 0.01
    assert calls == [3] * 4 and not equal_state(stacked, before)
    for layer in stacked.layers:
        assert layer.weight[~layer.mask].abs().max() == 0
    with stacked.modules_one_by_one():
        train(stacked, 1)
    assert len(calls) == 4
    copied = copy.deepcopy(stacked)
    copied.layers[1].set_format("packed")  # asked for later: the values' gradient is there all the same
    copied(torch.randn(2, 1, 8, 8)).sum().backward()
    assert copied.layers[1].values.grad.abs().sum() > 0
    copied = copy.deepcopy(stacked)
    assert equal_state(train(copied, 1), train(stacked, 1)) and len(calls) == 7


def test_compiled_and_under_autocast_the_modules_run(monkeypatch):
    stacked = stack_linears(masked_mlp())
    x = torch.randn(3, 1, 8, 8)
    y = stacked(x)
    monkeypatch.setattr("pysparse_ticket.nn.linear_stack.linear_stack", None)
    compiled = torch.compile(stacked, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y)
    with torch.autocast("cpu", torch.float16):
        assert stacked(x).dtype == torch.float16
    torch.testing.assert_close(stacked.double()(x.double()).float(), y)


def test_pruned_weights_stay_zero_beside_another_use_of_the_weight():
    stacked = stack_linears(masked_mlp())
    loss = stacked(torch.randn(3, 1, 8, 8)).sum() + sum((layer.weight + 1).square().sum() for layer in stacked.layers)
    loss.backward()
    for layer in stacked.layers:
        assert layer.weight.grad[~layer.mask].abs().max() == 0 and layer.weight.grad.abs().sum() > 0


class Branches(nn.Module):
    """The first output is read twice; a hooked layer stands alone; a dropout parts two runs."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.four, self.five, self.six = nn.Linear(6, 6), nn.Linear(6, 4, bias=False), nn.Linear(4, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        y = self.one(x)
        y = y + self.three(F.relu(self.two(y)))
        return self.six(self.five(self.drop(self.four(y))).relu())


def test_only_layers_that_read_each_other_alone_are_stacked(monkeypatch):
    torch.manual_seed(0)
    model = Branches().eval()
    ticket = pst.at_init(model, score="random", granularity="weight", sparsity=0.3)
    model = pst.sparsify(model, ticket, plan="dense")
    calls = []
    monkeypatch.setattr(
        "pysparse_ticket.nn.linear_stack.linear_stack", lambda *a: calls.append(a[3]) or linear_stack(*a)
    )
    x = torch.randn(5, 6)
    y = model(x)
    stacked = stack_linears(copy.deepcopy(model))
    assert torch.allclose(stacked(x), y, 1e-5, 1e-6) and calls == [[True, False], [True, False]]
    calls.clear()
    model.two.register_forward_hook(lambda module, args, out: out * 2)
    stacked = stack_linears(copy.deepcopy(model))
    assert torch.allclose(stacked(x), model(x), 1e-5, 1e-6) and calls == [[True, False]]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "no two dense linear layers"),
        (lambda: masked_mlp(plan="packed"), "no two dense linear layers"),
    ],
    ids=["no mask", "packed"],
)
def test_what_cannot_be_stacked_says_why(model, words):
    with pytest.raises(ValueError, match=words):
        stack_linears(model())


@pytest.mark.parametrize("packed_wins", [True, False])
def test_the_step_race_decides(packed_wins, monkeypatch, tmp_path):
    """Once among the layers as chosen; once after the layers, too slow together, went back to dense."""
    monkeypatch.setenv("PYSPARSE_TICKET_CACHE", str(tmp_path))
    raced = []

    def race_steps(arms, x):
        raced.append(set(arms))
        return {name: {"dense": 1.0, "stacked": 0.9}.get(name, 1.2) for name in arms}

    def race(arms, *_, **__):
        return {name: 0.5 if name == "packed" and packed_wins else 1.0 + (name != "plain") for name in arms}

    monkeypatch.setattr(choose, "race_steps", race_steps)
    monkeypatch.setattr(choose, "race", race)
    torch.manual_seed(0)
    model = build("lenet-300-100", 10, (1, 8, 8))
    ticket = pst.at_init(model, score="random", granularity="weight", sparsity=0.5)
    dense = copy.deepcopy(model)
    sparse = pst.sparsify(model, ticket, torch.randn(4, 1, 8, 8))
    assert isinstance(sparse, LinearStacks) and {row["format"] for row in pst.plan(sparse).rows()} == {"stacked"}
    first = {"dense", "layers", "tiled"} | (set() if packed_wins else {"stacked"})
    assert raced == [first] + ([{"dense", "layers", "stacked"}] if packed_wins else [])
    assert "0.90 of the dense step's time" in str(pst.plan(sparse))
    rerun = pst.sparsify(dense, ticket, plan={row["layer"]: row["format"] for row in pst.plan(sparse).rows()})
    assert isinstance(rerun, LinearStacks) and equal_state(train(rerun), train(sparse))
    assert type(pst.densify(sparse)).__name__ == "Mlp"
