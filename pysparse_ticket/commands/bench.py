"""``pysparse-ticket bench``: how much faster a ticket of a given size trains here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..bench import BenchSettings
from ..bench import bench as run
from ..compare import recipe
from ..files import write_whole
from ..report import STEP_COLUMNS, rich_table
from ..same_function import WrongResult
from .terminal import console, errors, one_sentence, progress


def bench(
    model: Annotated[str, typer.Option(help="resnet14 .. resnet110, vgg16, tiny-resnet18, mlp-N, ...")] = "resnet20",
    granularity: Annotated[str, typer.Option(help="weight, block:HxW, n:m, filter or layer")] = "weight",
    sparsity: Annotated[
        list[float] | None, typer.Option(help="of weights or tiles, in [0, 1), repeatable [0.8 and 0.9]")
    ] = None,
    remove: Annotated[list[int] | None, typer.Option(help="filters or layers to remove, repeatable")] = None,
    score: Annotated[str, typer.Option(help="what the ticket is drawn by: random, magnitude, snip, ...")] = "random",
    scope: Annotated[
        str | None, typer.Option(help="where pieces compete: global, layer or erk [tiles: erk, else global]")
    ] = None,
    batch_size: int = 128,
    size: Annotated[int, typer.Option(help="pixels of an image's side")] = 32,
    channels: Annotated[int, typer.Option(help="of an image")] = 3,
    classes: int = 10,
    device: str = "cpu",
    threads: Annotated[int | None, typer.Option(help="of the CPU [torch's choice]")] = None,
    race_compile: Annotated[bool, typer.Option("--compile", help="let torch.compile compete too")] = False,
    repeats: Annotated[int, typer.Option(help="timed steps of each arm")] = 11,
    seed: Annotated[int, typer.Option(help="of the weights, the batch and the ticket")] = 0,
    show_plan: Annotated[bool, typer.Option("--plan", help="also how each layer runs, and why")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the figures to this file")] = None,
) -> None:
    """Time whole training steps, dense and with a ticket of that size: what would it gain on this machine?"""
    before = torch.get_num_threads()
    try:
        with one_sentence():
            if threads is not None and threads < 1:
                raise ValueError(f"--threads must be at least 1, not {threads}")
            if json_file is not None and json_file.is_dir():
                raise ValueError(f"--json {json_file} is a folder; name a file")
            torch.set_num_threads(threads or before)
            settings = BenchSettings(
                model=model,
                granularity=granularity,
                sparsity=tuple(sparsity or ()),
                remove=tuple(remove or ()),
                score=score,
                scope=scope,
                size=size,
                channels=channels,
                classes=classes,
                train=recipe(epochs=1, batch_size=batch_size, lr=0.01, device=device),
                race_compile=race_compile,
                repeats=repeats,
                seed=seed,
            )
            with progress("drawing the network") as show:
                report, plans = run(settings, show)
            if json_file is not None:
                write_whole(json_file, json.dumps(report, indent=2).encode())
    except WrongResult as error:
        errors.print(f"[red]wrong result:[/red] {error}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from None
    finally:
        torch.set_num_threads(before)
    title = f"a training step of {model}, {batch_size} images of {size}x{size}; speed-up over {report['fastest_dense']}"
    console.print(rich_table(report["arms"], title, STEP_COLUMNS))
    for name, plan in plans.items() if show_plan else ():
        console.print(f"{name}\n{plan}\n", soft_wrap=True, highlight=False, markup=False)
    console.print(f"{report['machine']}\nenergy: {report['arms'][0]['energy_method']}", soft_wrap=True)
