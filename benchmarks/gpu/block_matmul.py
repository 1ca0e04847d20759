"""Masked linear layers whose masks are blocks: ours in tiles against cuBLAS and torch's BSR operators.

python -m gpu.block_matmul [--tiny --device cpu] [--only "block 64." ...]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpu.linear_arms import Problem
from gpu.program import BF16, Recorder, attempt, options, race, wanted
from pysparse_ticket.granularity import expand_blocks
from pysparse_ticket.same_function import strict_float32

SPARSITIES = (0.9, 0.75, 0.95, 0.5)  # the middle of the table first
# output and input features, tokens, block
SHAPES = ((4096, 4096, 8192, 64), (4096, 4096, 8192, 128), (4096, 1024, 32768, 64), (4096, 4096, 8192, 32))
TINY = ((64, 64, 48, 16), (96, 32, 40, 16))
FULL_TILES = "mask in the kernel, no empty tile"
UNEVEN = "uneven rows and columns"  # of a magnitude mask, as a ticket may have


def name_of(outputs: int, inputs: int, tokens: int) -> str:
    return f"{inputs}x{outputs}, {tokens} tokens"


def block_mask(outputs: int, inputs: int, side: int, sparsity: float, device: torch.device) -> Tensor:
    """Exactly the sparsity's share of random blocks removed, up to one block."""
    grid = (-(-outputs // side), -(-inputs // side))
    kept = torch.rand(grid, device=device).flatten().argsort() >= round(sparsity * grid[0] * grid[1])
    return expand_blocks(kept.view(grid), (outputs, inputs), side, side)


def uneven_mask(outputs: int, inputs: int, sparsity: float, device: torch.device) -> Tensor:
    """The largest of gaussian weights whose rows and columns have log-normal scales of sigma 0.5."""
    size = torch.randn(outputs, inputs, device=device).abs()
    for count, dim in ((outputs, 1), (inputs, 0)):
        size *= torch.exp(0.5 * torch.randn(count, device=device)).unsqueeze(dim)
    kept = torch.zeros(size.numel(), dtype=torch.bool, device=device)
    kept[size.flatten().argsort()[round(sparsity * size.numel()) :]] = True
    return kept.view_as(size)


def transposable_mask(outputs: int, inputs: int, device: torch.device) -> Tensor:
    """Two of every four in rows and in columns: in each 4x4 block the rows of a circulant in random order."""
    circulant = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]], dtype=torch.bool, device=device)
    order = torch.rand(outputs // 4, inputs // 4, 4, device=device).argsort(-1)
    return circulant[order].permute(0, 2, 1, 3).reshape(outputs, inputs)


def main(argv: Sequence[str] | None = None) -> Recorder:
    chosen = options(__doc__, argv)
    torch.manual_seed(0)
    recorder = Recorder("block_matmul", chosen)
    shapes = TINY if chosen.tiny else SHAPES
    outputs, inputs, tokens, _ = shapes[0]
    with strict_float32():
        for shape in shapes:
            if wanted(f"{name_of(*shape[:3])}, block {shape[3]}.", chosen):
                blocks(recorder, *shape)
        if wanted("others", chosen):
            whole_tiles(recorder, outputs, inputs, tokens)
            two_of_four(recorder, outputs, inputs, tokens)
            reordered(recorder, outputs, inputs, tokens)
    return recorder


def blocks(recorder: Recorder, outputs: int, inputs: int, tokens: int, side: int) -> None:
    chosen, shape = recorder.options, name_of(outputs, inputs, tokens)
    for sparsity in SPARSITIES[:2] if chosen.tiny else SPARSITIES:
        if recorder.late(f"block {side} of {shape} at {sparsity:.0%}"):
            return
        mask = block_mask(outputs, inputs, side, sparsity, chosen.device)
        problem = Problem(outputs, inputs, tokens, mask, BF16, chosen.device)
        # the dense product is the same at every sparsity, compiled or not
        rivals = problem.dense(chosen.compile and sparsity == SPARSITIES[0])
        arms = [
            attempt(recorder, shape, f"block {side}", sparsity, lambda p=problem: p.ours(f"block {side}", "blocks")),
            attempt(recorder, shape, f"torch BSR {side}", sparsity, lambda p=problem: p.bsr(side)),
        ]
        race(recorder, shape, sparsity, rivals, [arm for arm in arms if arm])


def whole_tiles(recorder: Recorder, outputs: int, inputs: int, tokens: int) -> None:
    """An unstructured mask that leaves no tile empty, by the tiled kernels: what applying it costs."""
    chosen, shape = recorder.options, name_of(outputs, inputs, tokens)
    if recorder.late(FULL_TILES):
        return
    mask = torch.rand(outputs, inputs, device=chosen.device) < 0.5
    problem = Problem(outputs, inputs, tokens, mask, BF16, chosen.device)
    arm = attempt(recorder, shape, FULL_TILES, 0.5, lambda: problem.ours(FULL_TILES, "blocks"))
    if arm:
        race(recorder, shape, 0.5, problem.dense(False), [arm])


def two_of_four(recorder: Recorder, outputs: int, inputs: int, tokens: int) -> None:
    chosen, shape = recorder.options, name_of(outputs, inputs, tokens)
    if recorder.late("2:4"):
        return
    mask = transposable_mask(outputs, inputs, chosen.device)
    problem = Problem(outputs, inputs, tokens, mask, BF16, chosen.device)
    arms = [
        attempt(recorder, shape, "2:4", 0.5, lambda: problem.ours("2:4", "2:4")),
        attempt(recorder, shape, "torch 2:4", 0.5, problem.semi_structured),
    ]
    race(recorder, shape, 0.5, problem.dense(False), [arm for arm in arms if arm])


def reordered(recorder: Recorder, outputs: int, inputs: int, tokens: int) -> None:
    """The tiles of an unstructured mask as it is, and in the order that empties most of them."""
    chosen, shape, sparsity = recorder.options, name_of(outputs, inputs, tokens), 0.95
    if recorder.late(UNEVEN):
        return
    mask = uneven_mask(outputs, inputs, sparsity, chosen.device)
    problem = Problem(outputs, inputs, tokens, mask, BF16, chosen.device)
    arms = [
        attempt(recorder, shape, name, sparsity, lambda name=name, fmt=fmt: problem.ours(name, fmt))
        for fmt in ("blocks", "reordered")
        for name in (f"{UNEVEN}, {fmt}",)
    ]
    race(recorder, shape, sparsity, problem.dense(False), [arm for arm in arms if arm])


if __name__ == "__main__":
    main()
