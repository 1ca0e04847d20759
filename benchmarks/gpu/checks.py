"""Relative errors, and what a dtype allows."""

from __future__ import annotations

import torch
from torch import Tensor

# sums of thousands of products: in fp32 sqrt(n) roundings of 2^-24 stay under 1e-5; fp16 and bf16 round x, weight,
# gradient and result to 11 and 8 bits each: sqrt(4) * 2^-11 and sqrt(4) * 2^-8, and some more for one that is near 0
LIMITS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| of all entries; infinite where the shapes differ or an entry is NaN."""
    if actual.shape != expected.shape:
        return float("inf")
    a, b = actual.detach().double(), expected.detach().double()
    scale = b.norm().item()
    error = ((a - b).norm().item()) / (scale or 1.0)
    return error if error == error else float("inf")
