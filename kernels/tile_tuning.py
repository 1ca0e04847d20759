"""Which of a kernel's candidate configurations runs: timed once for each kind of call, and remembered."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import asdict

import torch
import triton

from pysparse_ticket.outcomes import Outcomes

from .tile_configs import Config

_chosen: dict[tuple, Config] = {}
_stored: Outcomes | None = None


def pick(device: str, kind: tuple, candidates: list[Config], run: Callable[[Config], None]) -> None:
    """Run the fastest candidate for this ``kind`` of call; its sizes count by octaves.

    The first call of a kind on a GPU times them, unless an earlier process did. While a CUDA graph is captured, and
    under the interpreter, the first candidate runs, and nothing is remembered.
    """
    key = (device, *(round(math.log2(k)) if isinstance(k, int) and not isinstance(k, bool) and k else k for k in kind))
    config = _chosen.get(key)
    if config is None:
        if device == "interpreter" or len(candidates) == 1 or torch.cuda.is_current_stream_capturing():
            return run(candidates[0])
        config = _chosen[key] = _recall(repr(key), candidates) or _race(repr(key), candidates, run)
    run(config)


def _race(key: str, candidates: list[Config], run: Callable[[Config], None]) -> Config:
    times = {}
    for config in candidates:
        with contextlib.suppress(triton.runtime.errors.OutOfResources):  # a smaller multiprocessor than it was made for
            times[config] = triton.testing.do_bench(lambda c=config: run(c), warmup=5, rep=20, return_mode="median")
    if not times:
        raise RuntimeError(f"no configuration of the tile kernels fits this GPU ({key})")
    best = min(times, key=times.__getitem__)
    _stored.keep(key, asdict(best))
    return best


def _recall(key: str, candidates: list[Config]) -> Config | None:
    global _stored
    if _stored is None:
        _stored = Outcomes("tiles.json")
    known = _stored.known.get(key)
    return next((config for config in candidates if asdict(config) == known), None)
