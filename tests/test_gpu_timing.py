"""How races are timed on a GPU, and what their outcomes are kept under: on a pretended one."""

import contextlib

import pytest
import torch
from torch import nn

from pysparse_ticket import planner
from pysparse_ticket.measure import gpu, interleave
from pysparse_ticket.nn import MaskedConv2d, choose
from pysparse_ticket.planner import PlanCache, Site


class Gpu:
    """A queue that works behind the host's back; events read its clock (milliseconds) when it comes to them."""

    def __init__(self):
        self.now, self.waits = 0.0, 0

    def launch(self, milliseconds):
        self.now += milliseconds

    def event(self, enable_timing):
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = self.gpu.now

    def synchronize(self):
        self.gpu.waits += 1

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.fixture
def pretended(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    return gpu


def test_short_calls_are_timed_many_at_a_time(pretended):
    calls = {"short": 0, "long": 0}

    def arm(name, milliseconds):
        calls[name] += 1
        # the first call compiles
        pretended.launch(500 if calls[name] == 1 else milliseconds)

    arms = {"short": lambda: arm("short", 0.25), "long": lambda: arm("long", 8)}
    times = interleave(arms, repeats=5, warmup=2, device="cuda")
    assert times["short"].median == pytest.approx(0.25e-3) and times["long"].median == pytest.approx(8e-3)
    # 8 calls of 0.25 ms fill 2 ms
    assert calls == {"short": 2 + 5 * 8, "long": 2 + 5}
    assert len(times["short"].samples) == 5 and pretended.waits == 14


def test_races_wait_for_the_device_that_they_run_on(monkeypatch):
    asked = []

    def timed(arms, repeats, warmup, device):
        asked.append((str(device), warmup))
        return {}

    monkeypatch.setattr(planner, "interleave", timed)
    layer = nn.Linear(4, 3).to("meta")
    monkeypatch.setattr(planner, "step", lambda *_: None)
    monkeypatch.setattr(Site, "input", lambda self, device: torch.empty(self.shape, device=device))
    site = Site((2, 4), torch.float32, False, False)
    for device in ("cpu", "meta"):
        planner.race({"plain": layer}, site, torch.device(device))
    planner.race_steps({}, torch.empty(2, 4, device="meta"))
    planner._medians({}, 3, torch.device("cuda"))
    assert asked == [("cpu", 2), ("meta", 2), ("meta", 2), ("cuda", 3)]


FACTS = {"gpu": "Fake 100", "capability": "sm_90", "driver": "999.1", "cuda": "13.0", "triton": "3.6.0"}


class Placed(nn.Linear):
    """On a device that this torch has not got."""

    def parameters(self, recurse=True):
        for p in super().parameters(recurse):
            yield type("P", (), {"device": torch.device("cuda:0"), "shape": p.shape})()


@pytest.mark.parametrize("fact", FACTS)
def test_an_outcome_is_kept_for_this_gpu_driver_and_compiler(fact, monkeypatch):
    layer = Placed(4, 3)
    monkeypatch.setattr(planner, "gpu_facts", lambda index: FACTS)
    first = PlanCache.key("layer", layer)
    assert first == PlanCache.key("layer", layer) and first != PlanCache.key("layer", nn.Linear(4, 3))
    monkeypatch.setattr(planner, "gpu_facts", lambda index: FACTS | {fact: "another"})
    assert PlanCache.key("layer", layer) != first


def test_the_driver_is_read_from_the_kernel_where_nvml_is_not(monkeypatch, tmp_path):
    file = tmp_path / "version"
    monkeypatch.setattr(gpu, "DRIVER", file)
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert gpu.driver_version() == "unknown"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Thu Jan  1 00:00:00 UTC 2026\n")
    assert gpu.driver_version() == "580.159.04"


def test_the_layouts_of_a_convolution_are_rivals_on_the_cpu_alone():
    masked = MaskedConv2d.from_dense(nn.Conv2d(4, 6, 3), torch.ones(6, 4, 3, 3, dtype=torch.bool))
    assert masked.rival_formats((8, 4, 9, 9))
    assert masked.to("meta").rival_formats((8, 4, 9, 9)) == ()


def test_no_chain_of_tiles_is_raced_on_a_gpu(monkeypatch):
    raced = []
    monkeypatch.setattr(choose, "race_steps", lambda arms, x: raced.append(list(arms)) or dict.fromkeys(arms, 1.0))
    monkeypatch.setattr(choose.PlanCache, "get_or_race", lambda self, key, make: make())
    model = nn.Sequential(nn.Linear(4, 4))
    x = type("X", (), {"is_cuda": True, "shape": (2, 4), "stride": lambda self: (4, 1)})()
    choose.choose_model(model, model, x, {}, None, planner.Plan(), PlanCache(), False)
    assert raced == [["dense", "layers"]]


@pytest.mark.gpu
def test_sites_and_races_on_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PYSPARSE_TICKET_CACHE", str(tmp_path))
    layer = nn.Linear(64, 32).cuda()
    site = Site((16, 64), torch.float32, False, True)
    assert site.input(torch.device("cuda")).is_cuda
    times = planner.race({"plain": layer, "again": layer}, site, torch.device("cuda"))
    assert all(0 < t < 1e6 for t in times.values())
    facts = gpu.gpu_facts()
    assert facts["driver"] != "unknown" and facts["capability"].startswith("sm_")
