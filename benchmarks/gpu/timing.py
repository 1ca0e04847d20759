"""Interleaved times of rival calls on a GPU: replays of CUDA graphs on a cold cache, or eager calls in a row."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from pysparse_ticket.measure import Timing, interleave
from pysparse_ticket.measure.clock import summarised

Call = Callable[[], object]
Factory = Callable[[], Call]  # makes the call, with what it keeps, on the stream that will run it

FLUSH_BYTES = 256 << 20  # five times the L2 of the largest GPU that this was written for
WARMUP = 3  # the first call compiles and tunes
FEWEST, MOST = 5, 50  # rounds


@dataclass
class Prepared:
    """A call that is ready to be timed: ``how`` is "graph" or "eager", ``why`` the reason for the latter on a GPU."""

    call: Call
    how: str
    why: str = ""


def prepare(factory: Factory, device: torch.device, graph: bool = True) -> Prepared:
    """Warm the call up and, on a GPU, capture it in a CUDA graph; what cannot be captured is called eagerly."""
    if device.type != "cuda":
        call = factory()
        call()
        return Prepared(call, "eager")
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call = factory()
        for _ in range(WARMUP):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    if not graph:
        return Prepared(call, "eager")
    captured = torch.cuda.CUDAGraph()
    try:
        # one pool for all: what a step holds in between, gigabytes of it, no other replay needs
        with torch.cuda.graph(captured, pool=_pool(), stream=side):
            call()
        captured.replay()
        torch.cuda.synchronize(device)
    except Exception as error:  # a benchmark goes on with what it can measure, and says what it could not
        torch.cuda.synchronize(device)
        return Prepared(call, "eager", f"not captured: {first_line(error)}")
    return Prepared(captured.replay, "graph")


def first_line(error: BaseException) -> str:
    text = next(iter(str(error).splitlines()), "").strip()
    return f"{type(error).__name__}: {text}"[:200]


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: a gradient of a graph that was kept runs on the stream of its forward pass."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


@functools.cache
def _pool() -> tuple[int, int]:
    return torch.cuda.graph_pool_handle()


class ReplayTimer:
    """Seconds of one call on the GPU's clock, after its L2 was overwritten, which also hides the call's launch."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._other = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Call) -> float:
        self._other.zero_()
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3


def wall_seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def timed(
    calls: Mapping[str, Prepared],
    device: torch.device,
    seconds: float,
    clock: Callable[[Call], float] | None = None,
) -> dict[str, Timing]:
    """Median and spread of each call, in turn, about ``seconds`` for all; 5 to 50 rounds.

    Replays are timed one by one on a cold cache. If one call is eager, all are timed in a row as in a training loop
    (``pysparse_ticket.measure.interleave``): a ratio is of two times that were taken alike. ``clock`` is another timer.
    """
    plain = {name: one.call for name, one in calls.items()}
    eager = any(one.how == "eager" for one in calls.values())
    if clock is None and device.type == "cuda" and eager:
        first = interleave(plain, 1, warmup=1, device=device)
        return interleave(plain, rounds(first, seconds), warmup=1, device=device)
    clock = clock or (ReplayTimer(device) if device.type == "cuda" else wall_seconds)
    once = sum(clock(call) for call in plain.values())
    samples: dict[str, list[float]] = {name: [] for name in plain}
    names = list(plain)
    for turn in range(_rounds(once, seconds)):
        first_name = turn % len(names)
        for name in names[first_name:] + names[:first_name]:
            samples[name].append(clock(plain[name]))
    return {name: summarised(times) for name, times in samples.items()}


def rounds(first: Mapping[str, Timing], seconds: float) -> int:
    return _rounds(sum(t.median for t in first.values()), seconds)


def _rounds(once: float, seconds: float) -> int:
    return max(FEWEST, min(MOST, math.floor(seconds / max(once, 1e-9))))
