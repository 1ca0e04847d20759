"""Masked linear layers with unstructured masks, packed: bf16 against cuBLAS, fp32 against cuBLAS without TF32.

python -m gpu.unstructured [--tiny --device cpu]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpu.checks import strict_float32
from gpu.linear_arms import Problem
from gpu.program import BF16, Recorder, attempt, options, race, wanted

SHAPE, TINY = (4096, 4096, 8192), (48, 40, 33)
CASES = ((BF16, "bf16", (0.98, 0.95, 0.99)), (torch.float32, "fp32", (0.9, 0.8, 0.95, 0.75)))


def main(argv: Sequence[str] | None = None) -> Recorder:
    chosen = options(__doc__, argv)
    torch.manual_seed(0)
    recorder = Recorder("unstructured", chosen)
    outputs, inputs, tokens = TINY if chosen.tiny else SHAPE
    with strict_float32():
        for dtype, name, sparsities in CASES:
            shape = f"{inputs}x{outputs}, {tokens} tokens, {name}"
            for sparsity in sparsities:
                if not wanted(shape, chosen) or recorder.late(f"{shape} at {sparsity:.0%}"):
                    continue
                mask = torch.rand(outputs, inputs, device=chosen.device).flatten().argsort().argsort()
                mask = (mask >= round(sparsity * mask.numel())).view(outputs, inputs)
                problem = Problem(outputs, inputs, tokens, mask, dtype, chosen.device)
                arm = attempt(recorder, shape, "packed", sparsity, lambda p=problem: p.ours("packed", "packed"))
                if arm:
                    race(recorder, shape, sparsity, problem.dense(chosen.compile and sparsity == sparsities[0]), [arm])
    return recorder


if __name__ == "__main__":
    main()
