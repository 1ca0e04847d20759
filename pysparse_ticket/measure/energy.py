"""Energy counters, and the CO2 that a measured energy stands for.

A counter is read or there is no figure: power limits times time are not energy. NVML's counter covers the GPU board
alone, RAPL's the CPU packages alone (neither memory, disks nor fans).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch

POWERCAP = Path("/sys/class/powercap")
JOULES_PER_KWH = 3.6e6
PUE = 1.0  # of a machine on a desk; a data centre's overhead comes on top
INTENSITY_YEAR = 2023
# g CO2 per kWh of the national grids
INTENSITIES = {
    "BRA": 98.348,
    "CHN": 582.317,
    "DEU": 380.95,
    "FRA": 56.039,
    "GBR": 237.589,
    "IND": 713.441,
    "SWE": 40.695,
    "USA": 369.473,
    "WORLD": 475.0,  # a usual world average, rounded
}


class NotMeasured(Exception):
    """Why there is no energy counter to read; the message is the reason."""


class Counter(Protocol):
    """A running energy total."""

    method: str
    details: dict[str, str]
    longest_gap: float | None  # seconds after which a wrap could go unseen

    def joules(self) -> float:
        """The total so far, never falling. Raises NotMeasured when it can no longer be read."""


def carbon_intensity(country: str) -> float:
    """g CO2 per kWh of a country's grid in 2023, by its ISO code of three letters, or "WORLD".

    Raises ValueError, listing the known ones, for any other.
    """
    try:
        return INTENSITIES[country.upper()]
    except (KeyError, AttributeError):
        known = ", ".join(INTENSITIES)
        raise ValueError(
            f"no carbon intensity is known for {country!r}: give one of {known}, or gco2_per_kwh= a number"
        ) from None


def grams_co2(joules: float, gco2_per_kwh: float) -> float:
    """kWh times intensity, with a power usage effectiveness of 1."""
    if not (math.isfinite(gco2_per_kwh) and gco2_per_kwh >= 0):
        raise ValueError(f"gco2_per_kwh must be a finite number, at least 0, got {gco2_per_kwh!r}")
    return joules * PUE / JOULES_PER_KWH * gco2_per_kwh


def open_counter(device: str | torch.device = "cpu") -> Counter:
    """The energy counter of ``device``: NVML's for a GPU, RAPL's for the CPU. Raises NotMeasured with the reason."""
    device = torch.device(device)
    if device.type == "cpu":
        return RaplCounter()
    if device.type != "cuda":
        raise NotMeasured(f"no energy counter is known for {device.type} devices")
    if not torch.cuda.is_available():
        raise NotMeasured("torch sees no GPU")
    # by its identifier: CUDA_VISIBLE_DEVICES renumbers torch's devices, not NVML's
    return NvmlCounter(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


class NvmlCounter:
    """NVML's total-energy counter (Volta and later) of the GPU with identifier ``uuid``.

    nvml: the module to ask, ``pynvml`` from nvidia-ml-py (extra ``energy``) by default.
    """

    method = "nvml total-energy counter (GPU board)"
    longest_gap = None  # 64 bits of millijoules

    def __init__(self, uuid: str, nvml: ModuleType | None = None):
        if nvml is None:
            try:
                import pynvml as nvml
            except ImportError:
                raise NotMeasured("nvidia-ml-py is not installed (pip install 'pysparse-ticket[energy]')") from None
        self._nvml = nvml
        try:
            nvml.nvmlInit()
            self._gpu = nvml.nvmlDeviceGetHandleByUUID(uuid)
            name, driver = nvml.nvmlDeviceGetName(self._gpu), nvml.nvmlSystemGetDriverVersion()
        except nvml.NVMLError as error:
            raise NotMeasured(f"NVML cannot open {uuid}: {error}") from None
        self.details = {"gpu": _text(name), "driver": _text(driver)}
        self.joules()

    def joules(self) -> float:
        """Joules since the driver was loaded. Raises NotMeasured."""
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu) / 1000
        except self._nvml.NVMLError as error:
            raise NotMeasured(f"{self.details['gpu']} has no readable total-energy counter: {error}") from None

    def watts(self) -> float:
        """The board's present power: on later GPUs its mean over the last second. Raises NotMeasured."""
        try:
            return self._nvml.nvmlDeviceGetPowerUsage(self._gpu) / 1000
        except self._nvml.NVMLError as error:
            raise NotMeasured(f"{self.details['gpu']} has no readable power: {error}") from None

    def celsius(self) -> float | None:
        """The GPU's temperature, which moves its power; None where it cannot be read."""
        try:
            return float(self._nvml.nvmlDeviceGetTemperature(self._gpu, self._nvml.NVML_TEMPERATURE_GPU))
        except self._nvml.NVMLError:
            return None


class PolledPower:
    """Joules between :meth:`start` and :meth:`stop` by trapezoids of a counter's ``watts()``, read every ``every``
    seconds by a thread: a cross-check of the total, which misses what happens between two readings."""

    def __init__(self, counter: NvmlCounter, every: float = 0.05):
        self._counter, self._every = counter, every
        self._readings: list[tuple[float, float]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def start(self) -> PolledPower:
        self._read()
        self._thread.start()
        return self

    def stop(self) -> float | None:
        """The joules; None where the power could not be read."""
        self._done.set()
        self._thread.join()
        self._read()
        pairs = itertools.pairwise(self._readings)
        joules = sum((later - earlier) * (a + b) / 2 for (earlier, a), (later, b) in pairs)
        return joules if len(self._readings) > 1 else None

    def _poll(self) -> None:
        while not self._done.wait(self._every):
            self._read()

    def _read(self) -> None:
        with contextlib.suppress(NotMeasured):
            self._readings.append((time.perf_counter(), self._counter.watts()))


@dataclass
class _Package:
    file: Path
    span: int  # microjoules at which the counter starts again from 0
    last: int = 0
    total: int = 0


@dataclass
class RaplCounter:
    """The sum of the CPU packages' RAPL counters below ``root``.

    Sub-domains (core, uncore, dram) are parts of a package or of other machinery, psys holds the packages, and
    intel-rapl-mmio shows the same package a second time: none of them is added.
    """

    root: Path = POWERCAP
    details: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        packages: dict[str, _Package] = {}
        for folder in sorted(Path(self.root).glob("*:*"), key=lambda found: ("mmio" in found.name, found.name)):
            try:
                name = (folder / "name").read_text().strip()
                if name.startswith("package") and name not in packages:
                    span = int((folder / "max_energy_range_uj").read_text())
                    packages[name] = _Package(folder / "energy_uj", span)
            except (OSError, ValueError) as error:
                raise NotMeasured(f"RAPL domain {folder} is not readable: {error}") from None
        if not packages:
            raise NotMeasured(f"no RAPL package counter in {self.root} (usual on virtual machines)")
        self._packages = list(packages.values())
        self._lock = threading.Lock()
        self.method = f"rapl {', '.join(packages)} (CPU packages)"
        # a wrap is seen if the counter is read once a span; no package draws 1 kW for long
        self.longest_gap = min(package.span for package in self._packages) / 1e6 / 1000
        for package in self._packages:
            package.last = self._read(package)

    def joules(self) -> float:
        """Joules since this object was made. Raises NotMeasured."""
        with self._lock:
            for package in self._packages:
                now = self._read(package)
                package.total += now - package.last if now >= package.last else now + package.span - package.last
                package.last = now
            return sum(package.total for package in self._packages) / 1e6

    def _read(self, package: _Package) -> int:
        try:
            return int(package.file.read_text())
        except PermissionError:
            raise NotMeasured(f"{package.file} may be read by root alone (chmod a+r would let others)") from None
        except (OSError, ValueError) as error:
            raise NotMeasured(f"{package.file} is not readable: {error}") from None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
