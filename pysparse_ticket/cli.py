"""The command ``pysparse-ticket``. Bad input ends with one sentence and exit code 2, never a traceback."""

from __future__ import annotations

import contextlib
import datetime
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import __version__

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console()
errors = Console(stderr=True)


@app.command()
def info() -> None:
    """Versions, CPU features, GPU, and each backend with why it is or is not available."""
    import importlib.metadata

    import numpy

    from .backends import cpu_features, summary
    from .report.machine import machine

    facts = machine()
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = [
        ("pysparse-ticket", f"{__version__}, revision {facts['revision'] or 'unknown'}"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("numpy", numpy.__version__),
        ("triton", _version("triton", importlib.metadata)),
        ("cpu", f"{facts['cpu']}, {facts['threads']} threads; {', '.join(cpu_features()) or 'no AVX'}"),
        ("gpu", facts["gpu"] or "none visible"),
        *summary(),
    ]
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)


def _version(package: str, metadata) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@app.command("find-trained")
def find_trained_ticket(
    out: Annotated[Path, typer.Argument(help="the ticket's file")],
    data: str = "digits",
    model: str = "resnet32",
    size: int = 16,
    root: str | None = None,
    score: Annotated[
        str, typer.Option(help="hrank, expectabs, kl, pls-vip, cka, cka-intra, filter-l1, random, or one of weights")
    ] = "hrank",
    remove: Annotated[int, typer.Option(help="blocks")] = 1,
    steps: Annotated[int, typer.Option(help="rounds in which they go, each scored anew")] = 1,
    rewind_epoch: Annotated[int, typer.Option(help="epoch whose state the ticket starts from")] = 0,
    reinit: Annotated[bool, typer.Option("--reinit", help="start from torch's default draws instead")] = False,
    epochs: int = 4,
    batch_size: int = 64,
    lr: float = 0.1,
    samples: Annotated[int, typer.Option(help="training images to score on")] = 512,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Train a network, find a layer ticket in it and save it; stopped, the same command goes on."""
    from .compare import Settings, recipe
    from .find_trained import find_trained
    from .train import Interrupted

    with _one_sentence():
        settings = Settings(data=data, model=model, size=size, root=root, train=recipe(epochs, batch_size, lr, device))
        checkpoint = out.with_name(f"{out.stem}.checkpoint")
        with Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
        ) as bar:
            task = bar.add_task("training", total=None)
            try:
                ticket, history = find_trained(
                    settings,
                    checkpoint,
                    seed=seed,
                    rewind_epoch=rewind_epoch,
                    samples=samples,
                    score=score,
                    remove=remove,
                    steps=steps,
                    reinit=reinit,
                    on_progress=lambda p: bar.update(task, completed=p.step, total=p.steps),
                )
            except Interrupted as stop:
                bar.stop()
                errors.print(f"{stop}; go on with the same command", soft_wrap=True)
                raise typer.Exit(130) from None
        ticket.save(out)
        gone = ", ".join(ticket.removed_blocks) or "nothing"
        trained = f"trained to {history.test_accuracy[-1]:.2%}"
        console.print(f"{out}: {trained}, sparsity {ticket.sparsity:.2%}, removed {gone}", soft_wrap=True)


@app.command()
def compare(
    data: Annotated[str, typer.Option(help="digits, procedural, cifar10 or cifar100")] = "digits",
    model: Annotated[str, typer.Option(help="resnet14 .. resnet110, vgg16, tiny-resnet18, mlp-N, ...")] = "resnet32",
    size: Annotated[int, typer.Option(help="digits are scaled to this many pixels")] = 16,
    root: Annotated[str | None, typer.Option(help="folder of the CIFAR files")] = None,
    download: Annotated[bool, typer.Option(help="fetch CIFAR if it is not there")] = False,
    epochs: int = 4,
    batch_size: int = 64,
    lr: float = 0.1,
    seeds: Annotated[int, typer.Option(help="paired seeds, the same for every arm")] = 3,
    remove: Annotated[int, typer.Option(help="blocks that the layer tickets remove")] = 5,
    sparsity: Annotated[float, typer.Option(help="of the weight ticket, in [0, 1)")] = 0.9,
    race_compile: Annotated[bool, typer.Option(help="let torch.compile compete for the dense arm")] = False,
    country: Annotated[str | None, typer.Option(help="ISO code whose grid intensity gives g CO2")] = None,
    gco2_per_kwh: Annotated[float | None, typer.Option(help="grid intensity, instead of a country")] = None,
    device: str = "cpu",
    name: Annotated[str | None, typer.Option(help="folder below runs/; an interrupted one goes on")] = None,
    runs: Annotated[Path, typer.Option(help="where the run folders live")] = Path("runs"),
) -> None:
    """Train dense, layer, filter and weight tickets side by side: accuracy, seconds, MACs, memory, joules."""
    from .compare import Settings, recipe
    from .compare import compare as run
    from .report import machine_line, rich_table
    from .train import Interrupted

    with _one_sentence():
        settings = Settings(
            data=data,
            model=model,
            size=size,
            root=root,
            download=download,
            train=recipe(epochs, batch_size, lr, device),
            seeds=seeds,
            remove=remove,
            sparsity=sparsity,
            race_compile=race_compile,
            country=country,
            gco2_per_kwh=gco2_per_kwh,
        )
        stamp = f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
        folder = runs / (name or f"{data}-{model}-{stamp}")
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("racing the dense formats", total=None)
            try:
                arms = run(
                    settings,
                    folder,
                    lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
                )
            except Interrupted as stop:
                bar.stop()
                errors.print(f"{stop}; go on with: pysparse-ticket compare --name {folder.name} and the same options")
                raise typer.Exit(130) from None
        console.print(rich_table(arms, f"{model} on {data}, {seeds} paired seeds"))
        console.print(f"{machine_line()}\nenergy: {arms[0]['energy_method']}\nwritten to {folder}/", soft_wrap=True)


@app.command()
def find(
    out: Annotated[Path, typer.Argument(help="the ticket's file")],
    data: str = "digits",
    model: str = "resnet32",
    size: int = 16,
    root: str | None = None,
    score: Annotated[
        str,
        typer.Option(help="magnitude, random, synflow, snip, snip-scaled, grasp, grasp-signed or grasp-magnitude"),
    ] = "grasp",
    granularity: Annotated[str, typer.Option(help="layer, filter, weight, n:m or block:HxW")] = "layer",
    remove: Annotated[int | None, typer.Option(help="blocks or filters")] = None,
    sparsity: Annotated[float | None, typer.Option(help="of weights or tiles")] = None,
    aggregate: str = "sum",
    coupled: Annotated[bool, typer.Option(help="filters: those that go together too")] = True,
    batch_size: int = 128,
    seed: int = 0,
    scope: Annotated[str, typer.Option(help="where weights and tiles compete: global, layer or erk")] = "global",
    steps: Annotated[int | None, typer.Option(help="score and cut this often; 100 for synflow, else 1")] = None,
    allow_empty: Annotated[bool, typer.Option(help="accept masks that empty a layer")] = False,
    state: Annotated[Path | None, typer.Option(help="a ticket whose rewind state is scored and kept")] = None,
) -> None:
    """Find a ticket at initialisation and save it."""
    from .compare import Settings, build, first_batch, recipe
    from .data import load
    from .search import at_init
    from .ticket import Ticket

    with _one_sentence():
        rewound = Ticket.load(state).rewind if state else None
        if state and rewound is None:
            raise ValueError(f"{state} has no rewind state to score; find it with rewind=True")
        settings = Settings(data=data, model=model, size=size, root=root, train=recipe(batch_size=batch_size))
        images = load(data, root=root, **({"size": size} if data == "digits" else {}))
        ticket = at_init(
            build(settings, images, seed),
            first_batch(settings, images, seed),
            score=score,
            granularity=granularity,
            remove=remove,
            sparsity=sparsity,
            aggregate=aggregate,
            coupled=coupled,
            seed=seed,
            scope=scope,
            steps=steps,
            allow_empty=allow_empty,
            state=rewound,
        )
        ticket.provenance |= {"data": data, "model": model}
        ticket.save(out)
        gone = f", removed {', '.join(ticket.removed_blocks)}" if ticket.layers else ""
        console.print(f"{out}: sparsity {ticket.sparsity:.2%}{gone}", soft_wrap=True)


@app.command()
def transfer(
    ticket: Annotated[Path, typer.Argument(help="the source network's ticket, with its rewind state")],
    target: Annotated[str, typer.Option(help="the network to carry it to: resnet56, vgg19, mlp-4, ...")],
    out: Annotated[Path, typer.Option(help="the new ticket's file")],
    source: Annotated[str | None, typer.Option(help="the ticket's network, to check; the ticket records it")] = None,
    order: Annotated[str, typer.Option(help="append (1 2 1 2) or interpolate (1 1 2 2)")] = "append",
    units: Annotated[str, typer.Option(help="all, or how many units of a stage are repeated")] = "all",
    mapping: Annotated[str | None, typer.Option(help="your own, as '0:0;1:1,5;2:2,6'; stages separated by |")] = None,
    control: Annotated[str | None, typer.Option(help="random-mask, random-added, reinit or snip-added")] = None,
    data: Annotated[str, typer.Option(help="of snip-added")] = "digits",
    size: int = 16,
    root: str | None = None,
    batch_size: int = 128,
    seed: Annotated[int, typer.Option(help="of the controls and of reinit's weights")] = 0,
) -> None:
    """Stretch or squeeze a weight ticket into one for a deeper or shallower network of its family."""
    from .compare import Settings, first_batch, recipe
    from .data import load
    from .search import elastic
    from .ticket import Ticket

    with _one_sentence():
        found = Ticket.load(ticket)
        settings = Settings(data=data, size=size, root=root, train=recipe(batch_size=batch_size))
        batches = None
        if control == "snip-added":
            images = load(data, root=root, **({"size": size} if data == "digits" else {}))
            batches = first_batch(settings, images, seed)
        result = elastic(
            found,
            None if source is None else _network_like(source, found, seed),
            _network_like(target, found, seed),
            order,
            units=int(units) if units.isdigit() else units,
            mapping=mapping,
            control=control,
            batches=batches,
            seed=seed,
        )
        result.provenance["model"] = target
        if "data" in found.provenance:
            result.provenance["data"] = found.provenance["data"]
        result.save(out)
        console.print(
            f"{out}: {target} at sparsity {result.sparsity:.2%}, the source's {found.sparsity:.2%}; "
            f"mapping {result.provenance['mapping']}",
            soft_wrap=True,
            highlight=False,
        )


def _network_like(name: str, ticket, seed: int) -> torch.nn.Module:
    """The named network, freshly drawn, with the inputs and classes of the ticket's."""
    from .models import build

    weights = [shape for _, shape in ticket.architecture if len(shape) > 1]
    if not weights:
        raise ValueError("this ticket does not record its network, so none can be built like it")
    first, classes = weights[0], weights[-1][0]
    flat = len(first) == 2
    # only the channels of a convolution's input show in its weights; 32x32 is enough for every network
    shape = (first[1], 1, 1) if flat and name.startswith(("mlp", "lenet")) else (1 if flat else first[1], 32, 32)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(name, classes, shape)


@contextlib.contextmanager
def _one_sentence():
    """Errors that name what the user gave become one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        errors.print(f"[red]error:[/red] {error}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from None


def main() -> None:
    app()


if __name__ == "__main__":
    main()
