"""Time each way to run a layer on this machine, keep the fastest, remember the outcome."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .measure import gpu_facts, interleave
from .outcomes import Outcomes
from .structure import eval_mode
from .ticket import fingerprint

STEP_SECONDS, MOST_REPEATS = 3.0, 100  # a race of five calls takes a neighbour on the machine for a difference
SLOWER_AT_MOST = 1.03  # a sparsified step may take this much of the dense step
# and masked layers go back to dense unless the race has them below this: it counts no loss or optimizer, and errs by
# some 3%. Compact layers stay up to SLOWER_AT_MOST, since they save memory too
MASKED_AT_MOST = 0.97


@dataclass
class LayerPlan:
    """What was decided for one layer. Times are medians of forward + backward in microseconds, None if not timed."""

    layer: str
    op: str
    shape: tuple[int, ...]
    sparsity: float
    format: str
    dense_us: float | None = None
    chosen_us: float | None = None
    break_even: float | None = None
    why: str = ""

    @property
    def speedup(self) -> float | None:
        return self.dense_us / self.chosen_us if self.dense_us and self.chosen_us else None


@dataclass
class Plan:
    """One :class:`LayerPlan` a layer, and how the whole training step compares (None where it was not timed)."""

    layers: list[LayerPlan] = field(default_factory=list)
    step_ratio: float | None = None
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[dict[str, object]]:
        return [asdict(layer) | {"speedup": layer.speedup} for layer in self.layers]

    def __str__(self) -> str:
        header = (
            "layer",
            "op",
            "input",
            "sparsity",
            "format",
            "dense us",
            "chosen us",
            "speed-up",
            "break-even",
            "why",
        )
        body = [
            (
                p.layer,
                p.op,
                "x".join(map(str, p.shape)) or "-",
                f"{p.sparsity:.1%}",
                p.format,
                _number(p.dense_us, ".0f"),
                _number(p.chosen_us, ".0f"),
                _number(p.speedup, ".2f"),
                _number(p.break_even, ".0%"),
                p.why,
            )
            for p in self.layers
        ]
        widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [header, *body]
        ]
        if self.step_ratio is not None:
            lines.append(f"whole training step: {self.step_ratio:.2f} of the dense step's time")
        return "\n".join(lines + self.notes)


def _number(value: float | None, spec: str) -> str:
    return "not timed" if value is None else format(value, spec)


def plan(model: nn.Module) -> Plan:
    """The plan of a sparsified model; ValueError for a model that was not sparsified."""
    found = getattr(model, "_pysparse_plan", None)
    if found is None:
        raise ValueError(f"{type(model).__name__} was not sparsified, so there is no plan to show")
    return found


@dataclass(frozen=True)
class Site:
    """How a layer is called in the sample run."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    needs_input_grad: bool

    def input(self, device: torch.device) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)  # the user's random state stays where it is
        x = torch.randn(self.shape, generator=generator, device=device).to(self.dtype)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x.requires_grad_(self.needs_input_grad)


def find_sites(model: nn.Module, sample: Tensor, names: list[str]) -> dict[str, Site]:
    """Run the sample once, in eval mode, and record each named layer's first input."""
    sites: dict[str, Site] = {}
    handles = []
    for name in names:

        def hook(_, args, name=name):
            x = args[0]
            last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
            sites.setdefault(name, Site(tuple(x.shape), x.dtype, last, x.requires_grad))

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    try:
        with eval_mode(model), torch.enable_grad():
            model(sample)
    finally:
        for handle in handles:
            handle.remove()
    return sites


def step(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward, all gradients that training would compute."""
    with torch.no_grad():
        y = module(x)
    generator = torch.Generator(y.device).manual_seed(1)
    grad = torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype)
    wanted = [p for p in module.parameters() if p.requires_grad] + ([x] if x.requires_grad else [])

    def run() -> None:
        torch.autograd.grad(module(x), wanted, grad)

    return run


def race(
    candidates: Mapping[str, nn.Module], site: Site | Mapping[str, Site], device: torch.device, repeats: int = 7
) -> dict[str, float]:
    """Median microseconds of a training step of each candidate on its site's input, interleaved."""
    sites = dict.fromkeys(candidates, site) if isinstance(site, Site) else site
    arms = {name: step(module, sites[name].input(device)) for name, module in candidates.items()}
    return _medians(arms, repeats, device)


def _medians(
    arms: Mapping[str, Callable[[], None]], repeats: int, device: torch.device, seconds: float = 0.0
) -> dict[str, float]:
    """At least so many repeats, and on a CPU, where a time is of one call, more within so many seconds."""
    # the first call on a GPU compiles and tunes kernels, so a third one is the first to tell how long a call takes
    warmup = 3 if device.type == "cuda" else 2
    times = interleave(dict(arms), repeats=repeats, warmup=warmup, device=device)
    if seconds and device.type == "cpu":
        more = min(MOST_REPEATS, int(seconds / max(1e-9, sum(t.median for t in times.values()))))
        if more > repeats:
            times = interleave(dict(arms), repeats=more, warmup=0, device=device)
    return {name: 1e6 * t.median for name, t in times.items()}


class PlanCache(Outcomes):
    """Outcomes of races by machine, versions and shape."""

    def __init__(self) -> None:
        super().__init__("plans.json")

    @staticmethod
    def key(what: str, module: nn.Module, *facts: object) -> str:
        """Of a race named ``what`` over ways to run the dense ``module``, on this machine, with these ``facts``."""
        from .ops.library import CPU_ERROR, cpu_isa

        machine = (platform.machine(), cpu_model(), torch.get_num_threads(), CPU_ERROR or cpu_isa())
        device = next(module.parameters()).device
        where = device.type
        if where == "cuda":
            where = (where, *gpu_facts(device.index or 0).values(), _triton_kernels())
        kind = (type(module).__name__, module.extra_repr(), fingerprint(module))
        text = repr((what, machine, where, torch.__version__, _build_id(), kind, facts))
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def get_or_race(self, key: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """A new outcome is kept at once: a killed call loses one race."""
        if key not in self.known:
            self.keep(key, measure())
        return self.known[key]


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _build_id() -> str:
    """The compiled kernels' identity: an outcome raced on other kernels says nothing about these."""
    found = sorted(Path(__file__).parent.glob("_C*"))
    return f"{found[0].stat().st_size}-{found[0].stat().st_mtime_ns}" if found else "none"


def _triton_kernels() -> list[tuple[str, int, int]]:
    """The same of the Triton kernels."""
    spec = importlib.util.find_spec("pysparse_ticket.kernels")
    files = sorted(Path(spec.origin).parent.glob("*.py")) if spec and spec.origin else []
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def race_steps(models: Mapping[str, nn.Module], sample: Tensor, repeats: int = 5) -> dict[str, float]:
    """Median microseconds of each model's training step on the sample, interleaved; copies run, the models stay."""
    cuda = [sample.device] if sample.is_cuda else []
    with torch.random.fork_rng(devices=cuda):  # dropout draws
        steps = {name: step(copy.deepcopy(model).train(), sample) for name, model in models.items()}
        return _medians(steps, repeats, sample.device, STEP_SECONDS)
