"""MaskedLinear and MaskedConv2d: the dense module with pruned weights at zero, in both formats."""

import copy
import io

import pytest
import torch
from torch import nn

from pysparse_ticket.nn.masked_conv2d import MaskedConv2d
from pysparse_ticket.nn.masked_linear import MaskedLinear

FORMATS = ("packed", "dense")
LAYERS = {
    "linear": (MaskedLinear, lambda: nn.Linear(19, 23), (9, 19)),
    "linear without bias": (MaskedLinear, lambda: nn.Linear(19, 23, bias=False), (9, 19)),
    "conv": (MaskedConv2d, lambda: nn.Conv2d(5, 7, 3, padding=1), (2, 5, 8, 8)),
    "strided conv": (MaskedConv2d, lambda: nn.Conv2d(5, 7, 3, stride=2, padding=(1, 0), bias=False), (2, 5, 9, 8)),
    "dilated conv": (MaskedConv2d, lambda: nn.Conv2d(5, 7, 3, padding=2, dilation=2), (2, 5, 8, 8)),
}
layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
formats = pytest.mark.parametrize("fmt", FORMATS)


def make(layer, fmt="packed", density=0.4, device="cpu"):
    cls, dense, shape = layer
    torch.manual_seed(0)
    dense = dense()
    mask = (torch.rand(dense.weight.shape) < density).to(device)
    x = torch.randn(shape).to(device)
    dense = dense.to(device)
    masked = cls.from_dense(dense, mask)
    masked.set_format(fmt)
    with torch.no_grad():
        dense.weight *= mask
    return masked, dense, mask, x


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fmt", ["tiles", "pixels"])
def test_layouts_of_a_convolution_are_formats(fmt):
    masked, dense, _, x = make(LAYERS["conv"], fmt)
    assert masked.format == fmt and close(masked(x), dense(x)) and torch.equal(masked.weight, dense.weight)
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(masked).state_dict(), buffer)
    buffer.seek(0)
    dense.load_state_dict(torch.load(buffer, weights_only=True))
    with pytest.raises(ValueError, match=f"unknown format '{fmt}'; known: packed, 2:4, blocks, reordered, dense"):
        make(LAYERS["linear"], fmt)


@formats
@layers
def test_equals_the_dense_module_with_zeros(layer, fmt, device):
    masked, dense, mask, x = make(layer, fmt, device=device)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = masked(x1), dense(x2)
    assert masked.format == fmt and close(y, expected)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    assert close(x1.grad, x2.grad)
    assert close(masked.dense_like(masked.weight_parameter.grad), dense.weight.grad * mask)
    if dense.bias is not None:
        assert close(masked.bias.grad, dense.bias.grad)


@formats
@layers
def test_weight_mask_and_counts(layer, fmt, device):
    masked, dense, mask, x = make(layer, fmt, device=device)
    assert torch.equal(masked.weight, dense.weight) and torch.equal(masked.mask, mask)
    assert masked.nnz == int(mask.sum()) and masked.sparsity == pytest.approx(1 - mask.float().mean().item())
    names = {name for name, _ in masked.named_parameters()} - {"bias"}
    assert names == {"values" if fmt == "packed" else "weight"}
    assert masked.weight_parameter.numel() == (masked.nnz if fmt == "packed" else mask.numel())
    y = masked(x)
    assert masked.macs(x, y) == int(mask.sum()) * y.numel() // mask.shape[0]
    assert f"format={fmt}" in repr(masked) and f"sparsity={masked.sparsity:.4f}" in repr(masked)


@formats
@layers
def test_state_dict_is_the_dense_one(layer, fmt, device):
    masked, dense, _, _ = make(layer, fmt, device=device)
    state = masked.state_dict()
    assert list(state) == list(dense.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), dense.state_dict().values(), strict=True))
    file = io.BytesIO()
    torch.save(nn.Sequential(masked).state_dict(), file)
    file.seek(0)
    nn.Sequential(dense).load_state_dict(torch.load(file, weights_only=True), strict=True)


@formats
@layers
@pytest.mark.parametrize("assign", [False, True])
def test_loads_a_dense_state_dict_and_keeps_what_survives(layer, fmt, assign, device):
    masked, dense, mask, x = make(layer, fmt, device=device)
    nn.init.normal_(dense.weight)
    result = masked.load_state_dict(dense.state_dict(), strict=True, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(masked.weight, dense.weight * mask)
    assert masked(x).requires_grad


@formats
def test_a_state_dict_that_does_not_fit_is_named(fmt):
    masked = make(LAYERS["linear"], fmt)[0]
    with pytest.raises(RuntimeError, match=r"0.weight has the shape \(2, 2\); the masked layer's is \(23, 19\)"):
        nn.Sequential(masked).load_state_dict({"0.weight": torch.zeros(2, 2), "0.bias": torch.zeros(23)})
    missing = masked.load_state_dict({"bias": torch.zeros(23), "extra": torch.zeros(1)}, strict=False)
    assert missing.missing_keys == ["weight"] and missing.unexpected_keys == ["extra"]


@formats
@layers
def test_to_dense(layer, fmt, device):
    masked, dense, _, x = make(layer, fmt, device=device)
    masked.weight_parameter.requires_grad_(False)
    plain = masked.eval().to_dense()
    assert type(plain) is type(dense) and not plain.training and not plain.weight.requires_grad
    assert torch.equal(plain.weight, dense.weight) and close(plain(x), dense(x))
    assert repr(plain) == repr(dense)


@layers
def test_formats_change_back_and_forth_with_their_gradients(layer, device):
    masked, dense, mask, x = make(layer, device=device)
    masked(x).square().sum().backward()
    grad = masked.dense_like(masked.values.grad)
    packed = [fmt for fmt in masked.FORMATS if fmt != "dense" and not masked.why_not(fmt)]
    for fmt in ("dense", *packed, "packed", "dense"):
        masked.set_format(fmt)
        assert torch.equal(masked.weight, dense.weight) and torch.equal(masked.mask, mask)
        assert torch.equal(masked.dense_like(masked.weight_parameter.grad), grad)
        assert next(iter(dict(masked.named_parameters()))) == ("weight" if fmt == "dense" else "values")
    with pytest.raises(ValueError, match=f"unknown format 'csr'; known: {', '.join(masked.FORMATS)}"):
        masked.set_format("csr")


@formats
@pytest.mark.parametrize("layer", [LAYERS["linear"], LAYERS["conv"]], ids=["linear", "conv"])
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    ],
    ids=["sgd", "adam", "adamw"],
)
def test_optimizers_keep_pruned_weights_at_zero(layer, fmt, make_optimizer, device):
    masked, _, mask, x = make(layer, fmt, device=device)
    before = masked.weight.detach().clone()
    optimizer = make_optimizer(masked.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        masked(x).square().mean().backward()
        optimizer.step()
    after = masked.weight.detach()
    assert (after[~mask] == 0).all() and (after[mask] != before[mask]).all()


@formats
def test_both_formats_train_alike(fmt, device):
    masked, dense, mask, x = make(LAYERS["linear"], fmt, device=device)
    for module in (masked, dense):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            if module is dense:
                module.weight.grad *= mask
            optimizer.step()
    assert close(masked.weight, dense.weight)


@formats
@layers
def test_copies_and_frozen_parameters(layer, fmt):
    masked = make(layer, fmt)[0]
    twin = copy.deepcopy(masked)
    with torch.no_grad():
        twin.weight_parameter.zero_()
    assert masked.weight.any() and not twin.weight.any()
    cls, dense, _ = layer
    dense = dense().requires_grad_(False).eval()
    frozen = cls.from_dense(dense, torch.ones_like(dense.weight, dtype=torch.bool))
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.training
    assert masked.weight_parameter.data_ptr() != dense.weight.data_ptr()


def assigned(masked):
    masked.load_state_dict({name: tensor.clone() for name, tensor in masked.state_dict().items()}, assign=True)
    return masked


def saved_and_loaded(masked):
    buffer = io.BytesIO()
    torch.save(masked, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": saved_and_loaded,
    "assigned state": assigned,
    "another dtype": lambda masked: masked.double().float(),
    "packed and back": lambda masked: (masked.set_format("packed"), masked.set_format("dense"), masked)[-1],
    "compiled copy": lambda masked: torch.compile(copy.deepcopy(masked), backend="aot_eager", fullgraph=True),
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_gradients_of_copies_in_the_dense_format_are_masked(make_copy, device):
    masked, _, mask, x = make(LAYERS["linear"], "dense", device=device)
    twin = make_copy(masked)
    y = twin(x)
    weight = twin.weight
    del twin, masked
    y.square().sum().backward()
    assert (weight.grad[~mask] == 0).all() and (weight.grad[mask] != 0).all()


def test_the_dense_format_keeps_channels_last(device):
    conv = nn.Conv2d(5, 7, 3).to(memory_format=torch.channels_last)
    grouped = nn.Conv2d(6, 6, 3, groups=3).to(memory_format=torch.channels_last)  # stays dense from the start
    for dense in (conv.to(device), grouped.to(device)):
        masked = MaskedConv2d.from_dense(dense, torch.rand(dense.weight.shape) < 0.5)
        masked.set_format("dense")
        assert masked.weight.is_contiguous(memory_format=torch.channels_last)


def test_double_backward_in_the_dense_format(device):
    masked, _, mask, x = make(LAYERS["linear"], "dense", device=device)
    (grad,) = torch.autograd.grad(masked(x).square().sum(), masked.weight, create_graph=True)
    grad.square().sum().backward()
    assert (grad[~mask] == 0).all() and (masked.weight.grad[~mask] == 0).all() and masked.weight.grad.any()


@formats
@layers
def test_replicas_hold_plain_tensors(layer, fmt):
    """As nn.DataParallel makes them: parameters replaced by tensors that carry gradients back."""
    masked, dense, _, x = make(layer, fmt)
    replica = masked._replicate_for_data_parallel()
    for name, parameter in masked.named_parameters():
        setattr(replica, name, parameter * 1)
    y = replica(x)
    y.sum().backward()
    assert close(y, dense(x)) and masked.weight_parameter.grad is not None


@formats
@layers
def test_moves_to_another_dtype_and_device(layer, fmt):
    masked, dense, _, x = make(layer, fmt)
    assert close(masked.double()(x.double()).float(), dense(x))
    meta = masked.to("meta")
    assert all(t.device.type == "meta" for t in (*meta.parameters(), *meta.buffers()))


@formats
@pytest.mark.parametrize("layer", [LAYERS["linear"], LAYERS["conv"]], ids=["linear", "conv"])
def test_compiles_without_a_graph_break(layer, fmt, device):
    masked, dense, _, x = make(layer, fmt, device=device)
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    y.sum().backward()
    assert close(y, dense(x)) and masked.weight_parameter.grad is not None


def test_autocast(device):
    masked, dense, _, x = make(LAYERS["linear"], device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = masked(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), dense(x), rtol=2**-7, atol=2**-6)


@formats
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_zero_and_full_masks(fmt, density, device):
    for layer in (LAYERS["linear"], LAYERS["conv"]):
        masked, dense, _, x = make(layer, fmt, density, device)
        masked(x).sum().backward()
        assert close(masked(x), dense(x)) and masked.sparsity == 1 - density


UNPACKABLE = {
    "groups": (lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3), "groups=3"),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), "groups=6"),
    "reflecting": (lambda: nn.Conv2d(6, 9, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
    "circular same": (lambda: nn.Conv2d(6, 9, 4, padding="same", padding_mode="circular"), "padding_mode='circular'"),
    "lopsided same": (lambda: nn.Conv2d(6, 9, 4, padding="same"), "not the same on both sides"),
}


@pytest.mark.parametrize(("dense", "why"), UNPACKABLE.values(), ids=UNPACKABLE)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_convolutions_that_stay_dense_say_why(dense, why, device):
    dense = dense().to(device)
    mask = torch.rand(dense.weight.shape, device=device) < 0.5
    masked = MaskedConv2d.from_dense(dense, mask)
    with torch.no_grad():
        dense.weight *= mask
    x = torch.randn(2, 6, 8, 8, device=device)
    assert masked.format == "dense" and why in masked.why_dense and masked.why_dense in repr(masked)
    assert torch.equal(masked(x), dense(x)) and torch.equal(masked.to_dense()(x), dense(x))
    with pytest.raises(ValueError, match="this layer cannot be packed"):
        masked.set_format("packed")


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_string_paddings_that_can_be_packed(padding, device):
    masked, dense, _, x = make(
        (MaskedConv2d, lambda: nn.Conv2d(5, 7, (3, 5), padding=padding), (2, 5, 8, 8)), device=device
    )
    assert masked.why_dense is None and close(masked(x), dense(x))


def test_masks_that_do_not_fit_are_refused():
    linear = nn.Linear(3, 2)
    message = r"the mask's shape \(3, 2\) is not the Linear's weight shape \(2, 3\)"
    with pytest.raises(ValueError, match=message):
        MaskedLinear.from_dense(linear, torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"the mask of a Linear is a bool tensor, not torch\.float32"):
        MaskedLinear.from_dense(linear, torch.ones(2, 3))
    with pytest.raises(ValueError, match="the mask of a Conv2d is a bool tensor, not list"):
        MaskedConv2d.from_dense(nn.Conv2d(1, 1, 1), [True])
