"""What the benchmark programs share: options, adaptive interleaved timing, rows, and the table of a program."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch._functorch.config
from bf16 import avoid_broken_amx
from record import Row, speedup_tables, step_table, to_csv

from pysparse_ticket.files import write_whole
from pysparse_ticket.measure import Timing, interleave
from pysparse_ticket.ops.library import cpu_isa
from pysparse_ticket.report import machine, machine_line

avoid_broken_amx()  # oneDNN reads its setting at its first product
torch._functorch.config.donated_buffer = False  # the graphs of compiled arms are kept and run backward many times

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
FEWEST = 3  # repeats of an arm, however slow
BF16 = "bf16"  # the step under autocast, timed beside the passes
FACTS = ("ONEDNN_MAX_CPU_ISA", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD")

Calls = dict[str, Callable[[], object]]  # a pass's name to what runs it


@dataclass
class Arm:
    """One way of ours at one sparsity; ``flops`` are the operations of each pass, of the surviving weights."""

    name: str
    sparsity: float
    calls: Calls
    flops: dict[str, float]


@dataclass
class Case:
    """One shape: the dense rivals, the operations of their passes, and the arms, all timed in turn."""

    shape: str
    rivals: dict[str, Calls]
    flops: dict[str, float]
    arms: list[Arm] = field(default_factory=list)


def layer_flops(macs: float) -> dict[str, float]:
    """Operations of each pass of a layer of so many multiply-adds."""
    return {"forward": 2 * macs, "dX": 2 * macs, "dW": 2 * macs, "step": 6 * macs}


def timed(calls: dict[object, Callable[[], object]], seconds: float, repeats: int) -> dict[object, Timing]:
    """Interleaved times: about ``seconds`` an arm, but from 3 to ``repeats`` rounds."""
    round_seconds = sum(t.median for t in interleave(calls, 1, warmup=1).values())
    wanted = int(seconds * len(calls) / round_seconds)
    return interleave(calls, min(repeats, max(FEWEST, wanted)), warmup=0)


def measure(work: str, case: Case, options: argparse.Namespace) -> list[Row]:
    """Each pass of each arm against the fastest rival."""
    for name, calls in case.rivals.items():
        if missing := [p for p in case.flops if p not in calls]:
            raise ValueError(f"the rival {name} of {case.shape} lacks {', '.join(missing)}")
    everything = {("rival", name, p): call for name, calls in case.rivals.items() for p, call in calls.items()}
    everything |= {(i, "", p): call for i, arm in enumerate(case.arms) for p, call in arm.calls.items()}
    peak = torch.ops.pysparse_ticket.cpu_peak()
    times = timed(everything, options.seconds, options.repeats)
    peak = max(peak, torch.ops.pysparse_ticket.cpu_peak())  # a neighbour can only lower it
    facts = machine()
    settings = [f"{name}={os.environ[name]}" for name in FACTS if name in os.environ]
    where = "; ".join([machine_line(facts), cpu_isa(), *settings])

    def best(p: str) -> tuple[float, str]:
        return min((times["rival", name, p].median, name) for name, calls in case.rivals.items() if p in calls)

    rows = []
    for i, arm in enumerate(case.arms):
        for p in arm.flops:
            ours, (dense, rival) = times[i, "", p], best(p)
            with_bf16 = p == "step" and BF16 in arm.calls
            rate = arm.flops[p] / ours.median
            rows.append(
                Row(
                    work=work,
                    shape=case.shape,
                    arm=arm.name,
                    sparsity=arm.sparsity,
                    passes=p,
                    rival=rival,
                    rival_ms=1e3 * dense,
                    ours_ms=1e3 * ours.median,
                    gf=rate / 1e9,
                    share=rate / peak,
                    rival_share=case.flops[p] / dense / peak,
                    spread=(ours.p80 - ours.p20) / ours.median,
                    bf16_rival_ms=1e3 * best(BF16)[0] if with_bf16 else None,
                    bf16_ours_ms=1e3 * times[i, "", BF16].median if with_bf16 else None,
                    revision=str(facts["revision"]),
                    machine=where,
                )
            )
    return rows


def main(
    doc: str,
    program: str,
    cases: Callable[[str, argparse.Namespace], Iterator[Case]],
    shapes: Sequence[str],
    sparsities: Sequence[float] = SPARSITIES,
) -> None:
    """Measure the shapes asked for and print their tables; ``--store`` keeps the rows as CSV.

    ``cases(shape, options)`` yields what to time, correctness checked.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15, help="rounds at most")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each arm, unless --repeats come first")
    parser.add_argument("--sparsity", type=float, nargs="+", default=sparsities)
    parser.add_argument("--shape", nargs="+", choices=shapes, default=shapes)
    parser.add_argument("--compile", action="store_true", help="torch.compile as a dense rival too")
    parser.add_argument("--bf16", action="store_true", help="the step under autocast to bf16 too")
    parser.add_argument("--store", type=Path, help="write the rows to this CSV file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = Path(program).stem.removeprefix("bench_")
    rows: list[Row] = []
    for shape in options.shape:
        found = [row for case in cases(shape, options) for row in measure(work, case, options)]
        if found and not rows:
            print(found[0].machine, end="\n\n")
        for table in (*speedup_tables(found), step_table(found)):
            print(table, flush=True)
        rows += found
    if options.store:
        write_whole(options.store, to_csv(rows).encode())
