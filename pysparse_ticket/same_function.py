"""Whether a sparsified network computes, and learns, what the dense one with its ticket's zeros does."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .nn import densify
from .ticket import Ticket

LOGITS_ERROR = 1e-3  # fp32 sums in another order through up to 56 layers with batch norms
UPDATE_ERROR = 5e-2  # where a ReLU's input rounds to the other side of zero, gradients jump: 1e-2 between torch's own


class WrongResult(ArithmeticError):
    """A sparsified model that does not compute its ticket's function."""


def masked_dense(model: nn.Module, ticket: Ticket) -> nn.Module:
    """A copy of the freshly drawn plain network with the ticket's weights and filters zero and its blocks skipped."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in ticket.masks.items():
            twin.get_parameter(name).mul_(mask.to(twin.get_parameter(name).device))
        for name, kept in ticket.filters.items():
            # a zero channel stays zero through a fresh batch norm, whose bias is 0
            for parameter in twin.get_submodule(name).parameters():
                parameter[~kept.to(parameter.device)] = 0
    for name in ticket.removed_blocks:
        twin.set_submodule(name, nn.Identity())
    return twin


def check(what: str, model: nn.Module, dense: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Relative errors of the batch's logits and of the surviving weights' first update; WrongResult for large ones."""
    ours, theirs = copy.deepcopy(model).train(), copy.deepcopy(dense).train()
    before = _weights(densify(copy.deepcopy(model)))
    logits = []
    with strict_float32():
        for one in (ours, theirs):
            out = one(x)
            F.cross_entropy(out, y).backward()
            torch.optim.SGD(one.parameters(), 1.0).step()
            logits.append(out.detach())
    start, after, wanted = _weights(dense), _weights(densify(ours)), _weights(theirs)
    moved = torch.cat([(after[name] - w)[w != 0] for name, w in before.items()])
    should = torch.cat([(wanted[name] - start[name])[w != 0] for name, w in before.items()])
    errors = {"logits": _relative(*logits), "weight updates": _relative(moved, should)}
    for name, limit in (("logits", LOGITS_ERROR), ("weight updates", UPDATE_ERROR)):
        if not errors[name] < limit:
            raise WrongResult(
                f"{what}: the sparsified model's {name} differ from the masked dense network's by {errors[name]:.1e} "
                f"of the norm, more than {limit:g}; its times would mean nothing"
            )
    return errors


@contextlib.contextmanager
def strict_float32() -> Iterator[None]:
    """Within it no product or convolution on a GPU takes TF32, whose 10 bits would hide an error."""
    if not torch.cuda.is_available():
        yield
        return
    before = _allow_tf32(False, False)
    try:
        yield
    finally:
        _allow_tf32(*before)


def _allow_tf32(products: bool, convolutions: bool) -> tuple[bool, bool]:
    """Sets both and returns what they were."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the older setting, which all compilers still read
        before = matmul.allow_tf32, cudnn.allow_tf32
        matmul.allow_tf32, cudnn.allow_tf32 = products, convolutions
    return before


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() > 1}


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()
