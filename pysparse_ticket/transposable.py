"""Transposable n:m masks: n of every m weights along the rows and along the columns, so that both a weight and its
transpose are n:m and a sparse unit can run the forward pass and the input gradient (Hubara et al. 2021, section 3).
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

LARGEST = 4  # 90 patterns of 2:4; 4:8 has 10^8
CHUNK = 2**15  # blocks at a time: 90 float64 sums each


@functools.cache
def _patterns(n: int, m: int) -> Tensor:
    """bool ``[patterns, m, m]``, n True in each row and column; in lexicographic order of the rows' columns."""
    rows = list(itertools.combinations(range(m), n))
    found = []
    for chosen in itertools.product(rows, repeat=m):
        counts = [0] * m
        for column in itertools.chain(*chosen):
            counts[column] += 1
        if set(counts) == {n}:
            found.append([[column in row for column in range(m)] for row in chosen])
    return torch.tensor(found)


def keep_transposable(score: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """bool mask of the highest summed score with exactly n kept in each row and each column of every m x m block.

    score is a weight's, ``[O, ...]``, read as an ``[O, rest]`` matrix; in each block the best of all patterns (90 for
    2:4) is taken, exactly. Of equal sums (float64) the pattern that keeps the earlier columns of the first row that
    differs. -inf marks what is gone: no more of it is kept than must be.

    Ragged edges: a block that the matrix cuts off is one of the patterns too, cut off as well, that which keeps most of
    the weights that are there and of those the best. A row or column there so keeps n where it can, and a 3x3 corner
    of 2:4 keeps 5. ValueError for m above 4, whose patterns are too many to try.
    """
    if not 0 < n <= m:
        raise ValueError(f"n:m keeps n of m weights, 0 < n <= m, not {n}:{m}")
    if m > LARGEST:
        raise ValueError(
            f"transposable n:m takes m up to {LARGEST}, not {m}: larger blocks have too many patterns to try"
        )
    matrix = score.reshape(score.shape[0], -1).double()
    rows, cols = matrix.shape
    high, wide = -(-rows // m), -(-cols // m)
    padded = matrix.new_full((high * m, wide * m), -torch.inf)
    padded[:rows, :cols] = matrix
    blocks = padded.reshape(high, m, wide, m).transpose(1, 2).reshape(-1, m * m)
    patterns = _patterns(n, m).to(score.device).reshape(-1, m * m)
    weights = patterns.T.double()
    best = torch.empty(len(blocks), dtype=torch.long, device=score.device)
    for start in range(0, len(blocks), CHUNK):
        block = blocks[start : start + CHUNK]
        there = block > -torch.inf
        kept = there.double() @ weights
        total = block.masked_fill(~there, 0) @ weights
        best[start : start + CHUNK] = total.masked_fill_(kept < kept.amax(1, keepdim=True), -torch.inf).argmax(1)
    mask = patterns[best].reshape(high, wide, m, m).transpose(1, 2).reshape(high * m, wide * m)
    return mask[:rows, :cols].reshape(score.shape)
