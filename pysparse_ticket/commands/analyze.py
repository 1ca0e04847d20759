"""``pysparse-ticket analyze``: what tickets are like, and what they lead to."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from torch import Tensor, nn

from .. import analysis, models
from ..compare import Settings, build, load_data, recipe
from ..data import ImageData
from ..evaluate import evaluate
from ..files import write_whole
from ..nn import sparsify
from ..structure import find_blocks
from ..ticket import Ticket, overlap
from .stored import network_like, read_states
from .terminal import console, one_sentence

analyze = typer.Typer(no_args_is_help=True, help="Compare tickets, the history of weights, valleys and features.")

Json = Annotated[Path | None, typer.Option("--json", help="also write the figures to this file")]
Model = Annotated[str | None, typer.Option(help="the network's name; the ticket records it where find made it")]
States = Annotated[
    list[Path],
    typer.Argument(help="tickets (their rewind states), checkpoints, levels of find --method imp or its folder"),
]


@analyze.command()
def tickets(
    files: Annotated[list[Path], typer.Argument(help="one ticket or more")], model: Model = None, json_file: Json = None
) -> None:
    """Each layer's sparsity, layers that carry nothing, and how much several tickets share, beside chance."""
    with one_sentence():
        found = [Ticket.load(file) for file in files]
        shared = overlap(*found) if len(found) > 1 else None  # first: it refuses tickets of different networks
        report: dict[str, Any] = {"tickets": [], "overlap": shared}
        for file, ticket in zip(files, found, strict=True):
            name = model or ticket.provenance.get("model")
            followed = name is not None
            network, sample = network_like(name, ticket, 0) if followed else (None, None)
            dead = analysis.collapsed_layers(ticket, network, sample)
            rows = [
                {"layer": row.name, "kept": row.kept, "total": row.total, "collapsed": dead.get(row.name)}
                for row in analysis.layer_profile(ticket)
            ]
            facts = {"file": str(file), "sparsity": ticket.sparsity, "paths_followed": followed, "layers": rows}
            report["tickets"].append(facts)
            table = Table("layer", "weights", "kept", "sparsity", "collapsed", title=f"{file}: {ticket.sparsity:.2%}")
            for row in rows:
                share = f"{1 - row['kept'] / row['total']:.2%}"
                table.add_row(row["layer"], str(row["total"]), str(row["kept"]), share, row["collapsed"] or "")
            console.print(table)
            if not followed:
                console.print("only empty layers were looked for: pass --model to follow the paths", soft_wrap=True)
        if shared:
            table = Table("overlap", "IoU", "chance", title="of the first ticket's weights, those that all keep")
            table.add_row(*(f"{shared[name]:.2%}" for name in ("overlap", "iou", "chance")))
            console.print(table)
        _write(report, json_file)


@analyze.command()
def weights(files: States, json_file: Json = None) -> None:
    """How often weights changed their sign from state to state, how they spread, and how far they came."""
    with one_sentence():
        names, states = zip(*read_states(files), strict=True)
        flips = analysis.sign_flips(states)
        spread, travel = analysis.weight_spread(states), analysis.weight_travel(states)
        rows = [
            {
                "layer": name,
                "flipped": float((flips[name] > 0).double().mean()),
                "spread": float(spread[name].mean()),
                "travel": float(travel[name].mean()),
            }
            for name in flips
            if flips[name].dim() > 1
        ]
        table = Table("layer", "ever flipped", "mean spread", "mean travel", title=f"over {len(states)} states")
        for row in rows:
            table.add_row(row["layer"], f"{row['flipped']:.2%}", f"{row['spread']:.4f}", f"{row['travel']:.4f}")
        console.print(table)
        _write({"states": list(names), "layers": rows}, json_file)


@analyze.command()
def connectivity(
    first: Annotated[Path, typer.Argument(help="a ticket, checkpoint or level: one end of the line")],
    second: Annotated[Path, typer.Argument(help="the other end")],
    model: Annotated[str, typer.Option(help="the network's name")],
    data: str = "digits",
    size: int = 16,
    root: str | None = None,
    points: int = 21,
    samples: Annotated[int, typer.Option(help="training images that batch norm is measured anew on")] = 512,
    json_file: Json = None,
) -> None:
    """Accuracy along the straight line between two networks, with averaged and with re-measured batch norm."""
    with one_sentence():
        states = [state for _, state in read_states([first, second])]
        if len(states) != 2:
            raise ValueError("a line has two ends; give two files")
        settings, images, network = _network(model, data, size, root)
        lines = {
            name: analysis.linear_connectivity(
                network, *states, lambda at: evaluate(at, images), points=points, recalibrate=batches
            )
            for name, batches in (("averaged", None), ("recalibrated", _inputs(images, settings, samples)))
        }
        table = Table("share of the second", *lines)
        for i, alpha in enumerate(lines["averaged"].alphas):
            table.add_row(f"{alpha:.2f}", *(f"{line.values[i]:.2%}" for line in lines.values()))
        table.add_section()
        table.add_row("largest drop", *(f"{line.max_drop:.2%}" for line in lines.values()))
        console.print(table)
        report = {n: {"accuracy": list(line.values), "max_drop": line.max_drop} for n, line in lines.items()}
        _write({"alphas": list(lines["averaged"].alphas), **report}, json_file)


@analyze.command()
def features(
    file: Annotated[Path, typer.Argument(help="the ticket")],
    dense: Annotated[Path, typer.Option(help="the dense network: a ticket's rewind state, a checkpoint, a level")],
    sparse: Annotated[
        Path | None, typer.Option(help="the ticket's network, trained; without it the dense one's weights, masked")
    ] = None,
    model: Model = None,
    data: str = "digits",
    size: int = 16,
    root: str | None = None,
    samples: Annotated[int, typer.Option(help="training images")] = 256,
    json_file: Json = None,
) -> None:
    """Linear CKA, block by block, between the dense network and the ticket's."""
    with one_sentence():
        ticket = Ticket.load(file)
        name = model or ticket.provenance.get("model")
        if name is None:
            raise ValueError(f"{file} does not say of which network it is; pass --model, such as {models.names()[0]}")
        settings, images, network = _network(name, data, size, root)
        ticket.check(network)
        batches = _inputs(images, settings, samples)
        twin = copy.deepcopy(network)
        ((_, state),) = read_states([dense])
        _load(network, state, dense, ())
        if sparse is None:
            found = analysis.ticket_cka(network, ticket, batches)
        else:
            ((_, state),) = read_states([sparse])
            gone = ticket.removed_blocks
            _load(sparsify(twin, ticket, plan="dense"), state, sparse, gone)
            layers = [b.name for b in find_blocks(network, batches[0]).all if b.name not in gone]
            if not layers:
                raise ValueError(f"{name} has no blocks to compare")
            found = analysis.cka_between(network, twin, batches, layers)
        table = Table("block", "linear CKA")
        for layer, value in found.items():
            table.add_row(layer, f"{value:.4f}")
        console.print(table)
        _write({"cka": found}, json_file)


def _network(model: str, data: str, size: int, root: str | None) -> tuple[Settings, ImageData, nn.Module]:
    settings = Settings(data=data, model=model, size=size, root=root, train=recipe())
    images = load_data(settings)
    return settings, images, build(settings, images, 0)


def _inputs(images: ImageData, settings: Settings, samples: int) -> list[Tensor]:
    """Seeded training images in batches, not augmented."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    drawn = images.draw(samples, seed=0)
    return [images.plain_batch(index)[0] for index in drawn.split(settings.train.batch_size)]


def _load(network: nn.Module, state: dict[str, Tensor], file: Path, removed: Sequence[str]) -> None:
    """Entries of removed blocks are passed over: a search keeps them, the ticket's network has none."""
    gone = tuple(f"{name}." for name in removed)
    try:
        network.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith(gone)})
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ValueError(f"{file} holds the weights of another network: {first}") from None


def _write(report: dict, path: Path | None) -> None:
    if path is not None:
        write_whole(path, json.dumps(report, indent=2).encode())
        console.print(f"written to {path}", soft_wrap=True)
