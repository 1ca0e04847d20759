"""A masked layer takes another mask in place; what an optimizer knows moves with the weights."""

import pytest
import torch
from test_nn_masked import LAYERS, make
from torch import nn

from pysparse_ticket.nn.masked_conv2d import MaskedConv2d
from pysparse_ticket.nn.masked_linear import MaskedLinear
from pysparse_ticket.nn.swaps import carry

FORMATS = ("packed", "dense")
layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
formats = pytest.mark.parametrize("fmt", FORMATS)


def other_mask(mask, moved):
    """As many weights, ``moved`` of them elsewhere."""
    new = mask.clone().reshape(-1)
    new[mask.reshape(-1).nonzero().flatten()[:moved]] = False
    new[(~mask.reshape(-1)).nonzero().flatten()[:moved]] = True
    return new.reshape(mask.shape)


def trained(masked, x):
    optimizer = torch.optim.Adam(masked.parameters(), lr=0.1)
    masked(x).square().sum().backward()
    optimizer.step()
    return optimizer


def set_mask(masked, optimizer, *masks):
    old = masked.weight_parameter
    carry(optimizer, {old: masked.set_mask(*masks)})


def test_values_and_moments_by_hand():
    linear = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    masked = MaskedLinear.from_dense(linear, torch.tensor([[True, False, True], [False, True, False]]))
    optimizer = torch.optim.SGD(masked.parameters(), lr=1, momentum=0.5)
    values = masked.values
    assert values.tolist() == [1, 3, 5]
    optimizer.state[values]["momentum_buffer"] = torch.tensor([10.0, 30, 50])
    values.grad = torch.tensor([7.0, 8, 9])
    # 3 goes, the second of the lower row's comes before 5: in the order of the rows 1, new, 5
    set_mask(masked, optimizer, torch.tensor([[True, False, False], [True, True, False]]))
    assert masked.values is values and values.tolist() == [1, 0, 5]
    assert masked.weight.tolist() == [[1, 0, 0], [0, 5, 0]]
    assert optimizer.state[values]["momentum_buffer"].tolist() == [10, 0, 50] and values.grad.tolist() == [7, 0, 9]
    # 5 stays under the mask, but does not keep its value
    both = torch.tensor([[True, False, False], [True, True, False]])
    set_mask(masked, optimizer, both, torch.tensor([[True, True, True], [True, False, True]]))
    assert values.tolist() == [1, 0, 0] and optimizer.state[values]["momentum_buffer"].tolist() == [10, 0, 0]


@formats
@layers
def test_is_the_layer_of_the_new_mask(layer, fmt, device):
    masked, dense, mask, x = make(layer, fmt, device=device)
    optimizer = trained(masked, x)
    parameter, new = masked.weight_parameter, other_mask(mask, 40)
    weight, grad = masked.weight.detach().clone(), masked.dense_like(parameter.grad)
    moments = masked.dense_like(optimizer.state[parameter]["exp_avg"])
    set_mask(masked, optimizer, new)
    assert masked.weight_parameter is parameter and masked.format == fmt and torch.equal(masked.mask, new)
    assert torch.equal(masked.weight, weight * (mask & new)) and masked.nnz == int(mask.sum())
    assert torch.equal(masked.dense_like(parameter.grad), grad * (mask & new))
    state = optimizer.state[parameter]
    assert torch.equal(masked.dense_like(state["exp_avg"]), moments * (mask & new)) and state["step"] == 1
    dense.load_state_dict(masked.state_dict())
    optimizer.zero_grad()
    for module in (masked, dense):
        (module(x) - 1).square().sum().backward()
    torch.testing.assert_close(masked(x), dense(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(masked.dense_like(parameter.grad), dense.weight.grad * new, rtol=1e-4, atol=1e-4)
    optimizer.step()
    assert (masked.weight[new] != 0).all() and (masked.weight[~new] == 0).all()


@formats
@layers
def test_another_number_of_weights(layer, fmt, device):
    masked, dense, mask, x = make(layer, fmt, device=device)
    optimizer = trained(masked, x)
    weight = masked.weight.detach().clone()
    new = mask.clone()
    new[0] = True
    new[1] = False
    set_mask(masked, optimizer, new)
    assert masked.nnz == int(new.sum()) and torch.equal(masked.weight, weight * (mask & new))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in masked.parameters()} and set(optimizer.state) == set(masked.parameters())
    dense.load_state_dict(masked.state_dict())
    torch.testing.assert_close(masked(x), dense(x), rtol=1e-4, atol=1e-5)
    optimizer.step()
    assert (masked.weight[~new] == 0).all()


def test_formats_change_after_it(device):
    masked, _, mask, _ = make(LAYERS["conv"], device=device)
    new = other_mask(mask, 30)
    masked.set_mask(new)
    weight = masked.weight.detach().clone()
    for fmt in ("dense", "pixels", "packed"):
        masked.set_format(fmt)
        assert torch.equal(masked.mask, new) and torch.equal(masked.weight, weight)


def test_masks_that_do_not_fit_change_nothing():
    masked, _, mask, _ = make(LAYERS["linear"])
    before = masked.weight.detach().clone()
    with pytest.raises(ValueError, match=r"the mask's shape \(19, 23\) is not the MaskedLinear's weight shape"):
        masked.set_mask(mask.T)
    with pytest.raises(ValueError, match=r"is a bool tensor, not torch\.float32"):
        masked.set_mask(~mask, mask.float())
    assert torch.equal(masked.weight, before) and torch.equal(masked.mask, mask)


GEOMETRIES = {
    **{name: (dense, shape) for name, (_, dense, shape) in LAYERS.items()},
    "linear of sequences": (lambda: nn.Linear(5, 3), (2, 4, 5)),
    "groups": (lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3), (2, 6, 8, 8)),
    "reflecting": (lambda: nn.Conv2d(6, 9, 3, padding=(2, 1), padding_mode="reflect"), (2, 6, 8, 8)),
    "lopsided same": (lambda: nn.Conv2d(6, 9, 4, padding="same"), (2, 6, 8, 8)),
    "same": (lambda: nn.Conv2d(6, 9, 3, padding="same", dilation=2), (2, 6, 8, 8)),
    "one image": (lambda: nn.Conv2d(6, 9, 3, padding=1, padding_mode="circular"), (6, 8, 8)),
}


@pytest.mark.parametrize(("dense", "shape"), GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_dense_gradient_is_that_of_the_dense_layer(dense, shape, device):
    torch.manual_seed(0)
    dense, x = dense().to(device), torch.randn(shape, device=device)
    cls = MaskedLinear if isinstance(dense, nn.Linear) else MaskedConv2d
    masked = cls.from_dense(dense, torch.rand(dense.weight.shape, device=device) < 0.3)
    y = dense(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(masked.dense_gradient(x, grad), dense.weight.grad, rtol=1e-4, atol=1e-4)
