"""A search's own random draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """torch's generators of the model's devices draw from ``seed`` on within it, for dropout and fresh weights; the
    user's stand afterwards where they stood before."""
    cuda = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=cuda):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in cuda)):
            generator.manual_seed(seed)
        yield
