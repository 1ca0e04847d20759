"""The GPU's benchmark programs, end to end at toy sizes on the CPU: timing, tables, every program. No figure counts."""

import contextlib
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from gpu import (
    block_conv,
    block_matmul,
    ceilings,
    conv_arms,
    filter_conv,
    filter_norm,
    joules,
    models,
    program,
    record,
    run,
    stages,
    timing,
    unstructured,
)
from gpu.joules import Energies, StepEnergy, step_energy
from gpu.linear_arms import Problem
from gpu.program import Arm, Recorder, attempt, compared, options, passes, race
from gpu.record import Row
from gpu.stages import TOTAL
from gpu.tickets import Kind, ViTStack, block_mask, random_ticket
from gpu.timing import Prepared, prepare, timed
from torch import nn

import pysparse_ticket as pst
from pysparse_ticket.measure import macs
from pysparse_ticket.measure.energy import NotMeasured, PolledPower
from pysparse_ticket.models import build

pytestmark = pytest.mark.filterwarnings("ignore:Sparse (CSR|BSR) tensor support is in beta")
CPU = torch.device("cpu")
ROW = Row(
    "block_matmul", "4096x4096, 8192 tokens", "block 64", 0.9, "step", "ms", 2.0, 8.0, "cuBLAS", 0.04, 1e-3, "graph"
)
WHERE = {"revision": "abc", "machine": "Fake 100, driver 999.1; triton 3.6.0; torch 2.11.0"}


# --- records


def test_rows_read_back_as_they_were():
    rows = [ROW, replace(ROW, ours=None, best=None, spread=None, error=None, note="not there: ValueError: no, none")]
    text = record.to_csv(rows)
    assert record.from_csv(text) == rows
    header, first, second = text.splitlines()
    assert header.endswith("ratio,goal") and first.endswith(",4,4.3") and second.endswith(",,4.3")
    with pytest.raises(ValueError, match="lacks the columns arm"):
        record.from_csv(text.replace(",arm,", ",way,"))


def test_rows_replace_older_ones_of_the_same_figure_and_a_work_can_be_forgotten(tmp_path):
    record.store(tmp_path, [ROW, replace(ROW, arm="gone")])
    record.store(tmp_path, [replace(ROW, ours=4.0), replace(ROW, sparsity=0.5), replace(ROW, work="other")])
    found = record.from_csv((tmp_path / "gpu.csv").read_text())
    assert [(r.work, r.arm, r.sparsity, r.ours) for r in found] == [
        ("block_matmul", "block 64", 0.9, 4.0),
        ("block_matmul", "gone", 0.9, 2.0),
        ("block_matmul", "block 64", 0.5, 2.0),
        ("other", "block 64", 0.9, 2.0),
    ]
    record.forget(tmp_path, "block_matmul")
    assert [r.work for r in record.from_csv((tmp_path / "gpu.csv").read_text())] == ["other"]
    assert "block_matmul" not in (tmp_path / "gpu.md").read_text()


def test_the_tables_show_ratio_goal_and_what_is_not_there():
    rows = [ROW, replace(ROW, sparsity=0.95), replace(ROW, arm="2:4", sparsity=0.5, ours=None, note="not there: a | b")]
    text = record.to_markdown([replace(row, **WHERE) for row in rows])
    assert "- Fake 100, driver 999.1; triton 3.6.0; torch 2.11.0: block_matmul\n" in text
    assert "| shape | arm | pass | 90% | 95% |\n" in text
    assert "| 4096x4096, 8192 tokens | block 64 | step | 4.00 (4.3) | 4.00 (6) |\n" in text
    assert "| not measured | 8 | cuBLAS |" in text and "not there: a / b" in text


def test_a_folder_is_named_after_the_gpu(monkeypatch):
    assert record.folder_of_gpu("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    monkeypatch.setattr(record, "revision", lambda: None)
    assert record.facts()["revision"] == "unknown"
    monkeypatch.setenv("REVISION", "abc1234")
    assert record.facts()["revision"] == "abc1234"


@pytest.mark.parametrize("key", record.GOALS)
def test_every_goal_is_of_a_figure_that_is_measured(key):
    work, shape, arm, what, sparsity = key
    if work == "block_matmul":
        shapes = {(block_matmul.name_of(*s[:3]), f"block {s[3]}") for s in block_matmul.SHAPES}
        assert (shape, arm) in shapes or arm == block_matmul.FULL_TILES
        assert sparsity in block_matmul.SPARSITIES
    elif work == "unstructured":
        outputs, inputs, tokens = unstructured.SHAPE
        known = {(f"{inputs}x{outputs}, {tokens} tokens, {n}", s) for _, n, ss, _ in unstructured.CASES for s in ss}
        assert (shape, sparsity) in known
    elif work == "filter_conv":
        assert (shape, sparsity) == (conv_arms.ALL, filter_conv.SPARSITY)
    elif work == "block_conv":
        assert shape == conv_arms.ALL and arm == block_conv.ARM and sparsity in block_conv.SPARSITIES
    else:
        model = models.MODELS[work.removeprefix("model ")]
        assert shape == model.name and Kind(arm, sparsity) in model.tickets
    assert replace(ROW, work=work, shape=shape, arm=arm, what=what, sparsity=sparsity + 1e-4).goal


# --- timing


def arms_of(seconds, log=None):
    def call(name):
        return lambda: (log.append(name) if log is not None else None, seconds[name])[1]

    return {name: Prepared(call(name), "graph") for name in seconds}


def test_arms_are_timed_in_turn_for_as_long_as_was_asked():
    log = []
    times = timed(arms_of({"a": 0.5, "b": 0.25}, log), CPU, 6.0, clock=lambda call: call())
    # 0.75 s a round: 8 of them after the first look
    assert len(log) == 2 + 2 * 8 and "".join(log[2:8]) == "abbaab"
    assert (times["a"].median, times["b"].median, len(times["b"].samples)) == (0.5, 0.25, 8)
    assert len(timed(arms_of({"a": 9.0}), CPU, 1.0, clock=lambda call: call())["a"].samples) == timing.FEWEST
    assert len(timed(arms_of({"a": 1e-6}), CPU, 1.0, clock=lambda call: call())["a"].samples) == timing.MOST


class PretendedStream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def pretended(monkeypatch):
    """A GPU whose graphs replay what was captured; ``refuse`` makes a capture fail."""
    state = SimpleNamespace(refuse=None, captured=[], now=0.0)

    class Graph:
        def replay(self):
            state.now += 1

    @contextlib.contextmanager
    def capture(graph, pool, stream):
        assert pool == "pool"
        state.captured.append(graph)
        yield
        if state.refuse:
            raise RuntimeError(state.refuse)

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.at = state.now

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    for name, fake in {
        "Stream": lambda device: PretendedStream(),
        "current_stream": lambda device=None: PretendedStream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda device=None: None,
        "is_available": lambda: True,
        "CUDAGraph": Graph,
        "graph": capture,
        "Event": Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(timing, "_streams", {})
    monkeypatch.setattr(timing, "_pool", lambda: "pool")
    monkeypatch.setattr(timing, "FLUSH_BYTES", 64)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real(*a, **(k | {"device": "cpu"} if "device" in k else k)))
    return state


def test_calls_are_captured_after_their_warm_up(pretended):
    made, calls = [], []
    one = prepare(lambda: made.append(1) or (lambda: calls.append(1)), torch.device("cuda"))
    assert (one.how, len(made), len(calls)) == ("graph", 1, timing.WARMUP + 1)
    times = timed({"a": one}, torch.device("cuda"), 0.01)
    assert times["a"].median == pytest.approx(1e-3) and len(times["a"].samples) == 10
    assert len(calls) == timing.WARMUP + 1  # replays call nothing


def test_what_cannot_be_captured_is_timed_eagerly_and_so_are_its_rivals(pretended):
    pretended.refuse = "operation not permitted when stream is capturing\nmore"

    def call():
        pretended.now += 3

    eager = prepare(lambda: call, torch.device("cuda"))
    assert eager.how == "eager" and eager.why.endswith("not permitted when stream is capturing")
    pretended.refuse = None
    rival = prepare(lambda: call, torch.device("cuda"))
    times = timed({"ours": eager, "rival": rival}, torch.device("cuda"), 1.0)
    assert times["ours"].median == pytest.approx(3e-3) and times["rival"].median == pytest.approx(1e-3)
    assert prepare(lambda: call, torch.device("cuda"), graph=False).how == "eager"


# --- arms


@pytest.fixture
def recorder(monkeypatch, tmp_path):
    monkeypatch.setattr(program, "facts", lambda: WHERE)
    found = options("", ["--device", "cpu", "--seconds", "0.001", "--tiny", "--store", str(tmp_path)])
    return Recorder("block_matmul", found, where=WHERE)


def test_a_race_is_over_the_fastest_rival(recorder, monkeypatch):
    seconds = {"slow": 4.0, "fast": 2.0, "ours": 1.0}

    def fake(prepared, device, limit):
        return {name: timing.summarised([seconds[name]] * 3 + [2 * seconds[name]]) for name in prepared}

    monkeypatch.setattr(program, "timed", fake)
    arms = {name: Arm(name, {"step": lambda: lambda: None}, error=1e-3, note="on triton") for name in seconds}
    race(recorder, "8x8", 0.5, [arms["slow"], arms["fast"]], [arms["ours"]], ("forward", "step"))
    (row,) = recorder.rows
    assert (row.rival, row.ratio, row.what, row.error, row.note) == ("fast", 2.0, "step", 1e-3, "on triton")
    assert row.spread == pytest.approx(0.4) and row.work == "block_matmul" and row.revision == "abc"


def test_an_arm_that_breaks_leaves_the_others(recorder):
    def breaks():
        raise RuntimeError("no kernel image\nfor the device")

    whole = Arm("whole", {"step": lambda: lambda: None})
    race(recorder, "8x8", 0.5, [Arm("dense", {"step": lambda: lambda: None})], [Arm("broken", {"step": breaks}), whole])
    assert attempt(recorder, "8x8", "missing", 0.5, breaks) is None
    notes = {row.arm: (row.ours is None, row.note) for row in recorder.rows}
    assert notes["broken"] == (True, "failed: RuntimeError: no kernel image")
    assert notes["missing"] == (True, "not there: RuntimeError: no kernel image") and not notes["whole"][0]
    assert {row.arm for row in record.from_csv((recorder.options.store / "gpu.csv").read_text())} == set(notes)


def test_a_lost_gpu_ends_the_program(monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(SystemExit, match="context is lost: RuntimeError: CUDA error: an illegal"):
        program.check_gpu(torch.device("cuda"))
    program.check_gpu(CPU)


@pytest.mark.parametrize("wrong", ["forward", "dX", "dW", "step"])
def test_a_wrong_pass_is_found_before_it_is_timed(wrong):
    torch.manual_seed(0)
    problem = Problem(12, 20, 9, torch.rand(12, 20) < 0.5, torch.float32, CPU)
    layer = problem.layer
    calls = passes(layer, problem.x, list(layer.parameters()), problem.grad)

    def plain(name, tensor):
        return tensor * problem.mask if name == "dW" else tensor

    assert compared(Arm("dense", calls), problem.want, 1e-5, plain).error < 1e-6
    right = calls[wrong]

    def scaled():
        call = right()
        return lambda: (*call()[:3], call()[3] * 1.001) if wrong == "step" else call() * 1.001

    with pytest.raises(ValueError, match=f"of {wrong} is off by 1.0e-03"):
        compared(Arm("dense", calls | {wrong: scaled}), problem.want, 1e-5, plain)


def test_no_group_is_begun_late(recorder, capsys):
    assert not recorder.late("this")
    recorder.options.end = 0.0
    assert recorder.late("that") and "no time left for that" in capsys.readouterr().out


# --- programs


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """Runs a program's main at toy sizes; compiled functions are the functions themselves."""
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    monkeypatch.setattr(timing, "FEWEST", 1)
    monkeypatch.setattr(record, "revision", lambda: "abc")
    # what the plan's races find is of no matter here
    for name in ("race", "race_steps"):
        monkeypatch.setattr(f"pysparse_ticket.nn.choose.{name}", lambda arms, *_: dict.fromkeys(arms, 1.0))

    def run(main, *words):
        found = main([*words, "--tiny", "--device", "cpu", "--seconds", "1e-9", "--store", str(tmp_path)])
        assert record.from_csv((tmp_path / "gpu.csv").read_text()) and (tmp_path / "gpu.md").read_text()
        return found

    return run


def measured(recorder):
    return {(row.arm, row.what) for row in recorder.rows if row.ours}


def test_ceilings(toy):
    rows = toy(ceilings.main).rows
    assert [row.unit for row in rows] == ["TFLOP/s", "TFLOP/s", "GB/s"] and all(row.ours > 0 for row in rows)


def test_block_matmul(toy):
    found = toy(block_matmul.main)
    arms = {row.arm for row in found.rows}
    # each has rows: with figures where this version runs it on a CPU, else with the reason
    assert {"block 16", "torch BSR 16", block_matmul.FULL_TILES, "2:4", "torch 2:4"} <= arms
    assert {f"{block_matmul.UNEVEN}, {fmt}" for fmt in ("blocks", "reordered")} <= arms
    assert all(row.ours or row.note.startswith("not there: ") for row in found.rows)
    assert "wrong" not in "".join(row.note for row in found.rows)


def test_block_matmul_runs_what_it_is_asked_for(toy):
    found = toy(block_matmul.main, "--only", "32x96")
    assert {row.shape for row in found.rows} == {"32x96, 40 tokens"}


def test_transposable_masks_keep_two_of_four_both_ways():
    torch.manual_seed(0)
    mask = block_matmul.transposable_mask(12, 8, CPU).int()
    assert (mask.reshape(12, 2, 4).sum(2) == 2).all() and (mask.reshape(3, 4, 8).sum(1) == 2).all()
    assert len({tuple(rows.flatten().tolist()) for rows in mask.reshape(3, 4, 8)}) == 3


def test_bsr_arms_of_fp32_are_right():
    """torch's BSR products take no bfloat16 on a CPU, but the arm is the same."""
    torch.manual_seed(0)
    mask = block_matmul.block_mask(48, 64, 16, 0.5, CPU)
    arm = Problem(48, 64, 20, mask, torch.float32, CPU).bsr(16)
    assert arm.error < 1e-5 and {"forward", "dX"} <= set(arm.calls)


def test_unstructured(toy):
    found = toy(unstructured.main)
    names = ("forward", "dX", "dW", "step")
    alone = {(f"packed, {kernel}", name) for kernel in unstructured.KERNELS for name in ("forward", "dX")}
    assert measured(found) == {("packed", name) for name in names} | alone
    assert len(found.rows) == 9 * 4 + 5 * 3 * 2
    assert all("masked_linear on " in row.note for row in found.rows)


def test_filter_conv(toy):
    found = toy(filter_conv.main)
    assert {(arm, name) for arm in ("compact", "full shape") for name in ("forward", "dX", "dW", "step")} <= measured(
        found
    )
    total = next(row for row in found.rows if row.shape == conv_arms.ALL and row.arm == "compact")
    steps = [row for row in found.rows if row.arm == "compact" and row.what == "step" and row.shape != conv_arms.ALL]
    assert total.ours == pytest.approx(2 * steps[0].ours + steps[1].ours) and total.goal == 2.8


def test_filter_norm(toy):
    found = toy(filter_norm.main)
    assert measured(found) == {(arm, name) for arm in filter_norm.ARMS for name in ("forward", "step")}
    assert {row.rival for row in found.rows} <= {"cuDNN", "compiled"}


def test_block_conv(toy):
    found = toy(block_conv.main)
    assert {(block_conv.ARM, name) for name in ("forward", "dX", "dW", "step")} <= measured(found)
    totals = {row.sparsity: row for row in found.rows if row.shape == conv_arms.ALL}
    assert set(totals) == set(block_conv.SPARSITIES)
    assert totals[0.9].ours != totals[0.75].ours and all(row.goal for row in totals.values())


def test_block_masks_are_of_whole_blocks_at_single_taps():
    for shape, side in (((128, 64, 3, 3), 64), ((64, 40, 3, 3), 32), ((16, 16, 1, 1), 16), ((20, 70), 16)):
        mask = block_mask(shape, 64, 0.75)
        blocks = mask[::side, ::side]
        assert torch.equal(blocks.repeat_interleave(side, 0).repeat_interleave(side, 1)[: shape[0], : shape[1]], mask)
        assert int(blocks.sum()) == blocks.numel() - round(0.75 * blocks.numel())


@pytest.mark.parametrize("name", models.MODELS)
def test_models(name, toy, monkeypatch):
    monkeypatch.setattr(models, "open_counter", lambda device: SimpleNamespace(method="a fake counter"))
    energies = {}

    def fake(steps, counter, device, **_):
        for step in steps.values():
            step()
        dense, ours = steps
        assert dense.startswith("dense") and not ours.startswith("dense")
        energies.update({dense: StepEnergy(2.0, 1.0, 0.1, 2.1, 9, 3), ours: StepEnergy(1.0, 0.6, 0.1, 1.1, 9, 3)})
        return Energies(energies, 0.1, 70.0)

    monkeypatch.setattr(models, "step_energy", fake)
    found = toy(models.main, name)
    main = models.MODELS[name].tickets[0]
    done = measured(found)
    assert {(main.arm, w) for w in ("step", "step, eager", "peak memory", "joules a step", "net joules a step")} <= done
    assert (f"{main.arm}, compiled", "step") in done
    assert not [row.note for row in found.rows if row.ours is None and row.arm != "weight"]
    assert sum(row.what == "joules a step" for row in found.rows) == 2  # eager, and with what compiling made
    row = next(row for row in found.rows if row.what == "joules a step")
    assert row.ratio == 2.0 and "a fake counter, period 0.1 s, idle 70 W, 3 windows of 9 steps" in row.note


def test_models_without_a_counter_say_so(recorder, monkeypatch):
    def none(device):
        raise NotMeasured("torch sees no GPU")

    monkeypatch.setattr(models, "open_counter", none)
    bench = models.Bench.__new__(models.Bench)
    bench.recorder, bench.options, bench.model = recorder, recorder.options, models.MODELS["vit"]
    bench.energy(Kind("layer", 0.5), None, None)
    assert recorder.rows[0].ours is None and recorder.rows[0].note == "torch sees no GPU"


def test_an_unknown_model_is_named():
    with pytest.raises(SystemExit, match="name a model first: resnet56, resnet20, resnet50, vit"):
        models.main(["resnet9000"])


def test_tickets_remove_what_they_say():
    torch.manual_seed(0)
    stack, x = ViTStack(32, 64, 6, 5), torch.randn(2, 3, 32)
    layer = random_ticket(stack, Kind("layer", 0.5), x)
    assert len(layer.removed_blocks) == 3
    block = random_ticket(stack, Kind("block 16", 0.5), x)
    mask = block.masks["blocks.0.up.weight"].float().reshape(4, 16, 2, 16).mean((1, 3))
    assert set(mask.flatten().tolist()) == {0.0, 1.0} and mask.mean() == 0.5
    model, image = build("resnet14", 10, (3, 8, 8)), torch.randn(1, 3, 8, 8)
    whole = macs(model, image)
    ticket = random_ticket(model, Kind("filter", 0.5), image)
    assert all(int(kept.sum()) % 8 == 0 for kept in ticket.filters.values())
    share = macs(pst.sparsify(model, ticket), image) / whole
    assert share <= 0.5


# --- joules


class Watch:
    """A clock that passes as work and sleep say, and a board that draws 300 W at work and 100 W at rest."""

    def __init__(self, monkeypatch):
        self.now = self.total = 0.0
        monkeypatch.setattr(joules, "time", SimpleNamespace(perf_counter=lambda: self.now, sleep=self.rest))
        monkeypatch.setattr(joules, "find_period", lambda read: 0.02)

    def rest(self, seconds):
        self.now, self.total = self.now + seconds, self.total + 100 * seconds

    def work(self, seconds):
        self.now, self.total = self.now + seconds, self.total + 300 * seconds

    def joules(self):
        return self.total


def test_joules_a_step(monkeypatch):
    watch, order = Watch(monkeypatch), []

    def step(name, seconds):
        order.append(name)
        watch.work(seconds)

    steps = {"dense": lambda: step("dense", 0.01), "ticket": lambda: step("ticket", 0.004)}
    found = step_energy(steps, watch, CPU, window=1.0, repeats=3)
    assert found.idle_watts == pytest.approx(100) and found.period == 0.02
    assert found.arms["dense"].joules == pytest.approx(3.0) and found.arms["ticket"].joules == pytest.approx(1.2)
    assert found.arms["dense"].net_joules == pytest.approx(2.0)
    assert found.arms["dense"].spread == pytest.approx(0, abs=1e-9) and found.arms["dense"].polled_joules is None
    # windows in turn, another arm first in each round, after a look at each
    turns = [name for name, _ in itertools.groupby(order)]
    assert turns == ["dense", "ticket", "dense", "ticket", "dense", "ticket"]
    assert found.arms["dense"].steps >= 3 * 100


def test_a_window_lasts_fifty_periods(monkeypatch):
    watch = Watch(monkeypatch)
    monkeypatch.setattr(joules, "find_period", lambda read: 0.2)
    found = step_energy({"a": lambda: watch.work(0.5)}, watch, CPU, window=1.0, repeats=1, idle=1.0)
    assert found.arms["a"].steps == 20  # 10 s


def test_polled_power_is_integrated_and_unreadable_power_is_no_figure(monkeypatch):
    from pysparse_ticket.measure import energy

    now = itertools.count()
    monkeypatch.setattr(energy, "time", SimpleNamespace(perf_counter=lambda: float(next(now))))
    watts = iter([100.0, 300.0])
    sampler = PolledPower(SimpleNamespace(watts=lambda: next(watts)), every=60)
    assert sampler.start() is sampler and sampler.stop() == 200.0  # 1 s between 100 and 300 W

    def broken():
        raise NotMeasured("Fake 100 has no readable power")

    assert PolledPower(SimpleNamespace(watts=broken), every=60).start().stop() is None


def test_polling_runs_beside_the_windows(monkeypatch):
    watch = Watch(monkeypatch)
    log = []
    sampler = SimpleNamespace(start=lambda: log.append("start"), stop=lambda: log.append("stop") or 600.0)
    found = step_energy({"a": lambda: watch.work(0.5)}, watch, CPU, window=2.0, repeats=2, power=lambda: sampler)
    assert log == ["start", "stop"] * 2 and found.arms["a"].polled_joules == 150.0  # of 4 steps


# --- the whole run


def test_the_most_important_stages_fit_the_budget():
    stages = run.plan([], "folder")
    assert [stage.name for stage in stages[:4]] == ["build", "ceilings", "block 64", "model resnet56"]
    # even if the build takes all of its time
    assert sum(stage.seconds for stage in stages[:6]) <= TOTAL
    for stage in stages[1:]:
        module, limit = stage.command[2], stage.command[stage.command.index("--limit") + 1]
        __import__(module)
        assert float(limit) < stage.seconds


def test_stages_are_chosen_by_words():
    assert [stage.name for stage in run.plan(["resnet", "ceil"], "folder")] == [
        "build",
        "ceilings",
        "model resnet56",
        "model resnet50",
        "model resnet20",
    ]
    with pytest.raises(SystemExit, match="unknown stage 'gemm'; known: ceilings, block 64"):
        run.plan(["gemm"], "folder")


def test_only_words_of_the_stages_are_those_of_the_programs():
    words = {word for _, (module, *words), _ in run.PLAN if module == "gpu.block_matmul" for word in words[1:]}
    assert words == {*(f"block {shape[3]}." for shape in block_matmul.SHAPES), "others"}


def test_a_run_that_is_cut_off_keeps_what_it_had(tmp_path, monkeypatch):
    """Two stages of which the second never ends: its first rows and those of the first stay, here and in OUT."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "gpu_name", lambda: "Fake 100")
    monkeypatch.setattr(run, "PLAN", run.PLAN[:3])
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    folder = tmp_path / "benchmarks" / "results" / "fake-100"
    works = {"ceilings": "ceilings", "block 64": "block_matmul"}
    record.store(folder, [replace(ROW, work=work, arm="old") for work in (*works.values(), "model vit")])

    def fake(stage, left, log, show):
        if stage.name == "model resnet56":
            raise KeyboardInterrupt  # the limit from outside
        assert "old" not in {r.arm for r in rows() if r.work == works.get(stage.name)}
        if stage.name in works:
            record.store(folder, [replace(ROW, work=works[stage.name], arm="new")])
        log.write_text("stored\n")
        return stages.Outcome(stage.name, "cut off" if stage.name == "block 64" else "ok", 1.0, "stored", True)

    def rows(where=folder):
        return record.from_csv((where / "gpu.csv").read_text())

    monkeypatch.setattr(stages, "_run", fake)
    with pytest.raises(KeyboardInterrupt):
        run.main([])
    for where in (folder, tmp_path / "out" / "fake-100"):
        kept = {(r.work, r.arm) for r in rows(where)}
        assert kept == {("model vit", "old"), ("ceilings", "new"), ("block_matmul", "new")}
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "== ceilings\nstored" in log and "== block-64\nstored" in log


def test_without_a_gpu_the_run_says_where_to_go(monkeypatch):
    monkeypatch.setattr(run, "gpu_name", lambda: "cpu")
    with pytest.raises(SystemExit, match="torch sees no CUDA GPU; the benchmarks of a CPU are make bench"):
        run.main([])


@pytest.mark.gpu
def test_a_linear_layer_s_passes_can_be_captured():
    torch.manual_seed(0)
    device = torch.device("cuda")
    problem = Problem(128, 256, 512, torch.rand(128, 256) < 0.5, torch.bfloat16, device)
    for arm in (*problem.dense(False), problem.ours("packed", "packed")):
        for name, factory in arm.calls.items():
            one = prepare(factory, device)
            assert one.how == "graph", f"{arm.name} {name}: {one.why}"
    assert nn.Linear(2, 2).weight.is_cpu
