"""What the GPU's benchmark programs share: options, rows stored as they come, arms that are compared, then timed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from bf16 import avoid_broken_amx
from torch import Tensor

from gpu.checks import LIMITS, relative_error
from gpu.record import Row, facts, store
from gpu.timing import Factory, Prepared, first_line, prepare, timed

Factories = dict[str, Factory]  # a pass's name to what makes its call
BF16 = torch.bfloat16


def options(doc: str, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.4, help="time for each group of arms")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no group is begun")
    parser.add_argument("--tiny", action="store_true", help="toy shapes: does the program run at all")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile rivals")
    parser.add_argument("--store", type=Path, help="folder of gpu.csv and gpu.md")
    parser.add_argument("--only", nargs="+", help="words of the shapes to run")
    found = parser.parse_args(argv)
    found.device = torch.device(found.device)
    if found.device.type == "cpu":
        avoid_broken_amx()
    found.end = time.monotonic() + found.limit
    return found


@dataclass
class Recorder:
    """Collects a work's rows, prints and stores them as they come."""

    work: str
    options: argparse.Namespace
    rows: list[Row] = field(default_factory=list)
    where: dict[str, str] = field(default_factory=facts)

    def __post_init__(self) -> None:
        print(f"{self.where['machine']}\n", flush=True)

    def add(self, *new: Row) -> None:
        for row in new:
            self.rows.append(replace(row, work=self.work, **self.where))
            value = "not measured" if row.ours is None else f"{row.ours:.4g} {row.unit}"
            ratio = f", ratio {row.ratio:.2f} over {row.rival}" if row.ratio else ""
            note = f" [{row.note}]" if row.note else ""
            print(f"{row.shape} | {row.arm} {row.sparsity:.4g} | {row.what}: {value}{ratio}{note}", flush=True)
        if self.options.store and self.rows:
            store(self.options.store, self.rows)

    def late(self, what: str) -> bool:
        """Whether the time for new groups is over; says so."""
        if time.monotonic() < self.options.end:
            return False
        print(f"no time left for {what}", flush=True)
        return True


@dataclass
class Arm:
    """One way to compute: its passes, the largest relative error of what they give, and what to say of it."""

    name: str
    calls: Factories
    error: float | None = None
    note: str = ""


def wanted(shape: str, options: argparse.Namespace) -> bool:
    return not options.only or any(word in shape for word in options.only)


def passes(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    parameters: Sequence[Tensor],
    grad: Tensor,
    names: Iterable[str] = ("forward", "dX", "dW", "step"),
) -> Factories:
    """forward, dX, dW and step of ``function(x)``; the weight is the first of its parameters."""
    weight, *_ = parameters
    leaf = x.detach().requires_grad_()

    def need(wanted: Sequence[Tensor]) -> None:
        for p in parameters:
            p.requires_grad_(any(p is w for w in wanted))

    def forward():
        def call() -> Tensor:
            with torch.no_grad():
                return function(x)

        return call

    def dx():
        need([])
        y = function(leaf)
        need(parameters)
        return lambda: torch.autograd.grad(y, leaf, grad, retain_graph=True)[0]

    def dw():
        need([weight])
        y = function(x)
        need(parameters)
        return lambda: torch.autograd.grad(y, weight, grad, retain_graph=True)[0]

    def step():
        need(parameters)

        def call() -> tuple[Tensor, ...]:
            y = function(leaf)
            return y, *torch.autograd.grad(y, [leaf, *parameters], grad)

        return call

    every = {"forward": forward, "dX": dx, "dW": dw, "step": step}
    return {name: every[name] for name in names}


def compared(
    arm: Arm, want: Mapping[str, Tensor], limit: float, plain: Callable[[str, Tensor], Tensor] = lambda _, t: t
) -> Arm:
    """The arm with its largest error against y, dX, dW, db; ValueError names the first result that is wrong.

    ``plain(name, tensor)`` brings an arm's own result into the oracle's shape.
    """
    worst = 0.0
    for what, factory in arm.calls.items():
        got = factory()()
        if isinstance(got, tuple):
            named = dict(zip(want, got, strict=False))
        else:
            named = {{"forward": "y"}.get(what, what): got}
        for name, tensor in named.items():
            error = relative_error(plain(name, tensor.detach()), want[name])
            if not error < limit:
                raise ValueError(f"wrong: {name} of {what} is off by {error:.1e}")
            worst = max(worst, error)
    arm.error = worst
    return arm


def limit_of(dtype: torch.dtype) -> float:
    return LIMITS[dtype]


def check_gpu(device: torch.device) -> None:
    """SystemExit after an error that took the GPU's context with it, after which nothing more can be measured."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise SystemExit(f"the GPU's context is lost: {first_line(error)}") from None


def attempt(recorder: Recorder, shape: str, name: str, sparsity: float, make: Callable[[], Arm]) -> Arm | None:
    """The arm, or a row that says why there is none: a format or an op that this version or machine has not."""
    try:
        return make()
    except Exception as error:  # whatever a rival or a missing backend raises, the other arms go on
        recorder.add(Row("", shape, name, sparsity, "-", "ms", None, note=f"not there: {first_line(error)}"))
        check_gpu(recorder.options.device)
        return None


def race(
    recorder: Recorder,
    shape: str,
    sparsity: float,
    rivals: Sequence[Arm],
    arms: Sequence[Arm],
    names: Sequence[str] = ("forward", "dX", "dW", "step"),
    graph: bool = True,
    sparsities: Mapping[str, float] | None = None,
) -> dict[str, dict[str, Prepared]]:
    """Times every pass of the arms against the fastest rival, pass by pass, and adds the rows; returns what was timed.

    ``sparsities`` are those of single arms, where they differ.
    """
    everything: dict[str, dict[str, Prepared]] = {}
    device = recorder.options.device
    for what in names:
        prepared = everything[what] = {}
        failed: dict[str, str] = {}
        for arm in (*rivals, *arms):
            if what in arm.calls:
                try:
                    prepared[arm.name] = prepare(arm.calls[what], device, graph)
                except Exception as error:
                    failed[arm.name] = first_line(error)
                    check_gpu(device)
        dense = [arm.name for arm in rivals if arm.name in prepared]
        ours = [arm for arm in arms if arm.name in prepared]
        for name, reason in failed.items():
            recorder.add(Row("", shape, name, sparsity, what, "ms", None, note=f"failed: {reason}"))
        if not prepared or (not ours and arms):
            continue
        times = timed(prepared, device, recorder.options.seconds)
        best = min(dense, key=lambda name: times[name].median) if dense else None
        for arm in ours or rivals:
            if arm.name not in times:
                continue
            own, one = times[arm.name], prepared[arm.name]
            recorder.add(
                Row(
                    work="",
                    shape=shape,
                    arm=arm.name,
                    sparsity=(sparsities or {}).get(arm.name, sparsity),
                    what=what if graph else f"{what}, eager",
                    unit="ms",
                    ours=1e3 * own.median,
                    best=1e3 * times[best].median if best else None,
                    rival=best or "",
                    spread=(own.p80 - own.p20) / own.median,
                    error=arm.error,
                    how=one.how if all(p.how == one.how for p in prepared.values()) else "eager",
                    note="; ".join(filter(None, [arm.note, *sorted({p.why for p in prepared.values()})])),
                )
            )
    return everything
