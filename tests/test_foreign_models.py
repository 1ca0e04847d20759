"""sparsify on models that nobody wrote for it: concatenations, pre-activation, gates, control flow, shared weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.scores import prunable


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.head = nn.Conv2d(16, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        a = F.relu(self.a(x))
        y = self.c(torch.cat([a, F.relu(self.b(a))], 1))
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


class PreActivation(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x):
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class Inverted(nn.Module):
    """A depthwise convolution and a gate between two 1x1 convolutions."""

    def __init__(self, channels=8):
        super().__init__()
        wide = 2 * channels
        self.expand, self.norm = nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depth = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, 4, 1), nn.SiLU(), nn.Conv2d(4, wide, 1))
        self.project = nn.Conv2d(wide, channels, 1, bias=False)

    def forward(self, x):
        h = F.silu(self.depth(F.silu(self.norm(self.expand(x)))))
        return x + self.project(h * torch.sigmoid(self.gate(h)))


class ControlFlow(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.again, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        h = self.a(x)
        if h.sum() > 0:
            h = h / 2
        for _ in range(2):
            h = torch.tanh(self.again(h))
        return self.head(h)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(F.relu(self.b(F.relu(self.a(x)))))


def pooled(*layers):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


IMAGES, VECTORS, SEQUENCES = (5, 3, 9, 9), (7, 12), (3, 5, 12)
MODELS = {
    "concatenation": (Concat, IMAGES),
    "pre-activation": (lambda: pooled(nn.Conv2d(3, 8, 3, padding=1), PreActivation(), PreActivation()), IMAGES),
    "depthwise and gate": (lambda: pooled(nn.Conv2d(3, 8, 3, padding=1), Inverted(), Inverted()), IMAGES),
    "group norm": (
        lambda: pooled(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)),
        IMAGES,
    ),
    "in-place ReLU": (
        lambda: pooled(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(True), nn.Conv2d(8, 8, 3), nn.ReLU(True)),
        IMAGES,
    ),
    "control flow": (ControlFlow, VECTORS),
    "tied weights": (Tied, VECTORS),
    "transformer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(12, 2, 16, 0.0, batch_first=True), nn.Linear(12, 5)),
        SEQUENCES,
    ),
}


@pytest.mark.parametrize("plan", ["packed", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_output_and_gradients_are_the_masked_models(name, plan):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    dense, x = make(), torch.randn(shape)
    ticket = pst.at_init(dense, score="random", granularity="weight", sparsity=0.7)
    sparse = pst.sparsify(copy.deepcopy(dense), ticket, sample=x, plan=plan)
    with torch.no_grad():
        for parameter, mask in ticket.masks.items():
            dense.get_parameter(parameter).mul_(mask)
    expected, actual = dense(x), sparse(x)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    actual.backward(grad)
    # float32 sums of at most a few hundred products in another order, through up to six layers
    assert (actual - expected).norm() <= 1e-5 * expected.norm()
    for parameter, mask in ticket.masks.items():
        layer = sparse.get_submodule(parameter.removesuffix(".weight"))
        wanted = dense.get_parameter(parameter).grad * mask
        assert (layer.dense_like(layer.weight_parameter.grad) - wanted).norm() <= 1e-4 * wanted.norm() + 1e-7
    dense.eval()
    sparse.eval()
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), dense(x), rtol=1e-4, atol=1e-5)


def test_layers_that_cannot_be_packed_run_dense_and_say_why():
    model = pooled(nn.Conv2d(3, 8, 3, padding=1), Inverted())
    ticket = pst.at_init(model, score="random", granularity="weight", sparsity=0.7)
    rows = {row.layer: row for row in pst.plan(pst.sparsify(copy.deepcopy(model), ticket, plan="packed")).layers}
    assert rows["1.depth"].format == "dense" and "groups=16" in rows["1.depth"].why
    assert rows["1.expand"].format == "packed"
    with pytest.raises(ValueError, match="groups=16"):
        pst.sparsify(model, ticket, plan={"1.depth": "packed"})


def test_only_weights_of_one_plain_module_are_prunable():
    assert list(prunable(Tied())) == ["head.weight"]
    attention = nn.TransformerEncoderLayer(12, 2, 16)
    assert list(prunable(attention)) == ["linear1.weight", "linear2.weight"]
    with pytest.raises(ValueError, match="LSTM has no Linear or Conv2d weight of its own to prune"):
        prunable(nn.LSTM(3, 4))


def test_a_mask_of_a_tied_weight_is_refused():
    model = Tied()
    ticket = pst.Ticket(masks={"a.weight": torch.zeros(12, 12, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"a\.weight of a Linear cannot be sparse; .* no other module shares"):
        pst.sparsify(model, ticket)
    assert model.a.weight is model.b.weight and isinstance(model.a, nn.Linear)
