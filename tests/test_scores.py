"""Scores against values worked out by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pysparse_ticket.scores import SCORES, grasp, grasp_signed, lookup, magnitude, prunable, random, snip


class Diagonal(nn.Module):
    """y = w1 * x1 + w2 * x2, so that with L = y^2 / 2 the gradient and the Hessian fit on a line."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[2.0, -3.0]]))

    def forward(self, x):
        return self.fc(x)


def half_square(output, _):
    return (output**2).sum() / 2


BATCH = (torch.tensor([[1.0, 2.0]]), torch.zeros(1))
# y = 2 * 1 - 3 * 2 = -4, g = y x = (-4, -8), H = x x^T = [[1, 2], [2, 4]], Hg = (-20, -40)


def test_snip_is_abs_theta_g():
    assert snip(Diagonal(), BATCH, loss=half_square)["fc.weight"].tolist() == [[8.0, 24.0]]


def test_signed_grasp_is_theta_g():
    assert grasp_signed(Diagonal(), BATCH, loss=half_square)["fc.weight"].tolist() == [[-8.0, 24.0]]


def test_grasp_is_theta_hg():
    assert grasp(Diagonal(), BATCH, loss=half_square, temperature=1.0)["fc.weight"].tolist() == [[-40.0, 120.0]]
    # temperature T divides the output, so g and H each carry 1 / T^2
    cooled = grasp(Diagonal(), BATCH, loss=half_square, temperature=2.0)["fc.weight"]
    assert cooled.tolist() == [[-40.0 / 16, 120.0 / 16]]


def test_batches_are_averaged():
    second = (torch.tensor([[3.0, 0.0]]), torch.zeros(1))  # y = 6, g = (18, 0)
    mean = snip(Diagonal(), [BATCH, second], loss=half_square)["fc.weight"]
    assert mean.tolist() == [[2 * abs(-4 + 18) / 2, 3 * 8 / 2]]
    # Hg with the mean g = (7, -4): H1 g = (-1, -2), H2 g = (63, 0), mean (31, -1)
    both = grasp(Diagonal(), [BATCH, second], loss=half_square, temperature=1.0)["fc.weight"]
    assert both.tolist() == [[62.0, 3.0]]


def test_grasp_of_a_loss_without_curvature_is_zero():
    assert grasp(Diagonal(), BATCH, loss=lambda out, _: out.sum(), temperature=1.0)["fc.weight"].tolist() == [
        [0.0, 0.0]
    ]


def test_grasp_against_a_numerical_hessian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    names = list(prunable(model))
    params = [model.get_parameter(n) for n in names]

    def loss_at(*weights):
        out = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x,))
        return F.cross_entropy(out / 200, y)

    grads = torch.autograd.grad(loss_at(*params), params)
    hessian = torch.autograd.functional.hessian(loss_at, tuple(p.detach() for p in params))
    scores = grasp(model, (x, y))
    for i, name in enumerate(names):
        hg = sum(torch.tensordot(hessian[i][j], grads[j], dims=2) for j in range(len(names)))
        torch.testing.assert_close(scores[name], params[i].detach() * hg, rtol=1e-9, atol=1e-18)


def test_magnitude_and_random():
    model = Diagonal()
    assert magnitude(model)["fc.weight"].tolist() == [[2.0, 3.0]]
    state = torch.get_rng_state()
    a, b, c = (random(model, seed=s)["fc.weight"] for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["snip", "grasp", "grasp-signed"])
def test_scoring_leaves_the_model_as_it_was(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).eval()
    before = copy.deepcopy(model.state_dict())
    lookup(name)(model, (torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 0, 1])))
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_bn_mode_decides_the_scores():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    batch = (torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0]))
    a, b = (snip(model, batch, bn_mode=mode)["0.weight"] for mode in ("train", "eval"))
    assert not torch.allclose(a, b)
    with pytest.raises(ValueError, match="known: train, eval"):
        snip(model, batch, bn_mode="frozen")


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="known: magnitude, random, snip, grasp, grasp-signed"):
        lookup("l3")
    with pytest.raises(ValueError, match="needs data"):
        snip(Diagonal())
    model = Diagonal()
    with torch.no_grad():
        model.fc.weight[0, 0] = torch.nan
    for score in SCORES.values():
        with pytest.raises(ValueError, match=r"fc\.weight holds NaN"):
            score(model, BATCH)
    with pytest.raises(ValueError, match="no Linear or Conv2d weight of its own"):
        magnitude(nn.Sequential(nn.ReLU()))
