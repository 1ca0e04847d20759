import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.nn import CompactBatchNorm2d, FilterSparseConv2d


def case(stride, padding, dilation, bias=True, kernel=3, device="cpu"):
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 7, kernel, stride, padding, dilation, bias=bias).double().to(device)
    keep_out = torch.tensor([True, False, True, True, False, False, True], device=device)
    keep_in = torch.tensor([True, True, False, True, False], device=device)
    return conv, keep_out, keep_in, torch.randn(3, 5, 9, 11, dtype=torch.float64, device=device, requires_grad=True)


@pytest.mark.parametrize("kernel", [1, 3], ids=lambda k: f"k{k}")
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 1, 1), (1, 0, 2), (2, 3, 2)])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_equals_the_masked_convolution(kernel, stride, padding, dilation, bias, device):
    conv, keep_out, keep_in, x = case(stride, padding, dilation, bias, kernel, device)
    sparse = FilterSparseConv2d.from_dense(conv, keep_out, keep_in)
    weight = (conv.weight * keep_out[:, None, None, None] * keep_in[None, :, None, None]).detach().requires_grad_()
    shift = (conv.bias * keep_out).detach().requires_grad_() if bias else None
    expected = F.conv2d(x, weight, shift, stride, padding, dilation)
    actual = sparse(x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert (actual[:, ~keep_out] == 0).all()
    grad = torch.randn_like(expected)
    grad_x, grad_w = torch.autograd.grad(expected, (x, weight), grad)
    mine_x, mine_w = torch.autograd.grad(actual, (x, sparse.weight), grad)
    torch.testing.assert_close(mine_x, grad_x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine_w, grad_w[keep_out][:, keep_in], rtol=1e-12, atol=1e-12)
    assert sparse.macs(x, actual) == 3 * actual.shape[2] * actual.shape[3] * 4 * 3 * kernel**2


def test_state_dict_is_the_dense_one(device):
    conv, keep_out, keep_in, x = case(1, 1, 1, device=device)
    sparse = FilterSparseConv2d.from_dense(conv, keep_out, keep_in)
    fresh = nn.Conv2d(5, 7, 3, padding=1).double().to(device)
    fresh.load_state_dict(sparse.state_dict())
    torch.testing.assert_close(fresh(x)[:, keep_out], sparse(x)[:, keep_out])
    assert (fresh.weight[~keep_out] == 0).all() and (fresh.weight[:, ~keep_in] == 0).all()
    other = FilterSparseConv2d.from_dense(nn.Conv2d(5, 7, 3, padding=1).double().to(device), keep_out, keep_in)
    other.load_state_dict(conv.state_dict())
    assert torch.equal(other(x), sparse(x)) and torch.equal(copy.deepcopy(sparse)(x), sparse(x))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        other.load_state_dict(nn.Conv2d(5, 8, 3).double().state_dict(), strict=False)


def test_compact_norm_carries_its_statistics(device):
    norm = nn.BatchNorm2d(4).to(device)
    with torch.no_grad():
        norm.running_mean.copy_(torch.arange(4.0, device=device))
        norm.weight.copy_(torch.arange(4.0, device=device) + 1)
    keep = torch.tensor([True, False, False, True])
    compact = CompactBatchNorm2d.from_dense(norm, keep)
    assert compact.running_mean.tolist() == [0.0, 3.0] and compact.weight.tolist() == [1.0, 4.0]
    state = compact.state_dict()
    assert state["running_mean"].tolist() == [0.0, 0.0, 0.0, 3.0] and state["weight"].tolist() == [1.0, 0.0, 0.0, 4.0]
    nn.BatchNorm2d(4).load_state_dict(state)


@pytest.mark.parametrize(
    ("conv", "keep_out", "words"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), torch.ones(4, dtype=torch.bool), "one group, not 2"),
        (nn.Conv2d(4, 4, 3, padding_mode="circular"), torch.ones(4, dtype=torch.bool), "pads with zeros"),
        (nn.Conv2d(4, 4, 3), torch.ones(5, dtype=torch.bool), r"keep_out must be a bool tensor of shape \(4,\)"),
        (nn.Conv2d(4, 4, 3), torch.zeros(4, dtype=torch.bool), "must each keep a channel"),
    ],
    ids=["groups", "circular", "shape", "empty"],
)
def test_bad_input_is_refused(conv, keep_out, words):
    with pytest.raises(ValueError, match=words):
        pst.nn.FilterSparseConv2d.from_dense(conv, keep_out)
