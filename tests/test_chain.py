"""The chain of batch tiles: same function as the modules one by one, whatever the model between them looks like."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.measure import macs
from pysparse_ticket.models import build
from pysparse_ticket.nn.chain import TiledChain, tile_chain


def conv(c, o, k=3, **options):
    return nn.Conv2d(c, o, k, padding=k // 2, **options)


class Foreign(nn.Module):
    """Not ours: in-place ReLUs, an add with a tensor that is no convolution's, pooling, two heads, a biased conv."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(conv(3, 8, bias=True), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.two = nn.Sequential(conv(8, 8, 5, bias=False), nn.BatchNorm2d(8, momentum=None))
        self.three = nn.Sequential(conv(8, 12, stride=2), nn.BatchNorm2d(12, affine=False), nn.ReLU())
        self.four = conv(12, 12, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(12, 5)
        self.map = nn.Conv2d(12, 2, 1)

    def forward(self, x):
        y = self.one(x)
        y = F.relu(self.two(y) + F.max_pool2d(y, 3, 1, 1))
        y = self.three(y)
        y = self.four(y).add(y)
        return self.head(torch.flatten(self.pool(y), 1)).sum() + self.map(F.avg_pool2d(y, 2)).square().mean()


def resnet():
    return build("resnet14", 10, (3, 8, 8))


class Summed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).square().sum()


MODELS = {
    "resnet14": lambda: Summed(resnet()),
    "foreign": Foreign,
    "plain": lambda: Summed(nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 4, stride=2), nn.Flatten(), nn.Linear(64, 3))),
}


@pytest.mark.parametrize("samples", [1, 5, 16, 37])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_chain_equals_the_modules(name, training, samples):
    if name == "resnet14" and samples == 1 and training:
        samples = 2  # stage 3 of one 8x8 image is 2x2, few values for batch statistics
    torch.manual_seed(0)
    model = MODELS[name]().train(training)
    ticket = pst.at_init(model, score="random", granularity="weight", sparsity=0.7)
    modules = pst.sparsify(model, ticket)
    chain = tile_chain(copy.deepcopy(modules))
    x = torch.randn(samples, 3, 8, 8, requires_grad=True)
    expected, actual = modules(x), chain(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(expected, [x, *modules.parameters()])
    ours = torch.autograd.grad(actual, [x, *chain.parameters()])
    # a bias before batch statistics has a gradient of rounding noise: compare it with the largest of its tensor's kin
    scale = max(float(g.abs().max()) for g in grads)
    for (key, _), mine, theirs in zip([("x", x), *modules.named_parameters()], ours, grads, strict=True):
        error = (mine - theirs).norm() / max(float(theirs.norm()), 1e-4 * scale)
        assert error < 2e-3, key
    for (key, mine), theirs in zip(chain.named_buffers(), modules.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=key)


def test_the_model_stays_itself():
    torch.manual_seed(0)
    model = resnet()
    ticket = pst.at_init(model, score="magnitude", granularity="weight", sparsity=0.8)
    keys, kind = list(model.state_dict()), type(model)
    sparse = pst.sparsify(model, ticket, plan="tiled")
    assert sparse is model and isinstance(sparse, kind) and isinstance(sparse, TiledChain)
    assert list(sparse.state_dict()) == keys
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(copy.deepcopy(sparse)(x), sparse(x))
    assert {r["format"] for r in pst.plan(sparse).rows() if r["op"] == "conv2d"} == {"tiled"}
    sparse.eval()
    with sparse.modules_one_by_one():
        expected = sparse(x)
    torch.testing.assert_close(sparse(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sparse.double()(x.double()).float(), expected, rtol=1e-4, atol=1e-4)
    dense = pst.densify(sparse.float())
    assert type(dense) is kind
    torch.testing.assert_close(dense(x), expected, rtol=1e-4, atol=1e-4)


def test_macs_of_a_chain_count_the_survivors():
    model = nn.Sequential(conv(3, 6, bias=False), nn.ReLU(), conv(6, 4, bias=False))
    masks = {n: torch.rand(p.shape) < 0.3 for n, p in model.named_parameters()}
    kept = sum(int(m.sum()) for m in masks.values())
    sparse = pst.sparsify(model, pst.Ticket(masks=masks), plan="tiled")
    assert macs(sparse, torch.randn(2, 3, 8, 8)) == 64 * kept


def test_skipped_blocks_pass_through_the_chain():
    torch.manual_seed(0)
    model = build("resnet20", 10, (3, 8, 8))
    layer = pst.at_init(model, torch.randn(2, 3, 8, 8), score="random", granularity="layer", remove=3)
    both = pst.at_init(model, score="magnitude", granularity="weight", sparsity=0.8)
    both.layers = layer.layers
    chain = pst.sparsify(model, both, plan="tiled").eval()
    x = torch.randn(4, 3, 8, 8)
    with chain.modules_one_by_one():
        expected = chain(x)
    torch.testing.assert_close(chain(x), expected, rtol=1e-4, atol=1e-4)


def filter_ticket(model):
    """Half of the 224 filters that feed one convolution alone."""
    return pst.at_init(model, score="magnitude", granularity="filter", remove=112)


def check_chain(modules, x):
    """The chain's output, gradients and running statistics are those of the modules one by one."""
    chain = tile_chain(copy.deepcopy(modules))
    expected, actual = modules(x), chain(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    weights = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, list(modules.parameters()), weights)
    ours = torch.autograd.grad(actual, list(chain.parameters()), weights)
    # a bias before batch statistics has a gradient of rounding noise
    noise = 1e-3 * max(float(g.abs().max()) for g in grads)
    for (key, _), mine, theirs in zip(modules.named_parameters(), ours, grads, strict=True):
        assert (mine - theirs).norm() < 2e-3 * max(float(theirs.norm()), noise), key
    for (key, mine), theirs in zip(chain.named_buffers(), modules.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=key)
    return chain


@pytest.mark.parametrize("samples", [5, 32])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_filter_tickets_run_in_the_chain(training, samples):
    torch.manual_seed(0)
    model = resnet().train(training)
    modules = pst.sparsify(model, filter_ticket(model))
    chain = check_chain(modules, torch.randn(samples, 3, 8, 8))
    tiled = [m for m in chain.modules() if hasattr(m, "_tile_pattern")]
    # with the stem and the two shortcuts, which are whole
    assert len(tiled) == 15 and {type(m) for m in tiled} == {nn.Conv2d, pst.nn.FilterSparseConv2d}
    dense = pst.densify(chain)
    assert not any(hasattr(m, "_tile_pattern") for m in dense.modules())


def test_coupled_filter_tickets_run_in_the_chain():
    torch.manual_seed(0)
    model = resnet().train()
    ticket = pst.at_init(model, score="random", granularity="filter", remove=300)
    chain = check_chain(pst.sparsify(model, ticket), torch.randn(5, 3, 8, 8))
    # the stem, two of each of six blocks and two projections, each on the channels left alone
    assert sum(hasattr(m, "_tile_pattern") for m in chain.modules()) == 15
    assert chain.fc.weight.shape[1] == int(ticket.filters["stage3.1.conv2"].sum()) < 64


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_removed_filters_of_full_width_are_zeros(bias):
    """Masked, filter-sparse at full width and whole convolutions in one chain."""
    torch.manual_seed(0)
    convs = [conv(3, 8, bias=bias), conv(8, 12, bias=bias), conv(12, 6, bias=bias), conv(6, 4, stride=2, bias=bias)]
    keep_out, keep_in = torch.rand(12) < 0.5, torch.rand(8) < 0.5
    modules = nn.Sequential(
        convs[0],
        nn.ReLU(),
        pst.nn.FilterSparseConv2d.from_dense(convs[1], keep_out, keep_in),
        pst.nn.MaskedConv2d.from_dense(convs[2], torch.rand(6, 12, 3, 3) < 0.3),
        nn.BatchNorm2d(6),
        convs[3],
    )
    chain = check_chain(modules, torch.randn(19, 3, 8, 8))
    assert [hasattr(chain[i], "_tile_pattern") for i in (0, 2, 5)] == [True] * 3
    cut = tile_chain(copy.deepcopy(modules[:3]))
    removed = cut(torch.randn(3, 3, 8, 8))[:, ~keep_out]
    assert not removed.any() and removed.numel()


def test_filter_tickets_are_raced_and_rerun(monkeypatch):
    torch.manual_seed(0)
    model = resnet().eval()
    times = {"dense": 3.0, "layers": 2.0, "tiled": 1.0}
    monkeypatch.setattr("pysparse_ticket.nn.choose.race_steps", lambda arms, _: {arm: times[arm] for arm in arms})
    monkeypatch.setattr("pysparse_ticket.nn.choose.PlanCache.get_or_race", lambda self, key, make: make())
    ticket, x = filter_ticket(model), torch.randn(4, 3, 8, 8)
    sparse = pst.sparsify(copy.deepcopy(model), ticket, sample=x)
    rows = pst.plan(sparse).rows()
    assert {r["format"] for r in rows} == {"tiled"} and isinstance(sparse, TiledChain)
    again = pst.sparsify(model, ticket, plan={r["layer"]: r["format"] for r in rows})
    assert isinstance(again, TiledChain) and torch.equal(again(x), sparse(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_layer_tickets_are_raced_run_whole_and_rerun(training, monkeypatch):
    """No convolution is sparse, so all that are left form the chain; a removed block is no part of it."""
    torch.manual_seed(0)
    model, x = build("resnet20", 10, (3, 8, 8)).train(training), torch.randn(5, 3, 8, 8)
    ticket = pst.at_init(model, x, score="random", granularity="layer", remove=2)
    modules = pst.sparsify(copy.deepcopy(model), ticket)
    raced = []

    def race_steps(arms, x):
        raced.append(set(arms))
        return {"dense": 3.0, "layers": 2.0, "tiled": 1.0}

    monkeypatch.setattr("pysparse_ticket.nn.choose.race_steps", race_steps)
    monkeypatch.setattr("pysparse_ticket.nn.choose.PlanCache.get_or_race", lambda self, key, make: make())
    sparse = pst.sparsify(copy.deepcopy(model), ticket, sample=x)
    assert isinstance(sparse, TiledChain) and raced == [{"dense", "layers", "tiled"}]
    formats = {r["layer"]: r["format"] for r in pst.plan(sparse).rows()}
    left = [n for n, m in modules.named_modules() if isinstance(m, nn.Conv2d)]
    assert formats == dict.fromkeys(ticket.removed_blocks, "skipped") | dict.fromkeys(left, "tiled") and len(left) == 17
    assert "in one chain, the whole step takes 0.33 of the dense one's" in str(pst.plan(sparse))
    again = pst.sparsify(copy.deepcopy(model), ticket, plan={n: f for n, f in formats.items() if f == "tiled"})
    y, expected = again(x), modules(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(sparse(x), y) and macs(again, x) == macs(modules, x)
    grads = [torch.autograd.grad(o.square().sum(), list(m.parameters())) for m, o in ((again, y), (modules, expected))]
    assert all((a - b).norm() < 2e-3 * b.norm().clamp(min=1e-3) for a, b in zip(*grads, strict=True))
    assert {type(m) for m in pst.densify(sparse).modules()} == {type(m) for m in modules.modules()} - {
        pst.nn.LayerSkip
    } | {nn.Identity}
    with pytest.raises(ValueError, match="does not mask"):
        pst.sparsify(model, ticket, plan={"fc": "tiled"})


def test_hooked_and_lonely_whole_convolutions_stay_outside():
    model = nn.Sequential(conv(3, 4), conv(4, 4), conv(4, 4), nn.Tanh(), conv(4, 4), nn.Tanh(), conv(4, 4))
    model[0].register_forward_pre_hook(lambda *_: None)
    mask = torch.rand(4, 4, 3, 3) < 0.5
    model[6] = pst.nn.MaskedConv2d.from_dense(model[6], mask)
    model[2] = pst.nn.MaskedConv2d.from_dense(model[2], mask)
    chain = check_chain(model, torch.randn(3, 3, 8, 8))
    assert [i for i, m in enumerate(chain) if hasattr(m, "_tile_pattern")] == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32 in", "bfloat16 in"])
def test_autocast(dtype):
    """Plain modules between and behind the tiles cast; the tiles stay float32."""
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 6), nn.MaxPool2d(2), conv(6, 4), nn.ReLU(), conv(4, 4))
    ticket = pst.at_init(model, score="magnitude", granularity="weight", sparsity=0.5)
    modules = pst.sparsify(model, ticket)
    chain = tile_chain(copy.deepcopy(modules))
    x = torch.randn(5, 3, 8, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = modules(x), chain(x)
    assert actual.dtype == expected.dtype == dtype
    # one rounding at the end against one behind each convolution
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2 * float(expected.detach().abs().max()))
    actual.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in chain.parameters())


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4))

    def forward(self, x):
        return self.body(x) if x.sum() > 0 else self.body(-x)


class TwoInputs(Untraceable):
    def forward(self, x, y):
        return self.body(x) + y


class Between(nn.Module):
    """Two convolutions with a function of the first one's output, and a parameter, between them."""

    def __init__(self, function):
        super().__init__()
        self.one, self.two, self.place = conv(3, 4), conv(4, 4), nn.Parameter(torch.randn(1, 4, 8, 8))
        self.function = function

    def forward(self, x):
        return self.two(self.function(self.one(x), self.place))


class Broadcast(Between):
    def forward(self, x):
        y = self.one(x)
        return self.two(y) + y.mean((2, 3), keepdim=True)


def sparse(model):
    ticket = pst.at_init(model, score="magnitude", granularity="weight", sparsity=0.5)
    return pst.sparsify(copy.deepcopy(model), ticket), ticket


def test_a_parameter_is_added_to_every_sample():
    modules, _ = sparse(Between(lambda y, place: y + place))
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(tile_chain(copy.deepcopy(modules))(x), modules(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Between(lambda y, place: y + place * 2), "keeps its input's 5 samples, but meets a tensor of 1"),
        (Between(lambda y, _: torch.cat([y, y.flip(3)])), "keeps its input's 5 samples, but meets a tensor of 10"),
        (Broadcast(None), "the residual has shape"),
    ],
    ids=["computed-parameter", "twice-the-samples", "broadcast"],
)
def test_shapes_that_tiles_do_not_have_are_refused_and_run_by_layers(model, words, monkeypatch, tmp_path):
    monkeypatch.setenv("PYSPARSE_TICKET_CACHE", str(tmp_path))  # the models are alike but for their code
    modules, ticket = sparse(model)
    x = torch.randn(5, 3, 8, 8)
    with pytest.raises(ValueError, match=words):
        tile_chain(copy.deepcopy(modules))(x)
    auto = pst.sparsify(copy.deepcopy(model), ticket, sample=x)
    assert words in str(pst.plan(auto)) and not isinstance(auto, TiledChain)
    torch.testing.assert_close(auto(x), modules(x), rtol=1e-4, atol=1e-4)


class FunctionalDropout(Untraceable):
    def forward(self, x):
        return F.dropout(self.body(x), 0.5, self.training)


class ReluBehindABack(nn.Module):
    """The sum reads what the ReLU has changed by then."""

    def __init__(self):
        super().__init__()
        self.one, self.relu, self.two = conv(3, 4), nn.ReLU(inplace=True), conv(4, 4)

    def forward(self, x):
        y = self.one(x)
        return self.two(self.relu(y)) + y


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Untraceable(), "Untraceable cannot be traced"),
        (TwoInputs(), "takes more than one input"),
        (nn.Sequential(conv(3, 4), nn.Flatten(), nn.Linear(256, 3)), "fewer than two sparse convolutions"),
        (FunctionalDropout(), "FunctionalDropout asks for self.training in a forward"),
        (ReluBehindABack(), "one is changed in place by relu and read again by add"),
    ],
    ids=["data-dependent", "two-inputs", "one-convolution", "functional-dropout", "in-place"],
)
def test_what_cannot_be_chained_says_why(model, words):
    ticket = pst.at_init(model, score="magnitude", granularity="weight", sparsity=0.5)
    sparse = pst.sparsify(copy.deepcopy(model), ticket)
    with pytest.raises(ValueError, match=words):
        tile_chain(sparse)
    if not isinstance(model, TwoInputs):
        auto = pst.sparsify(model, ticket, sample=torch.randn(2, 3, 8, 8))
        assert words in str(pst.plan(auto))
