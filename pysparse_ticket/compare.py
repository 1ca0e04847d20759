"""The main job: find tickets, train each beside the dense network, and put accuracy, time and joules in one table."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import data as datasets
from . import models
from .data import ImageData
from .files import write_whole
from .measure import Meter, interleave, macs, parameters
from .nn import sparsify
from .nn.choose import FORMATS
from .planner import plan, step
from .report import cells, machine, machine_line, markdown_table, plot_arms
from .search import at_init, filter_twin
from .steps import channels_last, dense_rivals, peak_bytes_of
from .ticket import Ticket, clone_state
from .train import Progress, TrainConfig, train
from .train_config import steps_per_epoch

DENSE_FORMATS = ("contiguous", "channels_last", "compile")


def recipe(epochs: int = 4, batch_size: int = 64, lr: float = 0.1, device: str = "cpu") -> TrainConfig:
    """SGD with nesterov momentum, one epoch of warm-up, a tenth of the rate after 60% and again after 85%."""
    marks = {round(0.6 * epochs), round(0.85 * epochs)}
    return TrainConfig(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        nesterov=True,
        warmup_epochs=min(1, epochs),
        milestones=tuple(sorted(m for m in marks if 1 <= m < epochs)),
        device=device,
    )


@dataclass(frozen=True)
class Settings:
    """What ``pysparse-ticket compare`` takes; the defaults are the embedded demonstration."""

    data: str = "digits"
    model: str = "resnet32"
    size: int | None = 16
    root: str | None = None
    download: bool = False
    train: TrainConfig = field(default_factory=recipe)
    seeds: int = 3
    remove: int = 5
    sparsity: float = 0.9
    race_compile: bool = False
    country: str | None = None
    gco2_per_kwh: float | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, not {self.seeds}")
        check_device(self.train.device)


def check_device(device: str) -> None:
    """ValueError for a GPU that torch does not see."""
    wanted = torch.device(device)
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch sees no GPU; use --device cpu")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} was asked for, but torch sees {torch.cuda.device_count()} GPUs")


Search = Callable[[nn.Module, tuple[Tensor, Tensor], int], Ticket | None]


def arms(settings: Settings) -> dict[str, Search]:
    """Each arm's name and how its ticket is found on a freshly initialised model."""

    def layers(score: str) -> Search:
        return lambda model, batch, seed: at_init(
            model, batch, score=score, granularity="layer", remove=settings.remove, seed=seed
        )

    def twin(model: nn.Module, batch: tuple[Tensor, Tensor], seed: int) -> Ticket:
        return filter_twin(model, layers("grasp")(model, batch, seed), batch, seed=seed)

    def weights(model: nn.Module, batch: tuple[Tensor, Tensor], seed: int) -> Ticket:
        return at_init(model, batch, score="magnitude", granularity="weight", sparsity=settings.sparsity, seed=seed)

    return {
        "dense": lambda model, batch, seed: None,
        f"layers grasp -{settings.remove}": layers("grasp"),
        f"layers snip -{settings.remove}": layers("snip"),
        f"layers random -{settings.remove}": layers("random"),
        "filters grasp": twin,
        f"weights {settings.sparsity:.0%}": weights,
    }


def compare(
    settings: Settings, folder: Path, on_progress: Callable[[str, int, int], None] = lambda *_: None
) -> list[dict]:
    """Run every arm at every seed, interleaved; write summary.json, run.json, table.md, plot.png and the tickets.

    ``on_progress(arm and seed, steps done, steps in all)`` is called after each optimizer step. Each training run
    leaves a checkpoint in ``folder``: called again with the same settings and folder, an interrupted comparison goes
    on where it stopped. Returns the arms as written to summary.json.
    """
    data = load_data(settings)
    searches = arms(settings)
    check_same_settings(folder, settings)
    dense_times = remembered(folder / "dense.json", lambda: dense_step_seconds(settings, data))
    dense_format = min(dense_times, key=dense_times.__getitem__)

    results: dict[str, list[dict]] = {name: [] for name in searches}
    order = list(searches)
    per_run = settings.train.epochs * steps_per_epoch(settings.train, len(data.train_labels))
    done, total = 0, per_run * len(searches) * settings.seeds
    for seed in range(settings.seeds):
        for name in order[seed % len(order) :] + order[: seed % len(order)]:  # no arm always runs first

            def tick(progress: Progress, what=f"{name}, seed {seed}", done=done) -> None:
                on_progress(what, done + progress.step, total)

            run = one_run(settings, data, name, searches[name], seed, folder, dense_format, tick)
            results[name].append(run)
            done += per_run
    summary = [summarise(name, runs, results["dense"], settings) for name, runs in results.items()]
    facts = machine() | {"settings": asdict(settings), "dense_format": dense_format, "dense_step_seconds": dense_times}
    write_whole(folder / "summary.json", json.dumps(summary, indent=2).encode())
    write_whole(folder / "run.json", json.dumps(facts, indent=2).encode())
    header, rows = cells(summary)
    energy = sorted({arm["energy_method"] for arm in summary})
    dense_note = ", ".join(f"{k} {1e3 * v:.1f} ms" for k, v in dense_times.items())
    text = (
        f"{markdown_table(header, rows)}\n{settings.model} on {settings.data}, {settings.seeds} paired seeds, "
        f"{settings.train.epochs} epochs; the filter arm keeps as many filters as layers grasp. {machine_line(facts)}. "
        f"Dense step: {dense_note}; {dense_format} is used. "
        f"Energy: {'; '.join(energy)}.\n"
    )
    write_whole(folder / "table.md", text.encode())
    plot_arms(summary, folder / "plot.png")
    return summary


def check_same_settings(folder: Path, settings: Settings) -> None:
    """Keep the settings; ValueError naming the first that differs once the folder holds training of other ones.

    Seeds may be added, and what only reads or reports may change.
    """
    free = ("seeds", "root", "download", "country", "gco2_per_kwh")
    ours = json.loads(json.dumps({k: v for k, v in asdict(settings).items() if k not in free}))
    ours |= ours.pop("train")
    path = folder / "settings.json"
    trained = path.exists() and any(folder.glob("*.checkpoint"))
    theirs = json.loads(path.read_text()) if trained else ours
    for name in ours | theirs:
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"{folder} holds another comparison: its {name} is {theirs.get(name)!r}, this one's "
                f"{ours.get(name)!r}; give another --name"
            )
    write_whole(path, json.dumps(ours, indent=2).encode())


def remembered(path: Path, make: Callable[[], dict]) -> dict:
    """What an interrupted comparison found out before: it has to go on with the same choices."""
    if not path.exists():
        write_whole(path, json.dumps(make(), indent=2).encode())
    return json.loads(path.read_text())


def dense_step_seconds(settings: Settings, data: ImageData) -> dict[str, float]:
    """Race one training step of the dense network in each memory format (and compiled, if asked for)."""
    x, _ = first_batch(settings, data)
    rivals = dense_rivals(build(settings, data, seed=0).train(), x, settings.race_compile)
    candidates = {name: step(model, batch) for name, (model, batch) in rivals.items()}
    return {name: t.median for name, t in interleave(candidates, repeats=5, warmup=2, device=x.device).items()}


def load_data(settings: Settings) -> ImageData:
    """The settings' data set, on the device that trains."""
    options = {"size": settings.size} if settings.data == "digits" else {}
    data = datasets.load(settings.data, root=settings.root, download=settings.download, **options)
    return data.to(settings.train.device)


def build(settings: Settings, data: ImageData, seed: int) -> nn.Module:
    """The arm's network at its initialisation: the same for every arm of a seed."""
    return models.fresh(settings.model, data.classes, data.shape, seed, settings.train.device)


def first_batch(settings: Settings, data: ImageData, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A seeded batch for scoring and planning."""
    augment = torch.Generator(settings.train.device).manual_seed(seed)
    return data.train_batch(data.draw(settings.train.batch_size, seed), augment)


def one_run(settings, data, name: str, search: Search, seed: int, folder: Path, dense_format: str, tick) -> dict:
    """Find, sparsify and train one arm at one seed; files of an earlier, interrupted run are gone on from."""
    model, batch = build(settings, data, seed), first_batch(settings, data, seed)
    last = dense_format != "contiguous"
    config = replace(settings.train, seed=seed, channels_last=last)
    x = channels_last(batch[0]) if last else batch[0]
    stem = f"{name.replace(' ', '-').replace('%', '')}-seed{seed}"
    ticket_path, checkpoint = folder / f"{stem}.ticket.safetensors", folder / f"{stem}.checkpoint"

    def prepare() -> dict:
        began = time.perf_counter()
        twin = copy.deepcopy(model)
        if (ticket := search(twin, batch, seed)) is not None:
            ticket.save(ticket_path)
            twin = sparsify(twin.to(memory_format=torch.channels_last) if last else twin, ticket, sample=x)
        return {
            "find_seconds": time.perf_counter() - began,
            "macs": macs(copy.deepcopy(twin), x[:1]),
            "parameters": parameters(twin),
            "peak_bytes": peak_bytes_of(twin, x, batch[1], config) if seed == 0 else None,
            "plan": plan(twin).rows() if ticket is not None else [],
        }

    found = remembered(folder / f"{stem}.json", prepare)
    masked = {row["layer"]: row["format"] for row in found["plan"] if row["format"] in FORMATS}
    if name != "dense":
        model = model.to(memory_format=torch.channels_last) if last else model
        model = sparsify(model, Ticket.load(ticket_path, model), plan=masked)
    runner = compiled(model, x, batch[1], len(data.train_labels)) if dense_format == "compile" and not masked else model
    resumed = checkpoint.exists()  # its first part ran in another process, whose joules are gone
    with Meter(settings.train.device, country=settings.country, gco2_per_kwh=settings.gco2_per_kwh) as meter:
        history = train(runner, data, config, checkpoint=checkpoint, on_step=tick)
    return found | {
        "accuracy": history.test_accuracy,
        "seconds": history.seconds,
        "joules": None if resumed else meter.joules,
        "gco2": None if resumed else meter.gco2,
        "energy_method": "not measured: the run was resumed" if resumed else meter.method,
    }


def compiled(model: nn.Module, x: Tensor, y: Tensor, samples: int) -> nn.Module:
    """The model compiled for the batches that training will have, so that no compilation is timed; its state stays."""
    torch.compiler.reset()  # else the arms share one limit of recompilations and the last ones run eagerly
    model.to(memory_format=torch.channels_last)  # as training will have it
    runner, state = torch.compile(model, dynamic=False), clone_state(model)
    with torch.random.fork_rng():
        for size in {min(len(x), samples), samples % len(x)} - {0}:
            for _ in range(2):  # gradients are None the first time only
                F.cross_entropy(runner.train()(x[:size]), y[:size]).backward()
    model.zero_grad(set_to_none=True)
    model.load_state_dict(state)
    return runner


def summarise(name: str, runs: list[dict], dense: list[dict], settings: Settings) -> dict:
    """One arm of summary.json; the speed-up is the median over seeds of the paired ratio."""
    last = [run["accuracy"][-1] for run in runs]
    ratios = [d["seconds"][-1] / run["seconds"][-1] for d, run in zip(dense, runs, strict=True)]
    joules = [run["joules"] for run in runs]
    gco2 = [run["gco2"] for run in runs]
    return {
        "name": name,
        "seeds": list(range(len(runs))),
        "accuracy": {"mean": statistics.fmean(last), "std": statistics.stdev(last) if len(last) > 1 else 0.0},
        "train_seconds": statistics.median(run["seconds"][-1] for run in runs),
        "find_seconds": statistics.median(run["find_seconds"] for run in runs),
        "speedup": statistics.median(ratios),
        "macs": round(statistics.fmean(run["macs"] for run in runs)),
        "parameters": round(statistics.fmean(run["parameters"] for run in runs)),
        "peak_bytes": runs[0]["peak_bytes"],
        "joules": None if None in joules else statistics.median(joules),
        "energy_method": runs[0]["energy_method"],
        "gco2": None if None in gco2 else statistics.median(gco2),
        "intensity": settings.country or settings.gco2_per_kwh,
        "plan": runs[0]["plan"],
        "curves": [{"seconds": run["seconds"], "accuracy": run["accuracy"]} for run in runs],
    }
