"""Masked linear layers with unstructured masks, packed: bf16 against cuBLAS, fp32 against cuBLAS without TF32.

Masks are random and, in bf16, uneven as those of trained layers are. "packed" chooses its kernel by the mask; the arms
beside it, forward and input gradient, take multiply-adds and windows on tensor cores whatever the mask.

python -m gpu.unstructured [--tiny --device cpu]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpu.linear_arms import Problem
from gpu.program import BF16, Arm, Recorder, attempt, options, race, wanted
from pysparse_ticket.same_function import strict_float32

SHAPE, TINY = (4096, 4096, 8192), (48, 40, 33)
UNEVEN = 0.5  # of log-normal scales of rows and columns
CASES = (
    (BF16, "bf16", (0.98, 0.95, 0.99), 0.0),
    (torch.float32, "fp32", (0.9, 0.8, 0.95, 0.75), 0.0),
    (BF16, "bf16, uneven", (0.95, 0.98), UNEVEN),
)
KERNELS = {"multiply-adds": 0, "windows, one tile": 1, "windows, two tiles": 2}


def unstructured_mask(rows: int, columns: int, sparsity: float, sigma: float, device: torch.device) -> Tensor:
    """The largest of gaussian weights whose rows and columns are scaled by exp(sigma N(0, 1))."""
    size = torch.randn(rows, columns, device=device).abs()
    size *= (sigma * torch.randn(rows, 1, device=device)).exp() * (sigma * torch.randn(columns, device=device)).exp()
    rank = size.flatten().argsort().argsort()
    return (rank >= round(sparsity * size.numel())).view(rows, columns)


def main(argv: Sequence[str] | None = None) -> Recorder:
    chosen = options(__doc__, argv)
    torch.manual_seed(0)
    recorder = Recorder("unstructured", chosen)
    outputs, inputs, tokens = TINY if chosen.tiny else SHAPE
    with strict_float32():
        for dtype, name, sparsities, sigma in CASES:
            shape = f"{inputs}x{outputs}, {tokens} tokens, {name}"
            for sparsity in sparsities:
                if not wanted(shape, chosen) or recorder.late(f"{shape} at {sparsity:.0%}"):
                    continue
                mask = unstructured_mask(outputs, inputs, sparsity, sigma, chosen.device)
                problem = Problem(outputs, inputs, tokens, mask, dtype, chosen.device)
                arms = [attempt(recorder, shape, "packed", sparsity, lambda p=problem: p.ours("packed", "packed"))]
                for kernel, windows in KERNELS.items() if dtype is BF16 and arms[0] else ():

                    def alone(p: Problem = problem, arm: str = f"packed, {kernel}", n: int = windows) -> Arm:
                        return p.ours(arm, "packed", n, ("forward", "dX"))

                    arms.append(attempt(recorder, shape, f"packed, {kernel}", sparsity, alone))
                if arms := [arm for arm in arms if arm]:
                    race(recorder, shape, sparsity, problem.dense(chosen.compile and sparsity == sparsities[0]), arms)
    return recorder


if __name__ == "__main__":
    main()
