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


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4))

    def forward(self, x):
        return self.body(x) if x.sum() > 0 else self.body(-x)


class TwoInputs(Untraceable):
    def forward(self, x, y):
        return self.body(x) + y


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Untraceable(), "Untraceable cannot be traced"),
        (TwoInputs(), "takes more than one input"),
        (nn.Sequential(conv(3, 4), nn.Flatten(), nn.Linear(256, 3)), "fewer than two masked convolutions"),
    ],
    ids=["data-dependent", "two-inputs", "one-convolution"],
)
def test_what_cannot_be_chained_says_why(model, words):
    ticket = pst.at_init(model, score="magnitude", granularity="weight", sparsity=0.5)
    sparse = pst.sparsify(copy.deepcopy(model), ticket)
    with pytest.raises(ValueError, match=words):
        tile_chain(sparse)
    if not isinstance(model, TwoInputs):
        auto = pst.sparsify(model, ticket, sample=torch.randn(2, 3, 8, 8))
        assert words in str(pst.plan(auto))
