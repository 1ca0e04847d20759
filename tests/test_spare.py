"""Filters filled up with zeros to a number that hardware likes."""

import copy

import pytest
import torch
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.nn.spare import spare_units
from pysparse_ticket.structure import find_channels
from pysparse_ticket.ticket import Ticket


class Block(nn.Module):
    """A residual block whose inner channels go alone, between two convolutions that are coupled by the add."""

    def __init__(self, gate: nn.Module):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.inner = nn.Conv2d(6, 7, 3, padding=1)
        self.norm = nn.BatchNorm2d(7)
        self.gate = gate
        self.outer = nn.Conv2d(7, 6, 3, padding=1, bias=False)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.outer(self.gate(self.norm(self.inner(x))))
        return self.head(x.mean((2, 3)))


def model_and_ticket(gate):
    torch.manual_seed(0)
    model = Block(gate).double()
    inner = torch.tensor([False, True, False, True, False, True, False])
    coupled = torch.tensor([True, False, True, True, False, True])
    filters = {"stem": coupled, "outer": coupled.clone(), "inner": inner}
    return model, Ticket(masks={}, filters=filters, architecture=pst.ticket.fingerprint(model))


def train(model, x, steps=4):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, weight_decay=0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_earliest_removed_units_fill_up():
    model, ticket = model_and_ticket(nn.ReLU())
    channels = find_channels(model)
    gone = channels.removed(ticket.filters)
    back = spare_units(channels, gone, 4)
    inner = channels.producers["inner"]
    # three of seven stay, a fourth fills up: the first that was removed; four of six stay already
    assert back == {inner[0]}
    back = spare_units(channels, gone, 8)
    assert back == gone  # all seven and all six, since there are no eight
    assert spare_units(channels, gone, 1) == set()


@pytest.mark.parametrize("gate", [nn.ReLU(), nn.GELU()], ids=["relu", "gelu"])
def test_spare_filters_stay_zero_and_change_nothing(gate):
    model, ticket = model_and_ticket(gate)
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    exact = pst.sparsify(copy.deepcopy(model), ticket)
    filled = pst.sparsify(model, ticket, sample=x, plan="compact", round_to=4)
    assert exact.inner.weight.shape == (3, 4, 3, 3) and filled.inner.weight.shape == (4, 4, 3, 3)
    assert filled.norm.num_features == 4 and filled.outer.weight.shape == (4, 4, 3, 3)
    torch.testing.assert_close(train(filled, x), train(exact, x), rtol=1e-10, atol=0)
    assert (filled.inner.weight[0] == 0).all() and filled.inner.bias[0] == 0 and filled.norm.weight[0] == 0
    assert (filled.outer.weight[:, 0] == 0).all() and filled.norm.bias[0] == 0
    for name, value in filled.state_dict().items():
        torch.testing.assert_close(value, exact.state_dict()[name], rtol=1e-9, atol=1e-12, msg=name)
    assert not filled.inner.mask[0].any() and torch.equal(filled.inner.mask, exact.inner.mask)


def test_momentum_of_a_removed_filter_does_not_come_along():
    model, ticket = model_and_ticket(nn.ReLU())
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).sum().backward()
    optimizer.step()
    filled = pst.sparsify(model, ticket, sample=x, optimizer=optimizer, plan="compact", round_to=4)
    assert (optimizer.state[filled.inner.weight]["momentum_buffer"][0] == 0).all()
    assert (optimizer.state[filled.inner.weight]["momentum_buffer"][1] != 0).any()


def test_zeros_that_would_not_stay_are_not_added():
    model, ticket = model_and_ticket(nn.Sigmoid())  # makes 0.5 of a channel of zeros
    filled = pst.sparsify(model, ticket, sample=torch.randn(5, 3, 6, 6).double(), plan="compact", round_to=4)
    assert filled.inner.weight.shape[0] == 3
    assert "would not stay zero" in str(pst.plan(filled))


def test_rounding_needs_a_sample():
    model, ticket = model_and_ticket(nn.ReLU())
    with pytest.raises(ValueError, match=r"round_to=4: .* above 1 it needs a sample"):
        pst.sparsify(model, ticket, round_to=4)
    assert isinstance(model.inner, nn.Conv2d)
