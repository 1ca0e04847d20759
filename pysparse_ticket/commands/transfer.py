"""``pysparse-ticket transfer``: a ticket for another depth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..compare import Settings, first_batch, load_data, recipe
from ..search import elastic
from ..ticket import Ticket
from .stored import network_like
from .terminal import console, one_sentence


def transfer(
    ticket: Annotated[Path, typer.Argument(help="the source network's ticket, with its rewind state")],
    target: Annotated[str, typer.Option(help="the network to carry it to: resnet56, vgg19, mlp-4, ...")],
    out: Annotated[Path, typer.Option(help="the new ticket's file")],
    source: Annotated[str | None, typer.Option(help="the ticket's network, to check; the ticket records it")] = None,
    order: Annotated[str, typer.Option(help="append (1 2 1 2) or interpolate (1 1 2 2)")] = "append",
    units: Annotated[str, typer.Option(help="all, or how many units of a stage are repeated")] = "all",
    mapping: Annotated[str | None, typer.Option(help="your own, as '0:0;1:1,5;2:2,6'; stages separated by |")] = None,
    stages: Annotated[
        list[str] | None, typer.Option(help="a container of repeated units, such as stage1; repeatable [found by name]")
    ] = None,
    control: Annotated[str | None, typer.Option(help="random-mask, random-added, reinit or snip-added")] = None,
    data: Annotated[str, typer.Option(help="of snip-added")] = "digits",
    size: int = 16,
    root: str | None = None,
    batch_size: int = 128,
    seed: Annotated[int, typer.Option(help="of the controls and of reinit's weights")] = 0,
) -> None:
    """Stretch or squeeze a weight ticket into one for a deeper or shallower network of its family."""
    with one_sentence():
        found = Ticket.load(ticket)
        settings = Settings(data=data, size=size, root=root, train=recipe(batch_size=batch_size))
        batches = None
        if control == "snip-added":
            batches = first_batch(settings, load_data(settings), seed)
        result = elastic(
            found,
            None if source is None else network_like(source, found, seed)[0],
            network_like(target, found, seed)[0],
            order,
            units=int(units) if units.isdigit() else units,
            mapping=mapping,
            stages=stages or None,
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
