"""``pysparse-ticket find``: at initialisation, or by iterative pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..compare import Settings, build, first_batch, load_data, recipe
from ..find import find_imp
from ..search import at_init
from ..ticket import Ticket
from .terminal import console, one_sentence, progress


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
    with one_sentence():
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
    settings = Settings(**network, train=recipe(**training))
    with progress("level 0") as show:
        search, rows = find_imp(settings, folder, seed=seed, on_progress=show, **options)
    search.ticket.provenance |= {"data": settings.data, "model": settings.model}
    search.ticket.save(out)
    table = Table("level", "sparsity", "accuracy", "seconds after rewinding", "speed-up over level 0")
    for row in rows:
        ratio = rows[0]["train_seconds"] / row["train_seconds"]
        cells = (f"{row['sparsity']:.2%}", f"{row['accuracy']:.2%}", f"{row['train_seconds']:.2f}", f"{ratio:.2f}")
        table.add_row(str(row["level"]), *cells)
    console.print(table)
    console.print(f"{out}: sparsity {search.ticket.sparsity:.2%}; levels in {folder}/", soft_wrap=True)
