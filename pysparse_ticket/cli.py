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
        with _progress_bar() as bar:
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
    method: Annotated[str, typer.Option(help="at-init, or imp: train, prune, rewind, again and again")] = "at-init",
    data: str = "digits",
    model: str = "resnet32",
    size: int = 16,
    root: str | None = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="at-init: magnitude, random, synflow, snip, snip-scaled, grasp (default), grasp-signed or -magnitude"
        ),
    ] = None,
    granularity: Annotated[
        str | None, typer.Option(help="layer, filter, weight, n:m or block:HxW [at-init: layer, imp: weight]")
    ] = None,
    remove: Annotated[int | None, typer.Option(help="at-init: blocks or filters")] = None,
    sparsity: Annotated[float | None, typer.Option(help="at-init: of weights or tiles")] = None,
    importance: Annotated[str | None, typer.Option(help="imp: magnitude, l1, l2, softmax, minmax or lamp")] = None,
    rounds: Annotated[int | None, typer.Option(help="imp: prunings, 10")] = None,
    rate: Annotated[float | None, typer.Option(help="imp: share of what is left that a round removes, 0.2")] = None,
    rewind_step: Annotated[int | None, typer.Option(help="imp: step whose state each round starts from, 0")] = None,
    mode: Annotated[str | None, typer.Option(help="imp: rewind the weights, or only the learning-rate")] = None,
    control: Annotated[str | None, typer.Option(help="imp: random, shuffle or reinit")] = None,
    spare: Annotated[list[str] | None, typer.Option(help="imp: a layer that is not pruned; repeatable")] = None,
    epochs: Annotated[int | None, typer.Option(help="imp: of each round, 4")] = None,
    lr: Annotated[float | None, typer.Option(help="imp: 0.1")] = None,
    device: str = "cpu",
    folder: Annotated[Path | None, typer.Option(help="imp: where the levels are kept [OUT-levels]")] = None,
    aggregate: str = "sum",
    coupled: Annotated[bool, typer.Option(help="at-init, filters: those that go together too")] = True,
    batch_size: int = 128,
    seed: int = 0,
    scope: Annotated[
        str, typer.Option(help="where weights and tiles compete: global, layer or, at-init, erk")
    ] = "global",
    steps: Annotated[
        int | None, typer.Option(help="at-init: score and cut this often; 100 for synflow, else 1")
    ] = None,
    allow_empty: Annotated[
        bool | None, typer.Option(help="accept masks that empty a layer [at-init: no, imp: yes]")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="at-init: a ticket whose rewind state is scored and kept")] = None,
) -> None:
    """Find a ticket and save it: at initialisation, or by iterative pruning, which goes on where it was stopped."""
    at_init_only = {"score": score, "remove": remove, "sparsity": sparsity, "steps": steps}
    imp_only = {
        "importance": importance,
        "rounds": rounds,
        "rate": rate,
        "rewind_step": rewind_step,
        "mode": mode,
        "control": control,
        "spare": spare,
    }
    imp_only = {name: value for name, value in imp_only.items() if value not in (None, [])}
    training = {"epochs": epochs, "lr": lr, "folder": folder}
    with _one_sentence():
        if method not in ("at-init", "imp"):
            raise ValueError(f"unknown method {method!r}; known: at-init, imp")
        foreign = at_init_only | {"state": state} if method == "imp" else imp_only | training
        for name, value in foreign.items():
            if value is not None:
                raise ValueError(f"--{name.replace('_', '-')} does not go with --method {method}")
        common = {"granularity": granularity, "aggregate": aggregate, "scope": scope}
        network = {"data": data, "model": model, "size": size, "root": root}
        schedule = {k: v for k, v in {"epochs": epochs, "lr": lr}.items() if v is not None}
        training = {"batch_size": batch_size, "device": device} | schedule
        if method == "imp":
            common["granularity"] = granularity or "weight"
            if allow_empty is not None:
                common["allow_empty"] = allow_empty
            _find_imp(out, folder or out.with_name(f"{out.stem}-levels"), network, training, common | imp_only, seed)
        else:
            common["granularity"] = granularity or "layer"
            options = at_init_only | {"score": score or "grasp", "allow_empty": bool(allow_empty), "coupled": coupled}
            _find_at_init(out, network, training, common | options, state, seed)


def _find_at_init(out: Path, network: dict, training: dict, options: dict, state: Path | None, seed: int) -> None:
    from .compare import Settings, build, first_batch, load_data, recipe
    from .search import at_init
    from .ticket import Ticket

    rewound = Ticket.load(state).rewind if state else None
    if state and rewound is None:
        raise ValueError(f"{state} has no rewind state to score; find it with rewind=True")
    settings = Settings(**network, train=recipe(**training))
    images = load_data(settings)
    ticket = at_init(
        build(settings, images, seed), first_batch(settings, images, seed), seed=seed, state=rewound, **options
    )
    ticket.provenance |= {"data": settings.data, "model": settings.model}
    ticket.save(out)
    gone = f", removed {', '.join(ticket.removed_blocks)}" if ticket.layers else ""
    console.print(f"{out}: sparsity {ticket.sparsity:.2%}{gone}", soft_wrap=True)


def _find_imp(out: Path, folder: Path, network: dict, training: dict, options: dict, seed: int) -> None:
    from .compare import Settings, recipe
    from .find import find_imp
    from .train import Interrupted

    settings = Settings(**network, train=recipe(**training))
    with _progress_bar() as bar:
        task = bar.add_task("level 0", total=None)
        try:
            search, rows = find_imp(
                settings,
                folder,
                seed=seed,
                on_progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
                **options,
            )
        except Interrupted as stop:
            bar.stop()
            errors.print(f"{stop}; go on with the same command", soft_wrap=True)
            raise typer.Exit(130) from None
    search.ticket.provenance |= {"data": settings.data, "model": settings.model}
    search.ticket.save(out)
    table = Table("level", "sparsity", "accuracy", "seconds after rewinding", "speed-up over level 0")
    for row in rows:
        ratio = rows[0]["train_seconds"] / row["train_seconds"]
        cells = (f"{row['sparsity']:.2%}", f"{row['accuracy']:.2%}", f"{row['train_seconds']:.2f}", f"{ratio:.2f}")
        table.add_row(str(row["level"]), *cells)
    console.print(table)
    console.print(f"{out}: sparsity {search.ticket.sparsity:.2%}; levels in {folder}/", soft_wrap=True)


def _progress_bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


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
    from .compare import Settings, first_batch, load_data, recipe
    from .search import elastic
    from .ticket import Ticket

    with _one_sentence():
        found = Ticket.load(ticket)
        settings = Settings(data=data, size=size, root=root, train=recipe(batch_size=batch_size))
        batches = None
        if control == "snip-added":
            batches = first_batch(settings, load_data(settings), seed)
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
