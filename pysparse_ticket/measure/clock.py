"""Wall clock and energy of a stretch of code, and fair timing of rivals."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .energy import Counter, NotMeasured, carbon_intensity, grams_co2, open_counter

SHORTEST_WINDOW = 50  # counter periods: each edge is late by up to one, so joules are within 2%
PERIOD_PATIENCE = 1.0  # seconds; NVML counters move about every 0.1 s, RAPL's every 1 ms
SHORTEST_SAMPLE = 2e-3  # seconds between two GPU events; the first launch takes some microseconds of it
MOST_CALLS = 64


class Meter:
    """Measures the body of a ``with``: seconds, joules (or None, and why), grams of CO2.

        with Meter("cuda", country="BRA") as m:
            train()
        print(m.seconds, m.joules, m.method)

    device          whose work is waited for at both edges, and whose counter is read (the GPU's or the CPU's alone)
    country         ISO code of a known grid, or
    gco2_per_kwh    the intensity itself; with neither, gco2 stays None. CO2 is kWh times intensity with a PUE of 1
    idle_seconds    measure the idle power so long before the body; then net_joules = joules - idle_watts * seconds
    counter         another energy counter to read

    Read afterwards: seconds, joules, net_joules, idle_watts, gco2, method, warning (None, or why the joules are rough),
    period (seconds between updates of the counter), details (name and driver of the GPU, its temperature at both edges
    in Celsius).
    Bad arguments raise ValueError; a counter that cannot be read never raises, it makes joules None.
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        country: str | None = None,
        gco2_per_kwh: float | None = None,
        *,
        idle_seconds: float = 0.0,
        counter: Counter | None = None,
    ):
        if country is not None and gco2_per_kwh is not None:
            raise ValueError("give country or gco2_per_kwh, not both")
        if idle_seconds < 0:
            raise ValueError(f"idle_seconds must be at least 0, got {idle_seconds!r}")
        self.device = torch.device(device)
        self.gco2_per_kwh = carbon_intensity(country) if country is not None else gco2_per_kwh
        if self.gco2_per_kwh is not None:
            grams_co2(0.0, self.gco2_per_kwh)  # refuses a bad intensity before the work, not after it
        self.idle_seconds = idle_seconds
        self.seconds: float | None = None
        self.joules: float | None = None
        self.net_joules: float | None = None
        self.idle_watts: float | None = None
        self.gco2: float | None = None
        self.period: float | None = None
        self.warning: str | None = None
        self.method = "not measured: the window is still open"
        self.details: dict[str, object] = {}
        self._counter = counter

    def __enter__(self) -> Meter:
        self._failure = None
        try:
            if self._counter is None:
                self._counter = open_counter(self.device)
            self.details.update(self._counter.details)
            self.period = find_period(self._counter.joules)
            if self.idle_seconds:
                self._synchronize()
                before, start = self._counter.joules(), time.perf_counter()
                time.sleep(self.idle_seconds)
                self.idle_watts = (self._counter.joules() - before) / (time.perf_counter() - start)
        except NotMeasured as reason:
            self._failure = str(reason)
        self._done = threading.Event()
        self._keeper = None
        if self._failure is None and self._counter.longest_gap is not None:
            self._keeper = threading.Thread(target=self._keep_reading, daemon=True)
            self._keeper.start()
        self._note_temperature("celsius before")
        self._synchronize()
        self._joules_before = self._read()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exception) -> None:
        self._synchronize()
        self.seconds = time.perf_counter() - self._start
        after = self._read()
        self._done.set()
        if self._keeper is not None:
            self._keeper.join()
        self._note_temperature("celsius after")
        if self._failure is not None:
            self.method = f"not measured: {self._failure}"
            return
        self.joules = after - self._joules_before
        self.method = self._counter.method
        if self.seconds < SHORTEST_WINDOW * self.period:
            self.warning = (
                f"the window of {self.seconds:.3g} s is shorter than {SHORTEST_WINDOW} counter periods of "
                f"{self.period:.3g} s: the joules are rough"
            )
            self.method += ", window too short"
        if self.idle_watts is not None:
            self.net_joules = self.joules - self.idle_watts * self.seconds
        if self.gco2_per_kwh is not None:
            self.gco2 = grams_co2(self.joules, self.gco2_per_kwh)

    def _read(self) -> float | None:
        if self._failure is None:
            try:
                return self._counter.joules()
            except NotMeasured as reason:
                self._failure = str(reason)
        return None

    def _keep_reading(self) -> None:
        while not self._done.wait(self._counter.longest_gap):
            self._read()

    def _note_temperature(self, key: str) -> None:
        celsius = getattr(self._counter, "celsius", None)
        if celsius is not None and self._failure is None:
            self.details[key] = celsius()

    def _synchronize(self) -> None:
        synchronize(self.device)


def find_period(joules: Callable[[], float], patience: float = PERIOD_PATIENCE) -> float:
    """Seconds between two updates of a counter, from the first two that it makes.

    Raises NotMeasured for one that stands still for ``patience`` seconds.
    """
    updates, last = [], joules()
    limit = time.perf_counter() + patience
    while len(updates) < 2:
        value, now = joules(), time.perf_counter()
        if value != last:
            updates.append(now)
            last = value
        elif now > limit:
            raise NotMeasured(f"the energy counter did not move for {patience:g} s")
    return updates[1] - updates[0]


@dataclass(frozen=True)
class Timing:
    """Seconds of one arm: the median, the 20th and 80th percentile, and all samples in their order."""

    median: float
    p20: float
    p80: float
    samples: tuple[float, ...]


def interleave(
    arms: dict[str, Callable[[], object]],
    repeats: int,
    warmup: int = 3,
    *,
    device: str | torch.device = "cpu",
) -> dict[str, Timing]:
    """Times each arm ``repeats`` times, in turn, after ``warmup`` untimed calls of each.

    Round by round another arm goes first, so that drift of the machine (heat, neighbours) falls on all alike. On a GPU
    a time is that between two events around as many calls as fill 2 ms (counted in the last warm-up), divided by them:
    one call's wait for its own launch is no part of a training loop. ValueError for no arms or fewer than one repeat.
    """
    if not arms:
        raise ValueError("there is nothing to time: give at least one arm")
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    device = torch.device(device)
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    names = list(arms)
    calls = dict.fromkeys(names, 1)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if on_gpu:
                seconds = _between_events(arms[name], calls[name], device)
            else:
                start = time.perf_counter()
                arms[name]()
                seconds = time.perf_counter() - start
            if turn >= warmup:
                samples[name].append(seconds)
            elif on_gpu and turn == warmup - 1:
                calls[name] = max(1, min(MOST_CALLS, math.ceil(SHORTEST_SAMPLE / max(seconds, 1e-9))))
    return {name: summarised(times) for name, times in samples.items()}


def _between_events(arm: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds of one of so many calls in a row, on the GPU's clock."""
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            arm()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def synchronize(device: torch.device) -> None:
    """Waits for a GPU's work, which is launched and not done when a call returns; a CPU's is done."""
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.synchronize(device)


def summarised(times: Sequence[float]) -> Timing:
    """The median and the spread of one arm's samples, in seconds."""
    p20, p80 = np.percentile(times, [20, 80])
    return Timing(statistics.median(times), float(p20), float(p80), tuple(times))
