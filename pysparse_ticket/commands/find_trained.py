"""``pysparse-ticket find-trained``: train, score, rewind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..compare import Settings, recipe
from ..find_trained import find_trained as run
from .terminal import console, one_sentence, progress


def find_trained(
    out: Annotated[Path, typer.Argument(help="the ticket's file")],
    data: str = "digits",
    model: str = "resnet32",
    size: int = 16,
    root: str | None = None,
    score: Annotated[
        str, typer.Option(help="hrank, expectabs, kl, pls-vip, cka, cka-intra, filter-l1, random, or one of weights")
    ] = "hrank",
    granularity: Annotated[
        str, typer.Option(help="layer; filter, weight, n:m, n:mt or block:HxW by scores of weights")
    ] = "layer",
    remove: Annotated[int | None, typer.Option(help="blocks (1) or filters")] = None,
    sparsity: Annotated[float | None, typer.Option(help="of weights or tiles")] = None,
    steps: Annotated[int | None, typer.Option(help="rounds in which blocks or weights go, each scored anew")] = None,
    aggregate: Annotated[str, typer.Option(help="scores of weights: sum or mean over a piece")] = "sum",
    strict: Annotated[bool, typer.Option("--strict", help="also spare the neighbours of downsampling blocks")] = False,
    keep: Annotated[int | None, typer.Option(help="blocks that stay in a stage, 2")] = None,
    rewind_epoch: Annotated[int, typer.Option(help="epoch whose state the ticket starts from")] = 0,
    mode: Annotated[str, typer.Option(help="rewind the weights, or only the learning-rate")] = "weights",
    reinit: Annotated[bool, typer.Option("--reinit", help="start from torch's default draws instead")] = False,
    epochs: int = 4,
    batch_size: int = 64,
    lr: float = 0.1,
    samples: Annotated[int, typer.Option(help="training images to score on")] = 512,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Train a network, find a ticket in it and save it; stopped, the same command goes on."""
    if granularity == "layer" and remove is None:
        remove = 1
    with one_sentence():
        settings = Settings(data=data, model=model, size=size, root=root, train=recipe(epochs, batch_size, lr, device))
        checkpoint = out.with_name(f"{out.stem}.checkpoint")
        with progress("training") as show:
            ticket, history = run(
                settings,
                checkpoint,
                seed=seed,
                rewind_epoch=rewind_epoch,
                mode=mode,
                samples=samples,
                score=score,
                granularity=granularity,
                remove=remove,
                sparsity=sparsity,
                steps=steps,
                aggregate=aggregate,
                strict=strict,
                keep=keep,
                reinit=reinit,
                on_progress=lambda at: show("training", at.step, at.steps),
            )
        ticket.save(out)
        gone = f", removed {', '.join(ticket.removed_blocks) or 'nothing'}" if ticket.layers else ""
        trained = f"trained to {history.test_accuracy[-1]:.2%}"
        console.print(f"{out}: {trained}, sparsity {ticket.sparsity:.2%}{gone}", soft_wrap=True)
