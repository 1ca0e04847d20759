"""How much faster a ticket of a given size trains on this machine: whole steps of it and of the dense network."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from . import models
from .compare import check_device, recipe
from .granularity import parse
from .measure import Meter, Timing, interleave, macs, parameters, peak_bytes
from .measure.clock import SHORTEST_WINDOW
from .nn import sparsify
from .nn.choose import FORMATS
from .planner import Plan, plan
from .report import machine, machine_line
from .same_function import check, masked_dense
from .search import at_init
from .steps import channels_last, dense_rivals, training_step
from .train import TrainConfig

WARMUP = 3  # the first calls compile and tune kernels and make the optimizer's state


@dataclass(frozen=True)
class BenchSettings:
    """What ``pysparse-ticket bench`` takes; without a budget, tickets of weights and tiles are of 0.8 and of 0.9."""

    model: str = "resnet20"
    granularity: str = "weight"
    sparsity: tuple[float, ...] = ()
    remove: tuple[int, ...] = ()
    score: str = "random"
    scope: str | None = None
    size: int = 32
    channels: int = 3
    classes: int = 10
    train: TrainConfig = field(default_factory=lambda: recipe(epochs=1, batch_size=128, lr=0.01))
    race_compile: bool = False
    repeats: int = 11
    seed: int = 0

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, not {self.repeats}")
        check_device(self.train.device)

    def scope_of_pieces(self) -> str:
        """As given; else "erk" for tiles, of which a small layer has too few to lose the others' share."""
        return self.scope or ("erk" if parse(self.granularity)[0] == "block" else "global")

    def budgets(self) -> dict[str, dict]:
        """{arm's name: what at_init takes}."""
        shares = self.sparsity
        if not shares and not self.remove and parse(self.granularity)[0] in ("weight", "block"):
            shares = (0.8, 0.9)
        found = {f"{self.granularity} {100 * share:g}%": {"sparsity": share} for share in shares}
        found |= {f"{self.granularity} -{count}": {"remove": count} for count in self.remove}
        return found or {self.granularity: {}}


@dataclass
class _Arm:
    """One way to train: the eager model (for the counts), what runs, its batch, and what is reported of it already."""

    model: nn.Module
    runner: nn.Module
    x: Tensor
    facts: dict
    step: Callable[[], None] | None = None
    optimizer: torch.optim.Optimizer | None = None


def bench(
    settings: BenchSettings, on_progress: Callable[[str, int, int], None] = lambda *_: None
) -> tuple[dict, dict[str, Plan]]:
    """Time whole training steps of the dense network and of its tickets, interleaved in this process.

    Returns the report, as written by ``--json``, and each ticket's plan. Raises ValueError for a bad setting, before
    anything is timed, and WrongResult for a sparsified model whose logits or first update differ from those of the
    dense network with the ticket's weights set to zero.
    """
    config, budgets = settings.train, settings.budgets()
    stages = len(budgets) + 2
    shape = (settings.channels, settings.size, settings.size)
    network = models.fresh(settings.model, settings.classes, shape, settings.seed, config.device).train()
    generator = torch.Generator().manual_seed(settings.seed)
    x = torch.randn(config.batch_size, *shape, generator=generator).to(config.device)
    y = torch.randint(settings.classes, (config.batch_size,), generator=generator).to(config.device)
    how = {"score": settings.score, "granularity": settings.granularity, "scope": settings.scope_of_pieces()}
    tickets = {
        name: at_init(network, (x, y), seed=settings.seed, rewind=False, **how, **budget)
        for name, budget in budgets.items()
    }

    on_progress("racing the dense formats", 0, stages)
    rivals = dense_rivals(copy.deepcopy(network), x, settings.race_compile)
    eager = {name: training_step(m, b, y, config)[0] for name, (m, b) in rivals.items() if name != "compile"}
    times = interleave(eager, repeats=5, warmup=2, device=x.device)
    if min(times, key=lambda name: times[name].median) == "channels_last":
        network, x = network.to(memory_format=torch.channels_last), channels_last(x)
    arms = {}
    for name, (runner, batch) in rivals.items():
        model = rivals["channels_last"][0] if name == "compile" else runner
        arms[f"dense {name}"] = _Arm(model, runner, batch, {"sparsity": 0.0, "error": None, "plan": []})
    plans = {}
    for at, (name, ticket) in enumerate(tickets.items(), 1):
        on_progress(f"sparsifying {name}", at, stages)
        model = sparsify(copy.deepcopy(network), ticket, sample=x)
        plans[name] = plan(model)
        error = check(name, model, masked_dense(network, ticket), x, y)
        facts = {"sparsity": ticket.sparsity, "error": error, "plan": plans[name].rows()}
        arms[name] = _Arm(model, model, x, facts)
        if settings.race_compile and not any(row["format"] in FORMATS for row in facts["plan"]):
            twin = copy.deepcopy(model)  # plain modules alone, so that what compiles the dense one compiles it
            arms[f"{name} compile"] = _Arm(model, torch.compile(twin), x, facts)
    on_progress("timing", stages - 1, stages)
    for arm in arms.values():
        arm.step, arm.optimizer = training_step(arm.runner, arm.x, y, config)
        if arm.runner is not arm.model:
            _compile(arm.step)
    calls = {name: arm.step for name, arm in arms.items()}
    times = interleave(calls, settings.repeats, WARMUP, device=x.device)
    best = min((f"dense {name}" for name in rivals), key=lambda name: times[name].median)
    rows = [_row(name, arm, times[name], times[best]) for name, arm in arms.items()]
    on_progress("done", stages, stages)
    report = {"machine": machine_line(), "facts": machine(), "settings": asdict(settings)}
    return report | {"fastest_dense": best, "arms": rows}, plans


def _row(name: str, arm: _Arm, time: Timing, dense: Timing) -> dict:
    joules, method = joules_per_step(arm.step, time.median, arm.x.device)
    return {
        "name": name,
        "sparsity": arm.facts["sparsity"],
        "step_seconds": time.median,
        "p20": time.p20,
        "p80": time.p80,
        "speedup": dense.median / time.median,
        "macs": macs(copy.deepcopy(arm.model), arm.x[:1]),
        "parameters": parameters(arm.model),
        "peak_bytes": peak_bytes(arm.step, arm.runner, arm.optimizer, arm.x.device),
        "joules": joules,
        "energy_method": method,
        "error": arm.facts["error"],
        "plan": arm.facts["plan"],
    }


def joules_per_step(step: Callable[[], None], seconds: float, device: torch.device) -> tuple[float | None, str]:
    """Over as many steps as the counter needs to be read to 2%; None, and why, where there is none."""
    with Meter(device) as probe:
        pass
    if probe.joules is None:
        return None, probe.method
    calls = math.ceil(1.1 * SHORTEST_WINDOW * probe.period / seconds)
    with Meter(device) as meter:
        for _ in range(calls):
            step()
    return None if meter.joules is None else meter.joules / calls, meter.method


def _compile(step: Callable[[], None]) -> None:
    try:
        step()
    except RuntimeError as error:  # of dynamo and inductor, which lack a compiler, say
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"torch.compile does not run here ({reason}); leave --compile out") from error
