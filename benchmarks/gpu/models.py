"""Training steps of whole models on the GPU: tickets against the best dense, in milliseconds, megabytes and joules.

    python -m gpu.models resnet56 [--tiny --device cpu]

bf16 by autocast, channels_last where there are convolutions, random data, SGD with momentum. First everything eager and
by graph replay, then the joules of dense and the main ticket; with the time that is left both compiled, and the joules
of the fastest of each.
"""

from __future__ import annotations

import copy
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pysparse_ticket as pst
from gpu.checks import relative_error
from gpu.joules import step_energy
from gpu.program import BF16, Arm, Recorder, attempt, options, race
from gpu.record import Row
from gpu.tickets import Kind, ViTStack, random_ticket
from gpu.timing import prepare
from pysparse_ticket.measure import peak_bytes
from pysparse_ticket.measure.energy import NotMeasured, PolledPower, open_counter
from pysparse_ticket.models import build
from pysparse_ticket.same_function import LOGITS_ERROR, strict_float32

COMPILE_SECONDS = 60.0  # left at least, before dense and a ticket are compiled
JOULES_SECONDS = 40.0


@dataclass(frozen=True)
class Model:
    """How a network is built, for inputs of which shape, and its tickets; the first one is its main one."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    name: str
    classes: int
    tickets: tuple[Kind, ...]


RESNET = (Kind("filter", 0.5), Kind("block 64", 0.9), Kind("weight", 0.95))
TINY_RESNET = {"make": lambda: build("resnet26", 10, (3, 8, 8)), "shape": (4, 3, 8, 8), "classes": 10}


def cifar(name: str, removed: float) -> Model:
    """A CIFAR ResNet; its layer ticket removes that share of the blocks."""
    tickets = (Kind("layer", removed), *RESNET)
    return Model(lambda: build(name, 10, (3, 32, 32)), (128, 3, 32, 32), "CIFAR-shaped, batch 128", 10, tickets)


MODELS = {
    "resnet56": cifar("resnet56", 12 / 27),
    "resnet20": cifar("resnet20", 4 / 9),
    "resnet50": Model(
        lambda: build("imagenet-resnet50", 1000, (3, 224, 224)),
        (128, 3, 224, 224),
        "ImageNet-shaped, batch 128",
        1000,
        (*RESNET[:1], Kind("filter, raced", 0.5), Kind("layer", 6 / 16), *RESNET[1:]),
    ),
    "vit": Model(
        lambda: ViTStack(768, 3072, 12, 1000),
        (128, 196, 768),
        "12 x (768-3072-768), 128 x 196 tokens",
        1000,
        (Kind("block 64", 0.9), Kind("block 64", 0.75), Kind("layer", 6 / 12), Kind("weight", 0.95)),
    ),
}
TINY = dict.fromkeys(("resnet56", "resnet20", "resnet50"), TINY_RESNET) | {
    "vit": {"make": lambda: ViTStack(256, 512, 6, 128), "shape": (2, 5, 256), "classes": 128},
}


def training_step(model: nn.Module, x: Tensor, labels: Tensor, run: nn.Module | None = None):
    """The step of the model, called through ``run`` (its compiled twin), and its optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    run = run or model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, BF16):
            loss = F.cross_entropy(run(x).float(), labels)
        loss.backward()
        optimizer.step()

    return step, optimizer


def checked(model: nn.Module, x: Tensor) -> float:
    """Relative error of the logits against the densified model's, both in fp32; ValueError when it is too large."""
    few = x[:32]
    with torch.no_grad(), strict_float32():
        got = copy.deepcopy(model).train()(few)
        want = pst.densify(copy.deepcopy(model)).train()(few)
    error = relative_error(got, want)
    if not error < LOGITS_ERROR:
        raise ValueError(f"wrong: the logits are off by {error:.1e}")
    return error


class Bench:
    def __init__(self, recorder: Recorder, model: Model) -> None:
        self.recorder, self.model, self.options = recorder, model, recorder.options
        device = self.options.device
        dense = model.make().to(device)
        x = torch.randn(model.shape, device=device)
        if x.dim() == 4:
            dense, x = (t.to(memory_format=torch.channels_last) for t in (dense, x))
        self.dense, self.x = dense.train(), x
        self.labels = torch.randint(model.classes, (len(x),), device=device)
        self.sparse: dict[Kind, nn.Module] = {}
        self.sparsities: dict[str, float] = {}

    def arm(self, name: str, model: nn.Module, error: float | None = None, compiled: bool = False) -> Arm:
        own = copy.deepcopy(model)
        run = torch.compile(own, dynamic=False) if compiled else None
        return Arm(name, {"step": lambda: training_step(own, self.x, self.labels, run)[0]}, error)

    def ticket(self, kind: Kind) -> Arm:
        """Sparsified under autocast, so that the plan's races see the dtypes of training. Removed filters and blocks
        are run removed, whatever the race of the whole step would say, but for an arm named "raced"."""
        model = copy.deepcopy(self.dense)
        x = self.x
        ticket = random_ticket(model, kind, x[:1])
        with torch.autocast(x.device.type, BF16):
            model = pst.sparsify(model, ticket, x if ticket.masks or "raced" in kind.name else None).train()
        arm = self.arm(kind.arm, model, checked(model, x))
        self.sparse[kind] = model
        counts = Counter(row.format for row in pst.plan(model).layers)
        arm.note = "; ".join([", ".join(f"{n} {fmt}" for fmt, n in counts.items()), *pst.plan(model).notes])
        return arm

    def memory(self, name: str, model: nn.Module, sparsity: float) -> float | None:
        own = copy.deepcopy(model)
        step, optimizer = training_step(own, self.x, self.labels)
        try:
            return peak_bytes(step, own, optimizer, self.options.device) / 1e6
        except RuntimeError as error:
            print(f"no peak memory of {name} at {sparsity:.2f}: {error}", flush=True)
            return None

    def run(self) -> None:
        shape = self.model.name
        dense = self.arm("dense", self.dense)
        kinds = self.model.tickets
        arms = []
        for kind in kinds:
            arm = attempt(self.recorder, shape, kind.arm, kind.share, lambda kind=kind: self.ticket(kind))
            if arm:
                arms.append(arm)
                self.sparsities[arm.name] = kind.share
        self.race([dense], arms, graph=True)
        self.race([dense], arms, graph=False)
        base = self.memory("dense", self.dense, 0.0)
        for kind, model in self.sparse.items():
            ours = self.memory(kind.name, model, kind.share)
            self.recorder.add(Row("", shape, kind.arm, kind.share, "peak memory", "MB", ours, base, "dense"))
        if not arms or arms[0].name != kinds[0].arm:
            return
        self.energy(kinds[0], dense, arms[0])
        if self.options.compile and self.left() > COMPILE_SECONDS:
            self.energy(kinds[0], *self.compiled(kinds[0], dense, arms[0]))

    def left(self) -> float:
        return self.options.end - time.monotonic()

    def race(self, rivals: Sequence[Arm], arms: Sequence[Arm], graph: bool) -> list[Row]:
        known = len(self.recorder.rows)
        race(self.recorder, self.model.name, 0.0, rivals, arms, ("step",), graph=graph, sparsities=self.sparsities)
        return self.recorder.rows[known:]

    def compiled(self, kind: Kind, dense: Arm, ours: Arm) -> tuple[Arm, Arm]:
        """Dense and the main ticket compiled, beside their eager twins; returns the fastest of each."""
        torch.compiler.reset()
        name = f"{kind.arm}, compiled"
        self.sparsities[name] = kind.share
        arms = [ours, self.arm(name, self.sparse[kind], compiled=True)]
        rivals = [dense, self.arm("dense, compiled", self.dense, compiled=True)]
        rows = [row for row in self.race(rivals, arms, graph=True) if row.ours]
        if not rows:
            return dense, ours
        best = min(rows, key=lambda row: row.ours)
        by_name = {arm.name: arm for arm in (*rivals, *arms)}
        return by_name.get(best.rival, dense), by_name[best.arm]

    def energy(self, kind: Kind, dense: Arm, ours: Arm) -> None:
        """Joules a step of the two, each by graph replay."""
        if self.left() < JOULES_SECONDS:
            return
        shape, device = self.model.name, self.options.device
        try:
            counter = open_counter(device)
            steps = {arm.name: prepare(arm.calls["step"], device) for arm in (dense, ours)}
            found = step_energy(
                {name: one.call for name, one in steps.items()},
                counter,
                device,
                power=(lambda: PolledPower(counter)) if hasattr(counter, "watts") else None,
            )
        except NotMeasured as reason:
            self.recorder.add(Row("", shape, kind.arm, kind.share, "joules a step", "J", None, note=str(reason)))
            return
        base, own = found.arms[dense.name], found.arms[ours.name]
        note = (
            f"{ours.name}; {counter.method}, period {found.period:.3g} s, idle {found.idle_watts:.0f} W, "
            f"{own.windows} windows of {own.steps} steps"
        )
        row = Row(
            "", shape, kind.arm, kind.share, "joules a step", "J", own.joules, base.joules, dense.name, own.spread
        )
        row = replace(row, note=note, how="/".join(sorted({one.how for one in steps.values()})))
        self.recorder.add(row, replace(row, what="net joules a step", ours=own.net_joules, best=base.net_joules))
        if own.polled_joules is not None:
            polled = replace(row, what="joules a step by polled power", note="trapezoids of the board's power")
            self.recorder.add(replace(polled, ours=own.polled_joules, best=base.polled_joules))


def main(argv: Sequence[str] | None = None) -> Recorder:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in MODELS:
        raise SystemExit(f"name a model first: {', '.join(MODELS)}")
    chosen = options(__doc__, words[1:])
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    model = MODELS[words[0]]
    if chosen.tiny:
        model = replace(model, **TINY[words[0]])
    recorder = Recorder(f"model {words[0]}", chosen)
    Bench(recorder, model).run()
    return recorder


if __name__ == "__main__":
    main()
