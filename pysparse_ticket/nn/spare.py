"""Removed channels that are held as zeros, so that a layer's channels are a number that the hardware likes."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..structure import Channels
from .dense_state import DenseState


def spare_units(channels: Channels, gone: Collection[int], multiple: int) -> set[int]:
    """Those of the removed units that come back as zeros, the earliest of each convolution, so that it has a multiple
    of so many filters, or all that it had."""
    back: set[int] = set()
    for row in channels.producers.values():
        held = sum(unit not in gone or unit in back for unit in row)
        missing = [unit for unit in dict.fromkeys(row) if unit in gone and unit not in back]
        back.update(missing[: -held % multiple])
    return back


def stay_zero(model: nn.Module, x: Tensor) -> bool:
    """Whether the gradient of every spare entry is exactly zero in a training step on ``x``, so that they stay zero.

    It is where a channel of zeros reaches its readers as zeros: through batch norm (whose weight and bias are zero
    there too), ReLU, GELU or pooling; behind a sigmoid it is not.
    """
    probe = copy.deepcopy(model).train()
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), torch.enable_grad():  # dropout draws
        outputs = [t for t in tree_leaves(probe(x)) if isinstance(t, Tensor) and t.requires_grad]
    spares = [
        (module, name, parameter)
        for module in probe.modules()
        if isinstance(module, DenseState)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and name in module._dense_slots()
    ]
    if not outputs:
        return False
    generator = torch.Generator(x.device).manual_seed(0)
    upstream = [torch.randn(t.shape, generator=generator, device=x.device).to(t.dtype) for t in outputs]
    grads = torch.autograd.grad(outputs, [p for *_, p in spares], upstream, allow_unused=True)
    return all(
        grad is None or torch.equal(grad, module.without_spare(name, grad, 0.0))
        for (module, name, _), grad in zip(spares, grads, strict=True)
    )
