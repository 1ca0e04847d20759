"""Joules a training step: a running total at the edges of windows, arms in turn, polled power as the cross-check."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from pysparse_ticket.measure.clock import find_period, synchronize
from pysparse_ticket.measure.energy import Counter, PolledPower

WINDOW = 5.0  # seconds at least, and 50 periods of the counter
REPEATS = 3
IDLE = 3.0
QUEUED = 0.25  # seconds of work that the host may be ahead, so that a window ends where it should


@dataclass(frozen=True)
class StepEnergy:
    """Of one arm: medians of joules a step, gross and net of idle power, the spread of the former, and by polling."""

    joules: float
    net_joules: float
    spread: float
    polled_joules: float | None
    steps: int
    windows: int


@dataclass(frozen=True)
class Energies:
    arms: dict[str, StepEnergy]
    period: float
    idle_watts: float


def step_energy(
    steps: Mapping[str, Callable[[], object]],
    counter: Counter,
    device: torch.device,
    *,
    window: float = WINDOW,
    repeats: int = REPEATS,
    idle: float = IDLE,
    power: Callable[[], PolledPower] | None = None,
) -> Energies:
    """Joules of one call of each arm, from ``repeats`` windows of each in turn, round by round another one first.

    The counter's period is measured first, then the idle power over ``idle`` seconds. Each window lasts ``window``
    seconds and 50 periods at least. ``power`` makes a sampler that runs beside. Raises NotMeasured.
    """
    period = find_period(counter.joules)
    window = max(window, 50 * period)
    synchronize(device)
    before, start = counter.joules(), time.perf_counter()
    time.sleep(idle)
    idle_watts = (counter.joules() - before) / (time.perf_counter() - start)
    each = {name: _seconds(step, device) for name, step in steps.items()}
    samples: dict[str, list[tuple[float, float, float | None, int]]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(_window(steps[name], each[name], window, counter, device, idle_watts, power))
    return Energies({name: _summary(found) for name, found in samples.items()}, period, idle_watts)


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    """Of one call, roughly."""
    step()
    synchronize(device)
    start, calls = time.perf_counter(), 0
    while calls < 3 or (time.perf_counter() - start < 0.05 and calls < 100):
        step()
        calls += 1
    synchronize(device)
    return max((time.perf_counter() - start) / calls, 1e-6)


def _window(step, seconds, window, counter, device, idle_watts, power):
    """(joules a step, net joules a step, the same by polling or None, steps)."""
    batch, done = max(1, int(QUEUED / seconds)), 0
    sampler = power() if power else None
    synchronize(device)
    if sampler:
        sampler.start()
    before, start = counter.joules(), time.perf_counter()
    while time.perf_counter() - start < window:
        for _ in range(batch):
            step()
        done += batch
        synchronize(device)
    took, joules = time.perf_counter() - start, counter.joules() - before
    polled = sampler.stop() if sampler else None
    return joules / done, (joules - idle_watts * took) / done, None if polled is None else polled / done, done


def _summary(found: list[tuple[float, float, float | None, int]]) -> StepEnergy:
    gross, net, polled, steps = zip(*found, strict=True)
    middle = statistics.median(gross)
    return StepEnergy(
        middle,
        statistics.median(net),
        (max(gross) - min(gross)) / middle if middle else 0.0,
        None if None in polled else statistics.median(polled),
        sum(steps),
        len(found),
    )
