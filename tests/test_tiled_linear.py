"""Linear layers on tiles of samples against F.linear on the scattered weights in float64."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from test_masked_linear import ISAS, bound, case, error, isa, threads  # noqa: F401
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.models import build
from pysparse_ticket.nn.chain import tile_chain
from pysparse_ticket.ops.masked_linear import column_tile, linear_schedule
from pysparse_ticket.ops.pattern import Pattern
from pysparse_ticket.ops.tiled_linear import linear_pack, linear_unpack, tiled_linear

OP = torch.ops.pysparse_ticket


def check(batch, sizes, density, gated=True):
    """Three layers, the first two with a ReLU: output and the gradients of x, of all values and of all biases."""
    layers = [case((batch,), i, o, density, seed) for seed, (i, o) in enumerate(pairwise(sizes))]
    x, grad = layers[0][0], layers[-1][4]
    patterns = [layer[3] for layer in layers]

    def run(dtype, forward):
        leaves = [x, *(layer[1] for layer in layers), *(layer[2] for layer in layers)]
        leaves = [t.detach().to(dtype).requires_grad_() for t in leaves]
        y = forward(leaves[0], leaves[1 : 1 + len(layers)], leaves[1 + len(layers) :])
        return y, *torch.autograd.grad(y, leaves, grad.to(dtype))

    def tiled(x, values, biases):
        y = linear_pack(x)
        for i, pattern in enumerate(patterns):
            last = i + 1 == len(patterns)
            how = {"relu": not last, "gated": gated and not last, "gate_x": gated and i > 0}
            y = tiled_linear(y, batch, values[i], biases[i], pattern, **how)
        return linear_unpack(y, batch, sizes[-1])

    def reference(x, values, biases):
        for i, pattern in enumerate(patterns):
            x = F.linear(x, pattern.scatter(values[i]), biases[i])
            x = x if i + 1 == len(patterns) else x.relu()
        return x

    # a sum near 0 may be rounded to another sign than the exact one's, but 1e-7 of a few thousand sums is unlikely
    for a, e in zip(run(torch.float32, tiled), run(torch.float64, reference), strict=True):
        assert a.shape == e.shape and error(a, e) < bound(sum(sizes) + batch)


SHAPES = {
    "one tile": (64, (48, 128, 33, 10), 0.3),
    "ragged batch": (70, (37, 53, 300, 9), 0.3),
    "one sample": (1, (5, 3, 4, 2), 0.6),
    "several chunks": (90, (40, 600, 530, 17), 0.1),
    "full mask": (50, (40, 35, 20, 10), 1.0),
    "zero mask": (50, (40, 35, 20, 10), 0.0),
    "mostly empty rows": (100, (200, 300, 250, 10), 0.003),
    "blocks": (300, (64, 96, 160, 10), "16x16 blocks"),
    "blocks, few removed": (139, (80, 96, 128, 70), "8x1 blocks, few removed"),
    "2:4": (70, (48, 64, 30, 10), "2:4"),
    "mixed": (150, (60, 90, 50, 40), "mixed"),
    "empty batch": (0, (12, 7, 5, 3), 0.5),
}


@pytest.mark.parametrize("gated", [True, False], ids=["gate in the next layer", "gate in the layer itself"])
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_layers_equal_dense_layers(isa, shape, gated):  # noqa: F811
    check(*shape, gated)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("shape", [(200, (100, 700, 600, 10), 0.1), (17, (30, 530, 40, 5), 0.5)])
def test_layers_equal_dense_layers_on_any_number_of_threads(threads, shape, gated):  # noqa: F811
    check(*shape, gated)


@pytest.mark.parametrize("samples", [0, 1, 16, 64, 70, 129])
def test_tiles_by_hand(samples):
    x = torch.arange(samples * 3.0).view(samples, 3)
    tiles = linear_pack(x)
    at = 0
    for start in range(0, samples, 64):
        part = x[start : start + 64]
        lanes = -(-len(part) // 16) * 16
        expected = torch.zeros(3, lanes)
        expected[:, : len(part)] = part.t()
        assert torch.equal(tiles[at : at + 3 * lanes].view(3, lanes), expected)
        at += 3 * lanes
    assert at == tiles.numel() and torch.equal(linear_unpack(tiles, samples, 3), x)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_each_gradient_alone(needed):
    x, values, bias, pattern, grad = case((70,), 37, 53, 0.3)

    def grads(need):
        leaves = [t.detach().requires_grad_(n) for t, n in zip((x, values, bias), need, strict=True)]
        y = tiled_linear(linear_pack(leaves[0]), 70, *leaves[1:], pattern, relu=True)
        linear_unpack(y, 70, 53).backward(grad)
        return [leaf.grad for leaf in leaves]

    for mine, expected, need in zip(grads(needed), grads((True,) * 3), needed, strict=True):
        assert torch.equal(mine, expected) if need else mine is None


def test_opcheck():
    x, values, bias, pattern, grad = case((70,), 37, 53, 0.3)
    tiles, schedules = linear_pack(x), linear_schedule(pattern)
    y = OP.tiled_linear(tiles, values, bias, *schedules, 70, 37, 53, True, True, False)
    for gate, gate_x, need in ((y, True, (True,) * 3), (None, False, (False, True, False))):
        arguments = (linear_pack(grad), tiles, values, gate, *schedules, 70, 37, 53, gate_x, *need)
        torch.library.opcheck(OP.tiled_linear_backward, arguments)
    leaves = [t.clone().requires_grad_() for t in (tiles, values, bias)]
    for flags in ((True, False, False), (False, False, True)):
        torch.library.opcheck(OP.tiled_linear, (*leaves, *schedules, 70, 37, 53, *flags))
    torch.library.opcheck(OP.linear_pack, (x.requires_grad_(),))
    torch.library.opcheck(OP.linear_unpack, (tiles.requires_grad_(), 70, 37))


def test_compiles_in_one_graph():
    x, values, bias, pattern, grad = case((70,), 37, 53, 0.3)
    schedules = linear_schedule(pattern)

    def f(x, values, bias):
        y = tiled_linear(linear_pack(x), 70, values, bias, pattern, relu=True, schedules=schedules)
        return linear_unpack(y, 70, 53)

    leaves = [t.requires_grad_() for t in (x, values, bias)]
    eager = torch.autograd.grad(f(*leaves), leaves, grad)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, e in zip(torch.autograd.grad(compiled(*leaves), leaves, grad), eager, strict=True):
        assert torch.allclose(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t, v, p: tiled_linear(t[1:], 4, v, None, p), r"4 samples of 7 features are a tensor of shape \(112,\)"),
        (lambda t, v, p: tiled_linear(t, 4, v[1:], None, p), "do not match the pattern's"),
        (lambda t, v, p: tiled_linear(t, 4, v, v[:2], p), r"bias of shape \(2,\) does not match"),
        (lambda t, v, p: tiled_linear(t.double(), 4, v, None, p), "float32 on the CPU, not torch.float64"),
        (lambda t, v, p: linear_pack(t), "flatten it first"),
        (lambda t, v, p: linear_unpack(t, 40, 7), "40 samples of 7 features"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    x, values, _, pattern, _ = case((4,), 7, 5, 0.5)
    with pytest.raises(ValueError, match=words):
        call(linear_pack(x), values, pattern)


def test_column_tiles_are_about_as_wide():
    assert column_tile(100_000, 1000, 1000) == 125
    assert column_tile(784 * 1024 // 50, 1024, 784) == 392
    assert column_tile(0, 10, 20) == 20 and column_tile(0, 0, 0) == 1


def mlp(*, dropout=0.0):
    drop = nn.Dropout(dropout)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 90), nn.ReLU(), drop, nn.Linear(90, 33), nn.Identity(), nn.Linear(33, 20), nn.ReLU()
    )


class Branches(nn.Module):
    """A ReLU'd output that another operation reads too, a run that ends in the middle, 3-D inputs, a tanh."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(12, 20), nn.Linear(20, 20), nn.Linear(20, 20)
        self.four, self.five = nn.Linear(20, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = x.reshape(x.shape[0], 4, 12)
        y = F.relu(self.two(self.one(x)))
        y = torch.tanh(self.three(y)) + y
        return self.five(self.four(y).relu()).sum(1)


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3))

    def forward(self, x):
        return self.head(self.convs(x.view(-1, 3, 8, 8)).mean((2, 3)))


MODELS = {
    "mlp": (mlp, 48, 3),
    "lenet": (lambda: build("lenet-300-100", 10, (1, 6, 8)), 48, 3),
    "branches": (Branches, 48, 4),
    "convolutions and a head": (Both, 192, 4),
}


@pytest.mark.parametrize("samples", [1, 37, 130])
@pytest.mark.parametrize("name", MODELS)
def test_chain_equals_the_modules(name, samples):
    make, features, chained = MODELS[name]
    torch.manual_seed(0)
    model = make()
    ticket = pst.at_init(model, score="random", granularity="weight", sparsity=0.6)
    modules = pst.sparsify(copy.deepcopy(model), ticket)
    chain = pst.sparsify(model, ticket, plan="tiled")
    assert sum(row["format"] == "tiled" for row in pst.plan(chain).rows()) == chained
    x = torch.randn(samples, features, requires_grad=True)
    results = []
    for net in (chain, modules):
        y = net(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])))
    for a, e in zip(*results, strict=True):
        assert error(a, e.double()) < bound(1000)


def test_dropout_on_tiles():
    torch.manual_seed(0)
    ticket = pst.at_init(mlp(), score="random", granularity="weight", sparsity=0.6)
    net = tile_chain(pst.sparsify(mlp(dropout=0.5), ticket))
    x = torch.randn(100, 48)
    draws = [net(x), net(x)]
    assert not torch.equal(*draws)
    net.eval()
    with net.modules_one_by_one():
        expected = net(x)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_packs_and_unpacks_once(monkeypatch):
    calls = []
    for name in ("linear_pack", "linear_unpack", "tiled_linear"):
        op = getattr(pst.nn.linear_chain, name)
        monkeypatch.setattr(pst.nn.linear_chain, name, lambda *a, n=name, f=op, **k: (calls.append(n), f(*a, **k))[1])
    model = mlp()
    ticket = pst.at_init(model, score="random", granularity="weight", sparsity=0.6)
    pst.sparsify(model, ticket, plan="tiled")(torch.randn(5, 48))
    assert calls == ["linear_pack", *["tiled_linear"] * 3, "linear_unpack"]


def test_pattern_of_another_dimension_is_refused():
    pattern = Pattern.from_mask(torch.ones(2, 2, 1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="2-D mask"):
        tiled_linear(torch.zeros(32), 1, torch.ones(4), None, pattern)
