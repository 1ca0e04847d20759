"""A ticket layer by layer: what each keeps, and which ones carry nothing from the input to the output any more."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..scores.activation import bypassed
from ..scores.magnitude import prunable
from ..ticket import Ticket

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class LayerProfile:
    """One layer of a ticket: its parameter's name, and how many of its weights survive."""

    name: str
    kept: int
    total: int

    @property
    def sparsity(self) -> float:
        """Share removed, in [0, 1]."""
        return 1 - self.kept / self.total


def layer_profile(ticket: Ticket) -> list[LayerProfile]:
    """Every prunable tensor of the ticket in model order, as :meth:`Ticket.counts` has them."""
    return [LayerProfile(name, kept, total) for name, (kept, total) in ticket.counts().items()]


def collapsed_layers(ticket: Ticket, model: nn.Module | None = None, sample: Tensor | None = None) -> dict[str, str]:
    """{parameter name: why} of the layers that carry nothing: "empty", "cut off from the input" or "... the output".

    Without a model only empty ones are found. With ``model`` and ``sample`` (an input of its shape; values do not
    matter) the ticket's paths are run: a copy in float64 whose surviving weights are positive and whose
    normalisations and biases are left out, so that signals cannot cancel. A layer is cut off from the input if nothing
    leaves it, from the output if no gradient returns to its surviving weights. Layers of removed blocks are not listed.

    The network has to consist of operations that pass a positive signal on (ReLU and its kin, pooling, sums,
    concatenations, products of positive values).
    """
    gone = tuple(f"{name}." for name in ticket.removed_blocks)
    empty = {row.name: "empty" for row in layer_profile(ticket) if not row.kept and not row.name.startswith(gone)}
    if model is None:
        return empty
    if sample is None:
        raise ValueError("following the ticket's paths needs sample=, an input of the model's shape")
    ticket.check(model)
    twin = copy.deepcopy(model).double().eval()
    weights = {n: w for n, w in prunable(twin).items() if not n.startswith(gone)}
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(torch.zeros_like(parameter) if name.endswith("bias") else parameter.abs() + 1e-3)
        for name, weight in weights.items():
            mask = torch.ones_like(weight, dtype=torch.bool)
            if name in ticket.masks:
                mask &= ticket.masks[name].to(mask.device)
            if (kept := ticket.filters.get(name.removesuffix(".weight"))) is not None:
                mask &= kept.to(mask.device).reshape(-1, *[1] * (mask.dim() - 1))
            rows = mask.flatten(1).sum(1).clamp(min=1).reshape(-1, *[1] * (mask.dim() - 1))
            weight.copy_(mask / rows)  # a row averages its inputs: depth neither overflows nor vanishes
    leaving: dict[str, bool] = {}
    handles = [
        twin.get_submodule(name.removesuffix(".weight")).register_forward_hook(
            lambda _, __, out, name=name: leaving.__setitem__(name, leaving.get(name, False) or bool((out != 0).any()))
        )
        for name in weights
    ]
    norms = [n for n, m in twin.named_modules() if isinstance(m, NORMS)]
    generator = torch.Generator().manual_seed(0)  # uneven: what compares inputs, as attention does, sees differences
    given = sample
    if sample.is_floating_point():
        given = 0.5 + torch.rand(sample.shape, generator=generator, dtype=torch.float64).to(sample.device)
    try:
        with bypassed(twin, [*ticket.removed_blocks, *norms]):
            total = twin(given).sum()
    finally:
        for handle in handles:
            handle.remove()
    grads = [None] * len(weights)
    if total.requires_grad:
        grads = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    found = {}
    for (name, weight), grad in zip(weights.items(), grads, strict=True):
        if name in empty:
            found[name] = "empty"
        elif not leaving.get(name, False):
            found[name] = "cut off from the input"
        elif grad is None or not (grad[weight > 0] != 0).any():
            found[name] = "cut off from the output"
    return found
