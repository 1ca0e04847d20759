"""The data that a score takes: x, (x, y), or a list of either."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

Batch = tuple[Tensor, Tensor]
Pairs = list[tuple[Tensor, Tensor | None]]


def first_input(batches) -> Tensor | None:
    """The first x, or None if there is none."""
    if isinstance(batches, tuple | list) and batches:
        return first_input(batches[0])
    return batches if isinstance(batches, Tensor) else None


def pairs_of(batches) -> Pairs:
    """The batches as a list of (x, y or None); two tensors in a list are x and y."""
    pairs = _pairs(batches)
    if not pairs:
        raise ValueError("this score needs data: pass batches=(x, y) or a list of such pairs")
    return pairs


def labelled(batches: Iterable[Batch] | Batch | None) -> list[Batch]:
    """The batches as a list of (x, y), for scores whose loss takes y."""
    found = [] if batches is None or isinstance(batches, Tensor) else list(batches)
    if len(found) == 2 and isinstance(batches, tuple | list) and isinstance(found[0], Tensor):
        return [tuple(found)]
    if not found or any(isinstance(batch, Tensor) for batch in found):
        raise ValueError("this score needs data with labels: pass batches=(x, y) or a list of such pairs")
    return found


def _pairs(batches) -> Pairs:
    if isinstance(batches, Tensor):
        return [(batches, None)]
    if isinstance(batches, tuple | list) and len(batches) == 2 and isinstance(batches[0], Tensor):
        return [tuple(batches)]
    return [(b, None) if isinstance(b, Tensor) else (b[0], b[1] if len(b) > 1 else None) for b in batches or ()]
