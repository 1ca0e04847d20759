"""``pysparse-ticket compare``: the main job."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated

import typer

from ..compare import Settings, recipe
from ..compare import compare as run
from ..report import machine_line, rich_table
from .terminal import console, one_sentence, progress


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
    with one_sentence():
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
        go_on = f"go on with: pysparse-ticket compare --name {folder.name} and the same options"
        with progress("racing the dense formats", go_on) as show:
            arms = run(settings, folder, show)
        console.print(rich_table(arms, f"{model} on {data}, {seeds} paired seeds"))
        console.print(f"{machine_line()}\nenergy: {arms[0]['energy_method']}\nwritten to {folder}/", soft_wrap=True)
