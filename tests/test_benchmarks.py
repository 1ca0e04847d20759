"""The record of the benchmarks: rows, merge, break-even, tables. Nothing is timed here."""

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import layers
import pytest
import record
import torch
from harness import Arm, Case, measure
from torch import nn

from pysparse_ticket.nn import MaskedLinear

BENCHMARKS = Path(record.__file__).parent
ROW = record.Row(
    work="masked_linear",
    shape="8x8",
    arm="alone",
    sparsity=0.5,
    passes="step",
    rival="contiguous",
    rival_ms=3.0,
    ours_ms=2.0,
    gf=10.0,
    share=0.25,
    rival_share=0.5,
    spread=0.04,
    bf16_rival_ms=None,
    bf16_ours_ms=None,
    revision="abc",
    machine="a CPU, 2 threads",
)


def test_a_csv_file_reads_back_as_the_rows_it_was_made_of():
    rows = [ROW, replace(ROW, sparsity=0.875, passes="dX", bf16_rival_ms=4.5, bf16_ours_ms=1.5)]
    text = record.to_csv(rows)
    assert record.from_csv(text) == rows
    header, first, second = (line.split(",") for line in text.replace('"a CPU, 2 threads"', "machine").splitlines())
    assert header[-2:] == ["speedup", "bf16_speedup"]
    assert first[-2:] == ["1.5", ""]  # not measured is empty, never 0
    assert second[-2:] == ["1.5", "3"]


def test_a_csv_file_of_other_columns_is_refused():
    with pytest.raises(ValueError, match="lacks the columns arm"):
        record.from_csv(record.to_csv([ROW]).replace(",arm,", ",way,"))


def test_merge_replaces_the_measured_works_alone():
    old = [ROW, replace(ROW, sparsity=0.9), replace(ROW, work="resnet_step", revision="old")]
    new = [replace(ROW, sparsity=0.8, revision="new"), replace(ROW, work="a_new_one", revision="new")]
    merged = record.merge(old, new)
    assert [(row.work, row.sparsity, row.revision) for row in merged] == [
        ("a_new_one", 0.5, "new"),
        ("masked_linear", 0.8, "new"),
        ("resnet_step", 0.5, "old"),
    ]


def test_store_updates_the_csv_and_renders_the_whole_of_it(tmp_path):
    record.store(tmp_path, [ROW])
    record.store(tmp_path, [replace(ROW, work="resnet_step", machine="another CPU")])
    assert [row.work for row in record.from_csv((tmp_path / "cpu.csv").read_text())] == ["masked_linear", "resnet_step"]
    text = (tmp_path / "cpu.md").read_text()
    assert "- a CPU, 2 threads: masked_linear\n- another CPU: resnet_step\n" in text
    assert "## masked_linear\n" in text and "## resnet_step\n" in text


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        # log2 of 0.5 and 2 are -1 and 1: halfway
        ([(0.8, 2.0), (0.6, 0.5)], "70%"),
        # log2 of 0.5 and 8 are -1 and 3: a quarter of the way from 50% to 90%
        ([(0.5, 0.5), (0.9, 8.0), (0.95, 9.0)], "60%"),
        # the last crossing counts, where noise makes two
        ([(0.5, 0.5), (0.6, 2.0), (0.7, 0.5), (0.8, 2.0)], "75%"),
        ([(0.5, 1.0), (0.6, 2.0)], "below 50%"),
        ([(0.5, 0.7), (0.98, 0.9)], "above 98%"),
    ],
)
def test_break_even(points, expected):
    assert record.break_even(points) == expected


def test_break_even_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one speed-up"):
        record.break_even([])


def test_speedups_by_sparsity_stand_in_one_line_with_their_break_even():
    rows = [replace(ROW, sparsity=0.6, ours_ms=6.0), replace(ROW, sparsity=0.8, ours_ms=1.5)]
    rows.append(replace(ROW, arm="single"))  # one sparsity has no line
    assert record.speedup_tables(rows) == [
        "| shape | arm | pass | 60% | 80% | break-even |\n"
        "|---|---:|---:|---:|---:|---:|\n"
        "| 8x8 | alone | step | 0.50 | 2.00 | 70% |\n"
    ]


def test_arms_of_other_sparsities_have_a_table_of_their_own():
    rows = [replace(ROW, arm=arm, sparsity=s) for arm, s in (("a", 0.5), ("a", 0.75), ("b", 0.5), ("b", 0.9375))]
    assert [table.splitlines()[0] for table in record.speedup_tables(rows)] == [
        "| shape | arm | pass | 50% | 75% | break-even |",
        "| shape | arm | pass | 50% | 93.75% | break-even |",
    ]


def test_steps_show_rates_and_mark_what_is_slower_than_the_bar():
    rows = [
        ROW,
        replace(ROW, passes="dX"),
        replace(ROW, ours_ms=3.06, bf16_rival_ms=4.0, bf16_ours_ms=2.0),  # 1.02 of the dense step
        replace(ROW, ours_ms=3.12),  # 1.04
    ]
    lines = record.step_table(rows).splitlines()[2:]
    assert [line.split(" | ")[3:] for line in lines] == [
        ["1.50", "2", "3", "contiguous", "10", "25%", "50%", "not measured", "4% |"],
        ["0.98", "3.06", "3", "contiguous", "10", "25%", "50%", "2.00", "4% |"],
        ["0.96 slower", "3.12", "3", "contiguous", "10", "25%", "50%", "not measured", "4% |"],
    ]


def test_a_row_compares_with_the_rival_that_was_fastest(monkeypatch):
    seconds = {"slow": 0.004, "fast": 0.002, "ours": 0.001, "slow bf16": 0.003, "fast bf16": 0.006, "ours bf16": 0.0005}

    def fake(calls, *_):
        return {key: argparse.Namespace(median=call(), p20=call(), p80=2 * call()) for key, call in calls.items()}

    def calls(name):
        return {"step": lambda: seconds[name], "bf16": lambda: seconds[f"{name} bf16"]}

    monkeypatch.setattr("harness.timed", fake)
    case = Case("8x8", {"slow": calls("slow"), "fast": calls("fast")}, {"step": 4e6})
    case.arms.append(Arm("alone", 0.75, calls("ours"), {"step": 1e6}))
    (row,) = measure("masked_linear", case, argparse.Namespace(seconds=1, repeats=1))
    assert (row.rival, row.speedup, row.bf16_speedup) == ("fast", pytest.approx(2), pytest.approx(6))
    assert (row.gf, row.spread) == (pytest.approx(1), pytest.approx(1))
    assert row.rival_share == pytest.approx(2 * row.share)  # 2e9 a second and 1e9
    assert row.work == "masked_linear" and "threads" in row.machine


OPTIONS = argparse.Namespace(bf16=False, compile=False)


def small_layer():
    torch.manual_seed(0)
    layer = nn.Linear(20, 12)
    return layer, torch.randn(9, 20), torch.randn(9, 12), torch.rand(12, 20) > 0.5


def test_every_pass_of_a_layer_is_compared_with_the_dense_one():
    layer, x, grad, mask = small_layer()
    arm = layers.module_arm("alone", MaskedLinear.from_dense(layer, mask), 0.5, x, grad, 9 * 20 * 12, OPTIONS)
    assert list(arm.calls) == list(arm.flops) == ["forward", "dX", "dW", "step"]
    assert arm.flops["step"] == pytest.approx(6 * 9 * int(mask.sum()))


@pytest.mark.parametrize("wrong", ["forward", "dX", "dW", "step"])
def test_a_wrong_pass_stops_the_program(wrong):
    layer, x, grad, _ = small_layer()
    calls = layers.passes(layer, x, list(layer.parameters()), grad, OPTIONS)
    right = calls[wrong]
    scaled = {
        "step": lambda: (*right()[:3], right()[3] * 1.001),  # the bias's gradient alone
    }.get(wrong, lambda: right() * 1.001)
    with pytest.raises(SystemExit, match=f"of {wrong} is wrong by 1.0e-03"):
        layers.checked("ours", calls | {wrong: scaled}, layers.oracle(layer, x, grad))


def test_an_unknown_benchmark_is_named():
    words = [sys.executable, str(BENCHMARKS / "run.py"), "no_such"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and "unknown benchmark 'no_such'; known: block_masks, " in done.stderr
