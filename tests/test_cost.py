from __future__ import annotations

import pytest
import torch
from torch import nn

from pysparse_ticket.measure import macs, parameters, peak_bytes


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Conv2d(3, 16, 3, padding=1), (3, 32, 32), 442_368),  # 16*32*32 outputs of 27
        (nn.Conv2d(16, 32, 1, stride=2), (16, 32, 32), 131_072),  # 32*16*16 outputs of 16
        (nn.Conv2d(8, 12, 3, groups=4), (8, 6, 6), 3_456),  # 12*4*4 outputs of 2*9
        (nn.Conv2d(8, 8, (1, 3), dilation=(1, 2), groups=8), (8, 5, 7), 360),  # 8*5*3 outputs of 3
        (nn.Conv1d(2, 3, 5), (2, 9), 150),  # 3*5 outputs of 10
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 5, 5), 2_400),  # 4*25 inputs, each into 6*4
        (nn.Linear(300, 100), (300,), 30_000),
        (nn.Linear(8, 2), (7, 8), 112),  # on each of 7 rows
    ],
    ids=["conv", "projection", "grouped", "depthwise dilated", "conv1d", "transposed", "linear", "linear on rows"],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_macs_of_one_layer(layer, shape, expected, batch):
    assert macs(layer, torch.zeros(batch, *shape)) == expected


class Residual(nn.Module):
    """A block with a projection, whose convolution is used twice."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.projection = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.norm(self.body(self.body(x))) + self.projection(x)


def test_macs_count_each_use_and_leave_the_model_as_it_was():
    model = Residual()
    model.projection.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert macs(model, torch.randn(2, 4, 5, 5)) == 2 * 4 * 25 * 36 + 4 * 25 * 4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and model.norm.training and not model.projection.training
    assert not any(module._forward_hooks for module in model.modules())


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(8, 4)  # how it computes is its own affair

    def forward(self, x):
        return self.dense(x)

    def macs(self, x, output):
        assert x.shape[-1] == 8 and output.shape[-1] == 4
        return len(x) * 5  # five weights survive


def test_module_may_count_itself():
    assert macs(nn.Sequential(Sparse(), nn.Linear(4, 2)), torch.zeros(6, 8)) == 5 + 8


def test_macs_refuse_what_is_no_batch():
    with pytest.raises(ValueError, match=r"shape \(0, 8\)"):
        macs(nn.Linear(8, 2), torch.zeros(0, 8))


def test_parameters_count_tied_ones_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert parameters(model) == 12 + 12 + 6
    model[1].weight = model[0].weight
    assert parameters(model) == 12 + 3 + 6


def test_peak_is_the_most_that_is_held_at_once():
    model = nn.BatchNorm1d(5)  # 4 vectors of 5 float32 and a counter of int64: 88 bytes

    def step():
        a = torch.empty(1_000_000, dtype=torch.uint8)
        b = torch.empty(3_000_000, dtype=torch.uint8)
        del a
        c = torch.empty(500_000, dtype=torch.uint8)
        del b, c
        torch.empty(2_000_000, dtype=torch.uint8)

    assert peak_bytes(step, model) == 88 + 4_000_000


def test_peak_counts_gradients_and_optimizer_state_once():
    model = nn.Linear(500, 400, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, foreach=False)
    weight = 500 * 400 * 4
    images = torch.ones(1, 500)

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(images).sum().backward()
        optimizer.step()

    step()
    peak = peak_bytes(step, model, optimizer)
    # weight, momentum and gradient; on top of them vectors of 400 and 500 numbers
    assert 3 * weight <= peak < 3 * weight + 20_000
    plain = nn.Linear(500, 400, bias=False)

    def forward():
        plain(images)

    assert weight + 1600 <= peak_bytes(forward, plain) < weight + 20_000


@pytest.mark.parametrize("to_none", [True, False], ids=["freed", "zeroed"])
def test_peak_counts_gradients_left_by_the_step_before(to_none):
    model = nn.Linear(500, 400, bias=False)
    model(torch.ones(1, 500)).sum().backward()
    images = torch.ones(1, 500)

    def step():
        torch.empty(4_000_000, dtype=torch.uint8)
        model.zero_grad(set_to_none=to_none)
        model(images).sum().backward()

    assert peak_bytes(step, model) == 2 * 500 * 400 * 4 + 4_000_000


def test_peak_sees_a_big_temporary_of_the_backward_pass():
    class Wasteful(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            torch.empty(10_000_000, dtype=torch.uint8)
            return grad

    model = nn.Linear(4, 4)
    peak = peak_bytes(lambda: Wasteful.apply(model(torch.ones(2, 4))).sum().backward(), model)
    assert 10_000_000 <= peak < 10_010_000


def test_peak_on_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="not on 'meta'"):
        peak_bytes(lambda: None, nn.Linear(1, 1), device="meta")
