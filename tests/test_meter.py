from __future__ import annotations

import builtins
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pysparse_ticket.measure import Meter, carbon_intensity, clock, energy, interleave
from pysparse_ticket.measure.energy import NotMeasured, NvmlCounter, RaplCounter, grams_co2, open_counter


class Clock:
    """Time that passes by ``tick`` at each look, and when told to."""

    def __init__(self, tick=0.0):
        self.now, self.tick = 100.0, tick

    def perf_counter(self):
        self.now += self.tick
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class SteadyCounter:
    """``watts`` of power, in a counter that moves once a ``period`` of the given clock."""

    method, details, longest_gap = "steady", {"gpu": "none"}, None

    def __init__(self, clock, watts=10.0, period=0.125):
        self.clock, self.watts, self.period, self.burst = clock, watts, period, 0.0

    def joules(self):
        return self.watts * (self.clock.perf_counter() // self.period) * self.period + self.burst


@pytest.fixture
def ticking(monkeypatch):
    fake = Clock(tick=2.0**-10)
    monkeypatch.setattr(clock, "time", fake)
    return fake


def test_meter_reads_seconds_joules_and_co2(ticking):
    counter = SteadyCounter(ticking)
    with Meter(gco2_per_kwh=360.0, counter=counter) as m:
        ticking.sleep(100.0)
    assert m.seconds == pytest.approx(100, rel=1e-4)
    assert m.joules == pytest.approx(1000, abs=10 * 0.125 + 0.1)  # one period of 0.125 s at 10 W, and the looks
    assert m.gco2 == pytest.approx(m.joules * 1e-4, rel=1e-12)  # 360 g / 3.6e6 J
    assert m.period == pytest.approx(0.125, rel=0.02)
    assert (m.method, m.warning, m.net_joules, m.details["gpu"]) == ("steady", None, None, "none")


def test_idle_power_is_taken_off(ticking):
    counter = SteadyCounter(ticking, watts=4.0)
    with Meter(counter=counter, idle_seconds=50.0) as m:
        ticking.sleep(100.0)
        counter.burst = 300.0
    assert m.idle_watts == pytest.approx(4, rel=0.01)
    assert m.joules == pytest.approx(700, rel=0.01)
    assert m.net_joules == pytest.approx(300, rel=0.02)


def test_window_under_50_periods_is_flagged(ticking):
    with Meter(counter=SteadyCounter(ticking)) as m:
        ticking.sleep(6.0)  # 48 periods of 0.125 s
    assert m.joules is not None
    assert "shorter than 50 counter periods" in m.warning
    assert m.method == "steady, window too short"
    with Meter(counter=SteadyCounter(ticking)) as m:
        ticking.sleep(7.0)
    assert m.warning is None


def test_counter_that_stands_still_is_not_measured(ticking):
    with Meter(counter=SteadyCounter(ticking, watts=0.0), country="BRA") as m:
        ticking.sleep(9.0)
    assert (m.joules, m.gco2) == (None, None)
    assert m.method == "not measured: the energy counter did not move for 1 s"
    assert m.seconds == pytest.approx(9, rel=1e-3)


def test_counter_that_fails_midway_is_not_measured_and_does_not_raise(ticking):
    counter = SteadyCounter(ticking)
    with Meter(counter=counter) as m:

        def lost():
            raise NotMeasured("the GPU fell off the bus")

        counter.joules = lost
    assert m.joules is None
    assert m.method == "not measured: the GPU fell off the bus"


def test_seconds_are_there_after_an_exception(ticking):
    with pytest.raises(KeyError), Meter(counter=SteadyCounter(ticking)) as m:
        ticking.sleep(1.0)
        raise KeyError
    assert m.seconds == pytest.approx(1, rel=1e-2)


def test_counter_that_wraps_is_read_during_the_window(ticking):
    read_by_keeper = threading.Event()

    class Wrapping(SteadyCounter):
        longest_gap = 1e-3

        def joules(self):
            if threading.current_thread() is not threading.main_thread():
                read_by_keeper.set()
            return super().joules()

    with Meter(counter=Wrapping(ticking)):
        assert read_by_keeper.wait(timeout=60)


def test_meter_waits_for_the_gpu_at_both_edges(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    monkeypatch.setattr(clock, "open_counter", lambda device: SimpleNamespace(
        method="fake", details={}, longest_gap=None, celsius=lambda: 40.0 + len(calls),
        joules=lambda: calls.append("read") or float(len(calls)),
    ))  # fmt: skip
    with Meter("cuda:0") as m:
        calls.append("body")
    middle = calls.index("body")
    assert calls[middle - 2 : middle + 3] == ["wait", "read", "body", "wait", "read"]
    assert m.details["celsius before"] < m.details["celsius after"]


def test_open_meter_has_no_figures():
    m = Meter()
    assert (m.seconds, m.joules, m.gco2) == (None, None, None)
    assert m.method.startswith("not measured")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"country": "ATL"}, "'ATL': give one of BRA, CHN, DEU, FRA, GBR, IND, SWE, USA, WORLD"),
        ({"country": "BRA", "gco2_per_kwh": 1.0}, "not both"),
        ({"gco2_per_kwh": -1.0}, "gco2_per_kwh must be"),
        ({"gco2_per_kwh": float("nan")}, "gco2_per_kwh must be"),
        ({"idle_seconds": -1}, "idle_seconds must be"),
    ],
    ids=["country", "both", "negative", "nan", "idle"],
)
def test_bad_arguments_are_refused_before_the_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        Meter(**arguments)


def test_co2_of_one_kwh_is_the_intensity():
    assert grams_co2(3.6e6, carbon_intensity("BRA")) == 98.348
    assert carbon_intensity("swe") == 40.695
    with pytest.raises(ValueError, match="known for 7"):
        carbon_intensity(7)


def powercap(root: Path, **domains) -> Path:
    """A tree like /sys/class/powercap: folder -> (name, energy_uj, max_energy_range_uj)."""
    for folder, (name, used, span) in domains.items():
        path = root / folder.replace("__", "-").replace("_", ":")
        path.mkdir()
        (path / "name").write_text(f"{name}\n")
        (path / "energy_uj").write_text(f"{used}\n")
        (path / "max_energy_range_uj").write_text(f"{span}\n")
    (root / "intel-rapl").mkdir()  # the control type itself, without a counter
    return root


@pytest.fixture
def rapl(tmp_path):
    return powercap(
        tmp_path,
        intel__rapl_0=("package-0", 5_000_000, 10_000_000),
        intel__rapl_0_0=("core", 1_000_000, 10_000_000),
        intel__rapl_1=("package-1", 9_000_000, 10_000_000),
        intel__rapl_2=("psys", 1_000_000, 10_000_000),
        intel__rapl__mmio_0=("package-0", 7_000_000, 10_000_000),
    )


def test_rapl_adds_packages_once_and_no_part_of_them(rapl):
    counter = RaplCounter(rapl)
    for folder, used in [("intel-rapl:0", 6.5), ("intel-rapl:0:0", 9), ("intel-rapl:1", 9.25), ("intel-rapl:2", 9)]:
        (rapl / folder / "energy_uj").write_text(str(int(used * 1e6)))
    (rapl / "intel-rapl-mmio:0" / "energy_uj").write_text("9900000")
    assert counter.joules() == 1.75
    assert counter.method == "rapl package-0, package-1 (CPU packages)"
    assert counter.longest_gap == 0.01  # 10 J at 1 kW


def test_rapl_goes_on_after_it_wrapped(rapl):
    counter = RaplCounter(rapl)
    file = rapl / "intel-rapl:1" / "energy_uj"
    for used, total in [(1_000_000, 2.0), (8_000_000, 9.0), (500_000, 11.5)]:
        file.write_text(str(used))
        assert counter.joules() == total


def test_rapl_says_why_it_cannot_be_read(rapl, tmp_path, monkeypatch):
    with pytest.raises(NotMeasured, match=r"no RAPL package counter in .*nowhere"):
        RaplCounter(tmp_path / "nowhere")
    usual = Path.read_text

    def denied(path, *args):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return usual(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", denied)
        with pytest.raises(NotMeasured, match="intel-rapl:0/energy_uj may be read by root alone"):
            RaplCounter(rapl)
    counter = RaplCounter(rapl)
    (rapl / "intel-rapl:0" / "energy_uj").write_text("garbage")
    with pytest.raises(NotMeasured, match="energy_uj is not readable"):
        counter.joules()


def test_meter_on_a_machine_without_rapl(monkeypatch, tmp_path):
    monkeypatch.setattr(clock, "open_counter", lambda device: RaplCounter(tmp_path))
    with Meter(country="FRA") as m:
        sum(range(1000))
    assert m.seconds > 0
    assert (m.joules, m.gco2) == (None, None)
    assert m.method.startswith("not measured: no RAPL package counter")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_meter_of_a_gpu_that_is_not_there():
    with Meter("cuda") as m:
        pass
    assert m.method == "not measured: torch sees no GPU"


class FakeNvml:
    """As much of pynvml as is used; ``broken`` names a function that fails."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self, broken=None):
        self.broken, self.millijoules = broken, 5000

    def _answer(self, function, value):
        if function == self.broken:
            raise self.NVMLError("Not Supported")
        return value

    def nvmlInit(self):
        self._answer("nvmlInit", None)

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return self._answer("nvmlDeviceGetHandleByUUID", f"handle of {uuid}")

    def nvmlDeviceGetName(self, handle):
        assert handle == "handle of GPU-1"
        return b"Fake 100"

    def nvmlSystemGetDriverVersion(self):
        return "999.1"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self._answer("nvmlDeviceGetTotalEnergyConsumption", self.millijoules)

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return self._answer("nvmlDeviceGetTemperature", 41)


def test_nvml_counter_is_in_joules():
    nvml = FakeNvml()
    counter = NvmlCounter("GPU-1", nvml)
    before = counter.joules()
    nvml.millijoules += 2500
    assert counter.joules() - before == 2.5
    assert counter.details == {"gpu": "Fake 100", "driver": "999.1"}
    assert counter.celsius() == 41.0


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("nvmlInit", "NVML cannot open GPU-1: Not Supported"),
        ("nvmlDeviceGetHandleByUUID", "NVML cannot open GPU-1: Not Supported"),
        ("nvmlDeviceGetTotalEnergyConsumption", "Fake 100 has no readable total-energy counter: Not Supported"),
    ],
)
def test_nvml_failures_are_reasons(broken, message):
    with pytest.raises(NotMeasured, match=message):
        NvmlCounter("GPU-1", FakeNvml(broken))


def test_nvml_without_temperature_still_counts():
    assert NvmlCounter("GPU-1", FakeNvml("nvmlDeviceGetTemperature")).celsius() is None


def test_nvml_is_an_extra(monkeypatch):
    usual = builtins.__import__

    def without_pynvml(name, *args, **kwargs):
        if name == "pynvml":
            raise ImportError(name)
        return usual(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pynvml)
    with pytest.raises(NotMeasured, match=r"nvidia-ml-py is not installed \(pip install 'pysparse-ticket\[energy\]'\)"):
        NvmlCounter("GPU-1")


def test_counter_of_the_gpu_that_torch_means(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"abc-{device.index}"))
    monkeypatch.setattr(energy, "NvmlCounter", asked.append)
    open_counter("cuda:1")
    assert asked == ["GPU-abc-1"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotMeasured, match="torch sees no GPU"):
        open_counter("cuda")
    with pytest.raises(NotMeasured, match="no energy counter is known for meta devices"):
        open_counter("meta")


def test_interleave_goes_round_and_reports_medians(monkeypatch):
    fake = Clock()
    monkeypatch.setattr(clock, "time", fake)
    calls = []
    slow = iter([100, 100, 1, 2, 3, 4, 50])  # two of warm-up

    def a():
        calls.append("a")
        fake.sleep(next(slow))

    def b():
        calls.append("b")
        fake.sleep(0.5)

    timings = interleave({"a": a, "b": b}, repeats=5, warmup=2)
    assert "".join(calls) == "abba" * 3 + "ab"
    assert timings["a"].samples == (1, 2, 3, 4, 50)
    assert timings["a"].median == 3
    assert timings["a"].p20 == pytest.approx(1.8, rel=1e-12)  # linear between the ranks: 0.2 * 4 = rank 0.8
    assert timings["a"].p80 == pytest.approx(13.2, rel=1e-12)
    assert timings["b"].median == 0.5


def test_interleave_refuses_nothing_to_do():
    with pytest.raises(ValueError, match="at least one arm"):
        interleave({}, 3)
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        interleave({"a": int}, 0)
