"""``pysparse-ticket find``: at initialisation, by iterative pruning, or while training sparse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..compare import Settings, build, first_batch, load_data, recipe
from ..files import write_whole
from ..find import find_imp
from ..find_dynamic import find_dynamic
from ..search import at_init, filter_twin
from ..ticket import Ticket
from .terminal import console, one_sentence, progress

_DYNAMIC = {"sparsity", "distribution", "every", "until", "drop", "decay", "regrow", "spare", "epochs", "lr"}
TAKES = {
    "at-init": {
        *("score", "granularity", "remove", "sparsity", "aggregate", "scope", "steps", "allow_empty", "strict", "keep"),
        *("coupled", "bn_mode", "state", "twin_of"),
    },
    "imp": {
        *("importance", "granularity", "rounds", "rate", "sparsity", "aggregate", "scope", "allow_empty", "strict"),
        *("keep", "coupled", "rewind_step", "mode", "control", "spare", "epochs", "lr", "folder"),
    },
    "set": _DYNAMIC,
    "rigl": _DYNAMIC,
}
_KNOWN = set().union(*TAKES.values())


def find(
    out: Annotated[Path, typer.Argument(help="the ticket's file")],
    method: Annotated[
        str, typer.Option(help="at-init; imp: train, prune, rewind, again and again; set or rigl: train sparse")
    ] = "at-init",
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
        str | None, typer.Option(help="layer, filter, weight, n:m, n:mt or block:HxW [at-init: layer, imp: weight]")
    ] = None,
    remove: Annotated[int | None, typer.Option(help="at-init: blocks or filters")] = None,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(help="of weights or tiles [set, rigl: 0.9]; imp: after each round, repeated, in place of a rate"),
    ] = None,
    twin_of: Annotated[
        Path | None, typer.Option(help="at-init: a layer ticket; remove as many filters as its blocks have")
    ] = None,
    importance: Annotated[str | None, typer.Option(help="imp: magnitude, l1, l2, softmax, minmax or lamp")] = None,
    rounds: Annotated[int | None, typer.Option(help="imp: prunings, 10")] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(help="imp: share of what is left that a round removes, 0.2; repeated, one a round"),
    ] = None,
    rewind_step: Annotated[int | None, typer.Option(help="imp: step whose state each round starts from, 0")] = None,
    mode: Annotated[str | None, typer.Option(help="imp: rewind the weights, or only the learning-rate")] = None,
    control: Annotated[str | None, typer.Option(help="imp: random, shuffle or reinit")] = None,
    spare: Annotated[
        list[str] | None, typer.Option(help="imp, set, rigl: a layer that is not pruned; repeatable")
    ] = None,
    distribution: Annotated[str | None, typer.Option(help="set, rigl: erk (default) or uniform")] = None,
    every: Annotated[
        int | None, typer.Option(help="set, rigl: steps between updates [a 40th of all, at most 100]")
    ] = None,
    until: Annotated[int | None, typer.Option(help="set, rigl: step that ends the updates [3/4 of all]")] = None,
    drop: Annotated[float | None, typer.Option(help="set, rigl: share of a layer that an update moves, 0.3")] = None,
    decay: Annotated[str | None, typer.Option(help="set, rigl: of the drop, cosine (default) or constant")] = None,
    regrow: Annotated[
        str | None, typer.Option(help="set, rigl: weights dropped and grown at once: keep (default), zero or never")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="imp: of each round, 4; set, rigl: of the training, 4")] = None,
    lr: Annotated[float | None, typer.Option(help="imp, set, rigl: 0.1")] = None,
    device: str = "cpu",
    folder: Annotated[Path | None, typer.Option(help="imp: where the levels are kept [OUT-levels]")] = None,
    aggregate: Annotated[str | None, typer.Option(help="a piece's scores: sum (default) or mean")] = None,
    coupled: Annotated[
        bool | None, typer.Option(help="filters: those that go together too (default), or only those that go alone")
    ] = None,
    strict: Annotated[
        bool | None, typer.Option("--strict", help="layers: also spare the neighbours of downsampling blocks")
    ] = None,
    keep: Annotated[
        int | None, typer.Option(help="blocks that stay in a stage, 2; filters that stay in a convolution, 1")
    ] = None,
    batch_size: int = 128,
    seed: int = 0,
    scope: Annotated[
        str | None, typer.Option(help="where weights and tiles compete: global (default), layer or, at-init, erk")
    ] = None,
    bn_mode: Annotated[str | None, typer.Option(help="at-init: batch norm on train (default) or eval")] = None,
    steps: Annotated[
        int | None, typer.Option(help="at-init: score and cut this often; 100 for synflow, else 1")
    ] = None,
    allow_empty: Annotated[
        bool | None, typer.Option(help="accept masks that empty a layer [at-init: no, imp: yes]")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="at-init: a ticket whose rewind state is scored and kept")] = None,
) -> None:
    """Find a ticket and save it; a search that trains goes on where it was stopped."""
    given = {name: value for name, value in locals().items() if value not in (None, []) and name in _KNOWN}
    with one_sentence():
        if method not in TAKES:
            raise ValueError(f"unknown method {method!r}; known: {', '.join(TAKES)}")
        for name in given:
            if name not in TAKES[method]:
                raise ValueError(f"--{name.replace('_', '-')} does not go with --method {method}")
        schedule = {name: given.pop(name) for name in ("epochs", "lr") if name in given}
        training = recipe(batch_size=batch_size, device=device, **schedule)
        settings = Settings(data=data, model=model, size=size, root=root, train=training)
        if method == "at-init":
            _at_init(out, settings, seed, given)
        elif method == "imp":
            _imp(out, settings, seed, given)
        else:
            _dynamic(out, settings, seed, {"method": method} | given)


def _at_init(out: Path, settings: Settings, seed: int, given: dict[str, Any]) -> None:
    twin_of, state = given.pop("twin_of", None), given.pop("state", None)
    options = _with_one_sparsity(given)
    if state is not None:
        options["state"] = Ticket.load(state).rewind
        if options["state"] is None:
            raise ValueError(f"{state} has no rewind state to score; find it with rewind=True")
    images = load_data(settings)
    network, batch = build(settings, images, seed), first_batch(settings, images, seed)
    if twin_of is None:
        ticket = at_init(network, batch, seed=seed, **options)
    else:
        for name in ("remove", "sparsity", "granularity"):
            if name in given and given[name] != "filter":
                raise ValueError(f"--twin-of makes a filter ticket of a given count; leave --{name} out")
        options.pop("granularity", None)
        ticket = filter_twin(network, Ticket.load(twin_of), batch, seed=seed, **options)
    _save(ticket, out, settings)
    gone = f", removed {', '.join(ticket.removed_blocks)}" if ticket.layers else ""
    if ticket.filters:
        gone = f", removed {sum(int((~kept).sum()) for kept in ticket.filters.values())} filters"
    console.print(f"{out}: sparsity {ticket.sparsity:.2%}{gone}", soft_wrap=True)


def _imp(out: Path, settings: Settings, seed: int, given: dict[str, Any]) -> None:
    folder = given.pop("folder", out.with_name(f"{out.stem}-levels"))
    if "sparsity" in given:
        given["sparsities"] = given.pop("sparsity")
    if len(given.get("rate", ())) == 1:
        given["rate"] = given["rate"][0]
    with progress("level 0") as show:
        search, rows = find_imp(settings, folder, seed=seed, on_progress=show, **given)
    _save(search.ticket, out, settings)
    table = Table("level", "sparsity", "accuracy", "seconds after rewinding", "speed-up over level 0")
    for row in rows:
        ratio = rows[0]["train_seconds"] / row["train_seconds"]
        cells = (f"{row['sparsity']:.2%}", f"{row['accuracy']:.2%}", f"{row['train_seconds']:.2f}", f"{ratio:.2f}")
        table.add_row(str(row["level"]), *cells)
    console.print(table)
    console.print(f"{out}: sparsity {search.ticket.sparsity:.2%}; levels in {folder}/", soft_wrap=True)


def _dynamic(out: Path, settings: Settings, seed: int, given: dict[str, Any]) -> None:
    options = _with_one_sparsity(given)
    if "spare" in options:
        options["dense"] = options.pop("spare")
    checkpoint, report = out.with_name(f"{out.stem}.checkpoint"), out.with_name(f"{out.name}.json")
    with progress("training") as show:
        ticket, history, updates = find_dynamic(
            settings, checkpoint, seed=seed, on_progress=lambda at: show("training", at.step, at.steps), **options
        )
    _save(ticket, out, settings)
    facts = {
        "method": options["method"],
        "sparsity": ticket.sparsity,
        "exploration": ticket.provenance["exploration"],
        "accuracy": history.test_accuracy,
        "seconds": history.seconds,
        "updates": updates,
    }
    write_whole(report, json.dumps(facts, indent=2).encode())
    console.print(
        f"{out}: trained to {history.test_accuracy[-1]:.2%}, sparsity {ticket.sparsity:.2%}, "
        f"{facts['exploration']:.2%} of the weights explored in {len(updates)} updates; more in {report}",
        soft_wrap=True,
    )


def _with_one_sparsity(given: dict[str, Any]) -> dict[str, Any]:
    if len(given.get("sparsity", ())) > 1:
        raise ValueError("only --method imp takes more than one --sparsity, one for each round")
    return given | {"sparsity": given["sparsity"][0]} if "sparsity" in given else given


def _save(ticket: Ticket, out: Path, settings: Settings) -> None:
    ticket.provenance |= {"data": settings.data, "model": settings.model}
    ticket.save(out)
