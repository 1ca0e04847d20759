"""From scores of weights to scores of pieces (pool), and from decisions on pieces to masks of weights (expand).

A piece is a weight, a group of n:m (of n:mt a transposable one), a block of bh x bw, a filter or a whole block of
layers. Scores are float64 and say what a piece is worth: the lowest go first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .transposable import LARGEST, keep_transposable

Scores = Mapping[str, Tensor]
AGGREGATES = ("sum", "mean")


def aggregate(score: Tensor, how: str, dim: Sequence[int] | None = None) -> Tensor:
    """Sum or mean of the scores of the weights in a piece, in float64 (Jordao et al. 2023 leave it open)."""
    if how not in AGGREGATES:
        raise ValueError(f"unknown aggregate {how!r}; known: {', '.join(AGGREGATES)}")
    reduce = torch.sum if how == "sum" else torch.mean
    return reduce(score.double()) if dim is None else reduce(score.double(), dim=tuple(dim))


def pool_layers(scores: Scores, blocks: Sequence[str], how: str) -> dict[str, float]:
    """{block name: score} over all scored weights whose name lies below the block."""
    pooled = {}
    for block in blocks:
        parts = [score.reshape(-1).double() for name, score in scores.items() if name.startswith(f"{block}.")]
        if not parts:
            raise ValueError(f"block {block} holds no scored weight")
        pooled[block] = float(aggregate(torch.cat(parts), how))
    return pooled


def pool_units(scores: Scores, units: Sequence[Sequence[tuple[str, int]]], how: str) -> Tensor:
    """float64 [units]: the sum or mean over all weights of the filters (convolution name, index) of each unit."""
    weights = {name: scores[f"{name}.weight"] for unit in units for name, _ in unit}
    sums = {name: aggregate(s, "sum", range(1, s.dim())).tolist() for name, s in weights.items()}
    sizes = {name: s[0].numel() for name, s in weights.items()}
    totals = torch.tensor([sum(sums[name][i] for name, i in unit) for unit in units], dtype=torch.float64)
    counts = torch.tensor([sum(sizes[name] for name, _ in unit) for unit in units], dtype=torch.float64)
    aggregate(totals, how)
    return totals if how == "sum" else totals / counts


def parse(granularity: str) -> tuple[str, tuple[int, int] | None]:
    """``"weight"``, ``"filter"``, ``"layer"``, ``"2:4"``, ``"2:4t"`` or ``"block:16x16"`` to its kind (``"n:m"``,
    ``"n:mt"`` and ``"block"`` of the last three) and its two numbers."""
    if granularity in ("weight", "filter", "layer"):
        return granularity, None
    if match := re.fullmatch(r"(\d+):(\d+)(t?)", granularity):
        n, m = map(int, match.groups()[:2])
        if match[3] and m > LARGEST:
            raise ValueError(f"granularity {granularity!r}: transposable n:m takes m up to {LARGEST}")
        if 0 < n <= m:
            return "n:m" + match[3], (n, m)
    if match := re.fullmatch(r"block:(\d+)x(\d+)", granularity):
        height, width = map(int, match.groups())
        if height and width:
            return "block", (height, width)
    known = "weight, n:m (as 2:4), n:mt (transposable), block:HxW, filter, layer"
    raise ValueError(f"unknown granularity {granularity!r}; known: {known}")


def pool_blocks(score: Tensor, height: int, width: int, how: str) -> Tensor:
    """Weight scores ``[O, ...]`` to scores of height x width tiles of the ``[O, rest]`` matrix; ragged edges count
    what they hold."""
    matrix = score.reshape(score.shape[0], -1).double()
    rows, cols = -(-matrix.shape[0] // height), -(-matrix.shape[1] // width)

    def tile_sums(x: Tensor) -> Tensor:
        padded = x.new_zeros(rows * height, cols * width)
        padded[: x.shape[0], : x.shape[1]] = x
        return padded.reshape(rows, height, cols, width).sum((1, 3))

    sums = tile_sums(matrix)
    aggregate(matrix, how)
    return sums if how == "sum" else sums / tile_sums(torch.ones_like(matrix))


def expand_blocks(kept: Tensor, shape: Sequence[int], height: int, width: int) -> Tensor:
    """bool tiles back to a bool mask of the weight's shape."""
    matrix = kept.repeat_interleave(height, 0).repeat_interleave(width, 1)
    rows, cols = shape[0], int(torch.tensor(list(shape[1:])).prod())
    return matrix[:rows, :cols].reshape(tuple(shape))


def keep_n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    """bool mask keeping the n highest of every m consecutive weights of a row (input channels x taps, in that order).

    A shorter last group of r weights keeps min(n, r). Ties keep the earlier weight.
    """
    matrix = score.reshape(score.shape[0], -1).double()
    rows, cols = matrix.shape
    groups = -(-cols // m)
    padded = matrix.new_full((rows, groups * m), -torch.inf)
    padded[:, :cols] = matrix
    order = padded.reshape(rows, groups, m).argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros(rows, groups, m, dtype=torch.bool, device=score.device)
    kept.scatter_(-1, order[..., :n], True)
    return kept.reshape(rows, groups * m)[:, :cols].reshape(score.shape)


KEEP_N_OF_M = {"n:m": keep_n_of_m, "n:mt": keep_transposable}
