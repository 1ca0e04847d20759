import pytest
import torch

from pysparse_ticket.ops.mask_gradient import mask_gradient

LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "strided": lambda t: t.transpose(0, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_is_the_product(layout, dtype, isa):
    torch.manual_seed(0)
    grad, mask = layout(torch.randn(33, 7, 3, 5, dtype=dtype)), layout(torch.rand(33, 7, 3, 5) < 0.4)
    expected = torch.where(mask, grad, 0)
    assert torch.equal(mask_gradient(grad.clone(), mask), grad * mask)  # double backward: a fresh tensor
    with torch.no_grad():
        assert torch.equal(mask_gradient(grad, mask), expected) and torch.equal(grad, expected)


@pytest.mark.parametrize("size", [0, 1, 1 << 19])
def test_sizes(size):
    grad, mask = torch.full((size,), torch.nan), torch.zeros(size, dtype=torch.bool)
    mask[::3] = True
    with torch.no_grad():
        assert torch.equal(mask_gradient(grad, mask).isnan(), mask)


def test_layouts_that_differ():
    grad = torch.randn(4, 6, 3, 3).contiguous(memory_format=torch.channels_last)
    mask = torch.rand(4, 6, 3, 3) < 0.5
    with torch.no_grad():
        assert torch.equal(mask_gradient(grad.clone(), mask), torch.where(mask, grad, 0))


def test_opcheck():
    torch.library.opcheck(torch.ops.pysparse_ticket.mask_gradient_.default, (torch.randn(5, 7), torch.rand(5, 7) < 0.5))
    with pytest.raises(RuntimeError, match="a float32 gradient and a bool mask of its size"):
        torch.ops.pysparse_ticket.mask_gradient_(torch.randn(3), torch.ones(4, dtype=torch.bool))
