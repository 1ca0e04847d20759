"""A gradient's zeros where its weight is pruned, for layers that run dense."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import CPU_ERROR, NAMESPACE


def mask_gradient(grad: Tensor, mask: Tensor) -> Tensor:
    """Equal to ``grad * mask``, where it can in grad's own memory: outside of double backward nobody else holds it.

    grad and the bool mask are of one shape. The C++ kernel takes float32 on the CPU in one memory format, and moves 9
    bytes a weight where a product of two float tensors moves 12 and one with a bool mask takes ten times as long.
    """
    if torch.is_grad_enabled():
        return grad * mask
    if CPU_ERROR or grad.dtype != torch.float32 or not grad.is_cpu or not _lie_alike(grad, mask):
        return grad.mul_(mask)
    torch.ops.pysparse_ticket.mask_gradient_.default(grad, mask)
    return grad


def _lie_alike(a: Tensor, b: Tensor) -> bool:
    if a.is_contiguous():
        return b.is_contiguous()
    last = {"memory_format": torch.channels_last}
    return a.is_contiguous(**last) and b.is_contiguous(**last)


if not CPU_ERROR:

    @torch.library.register_fake(f"{NAMESPACE}::mask_gradient_")
    def _(grad, mask):
        return None
