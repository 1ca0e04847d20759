"""(a) Iterative pruning with the five importances of Vandersmissen et al. 2023, and what their tickets share."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pysparse_ticket as pst
from evidence.lab import Lab
from evidence.rows import Row, grouped, middle, of, spread
from pysparse_ticket.find import Place
from pysparse_ticket.report import markdown_table

TABLE = "a"
IMPORTANCES = ("magnitude", "l1", "l2", "softmax", "minmax")
NETWORK = "resnet20"


def shown(lab: Lab) -> tuple[int, int]:
    """The two levels whose tickets are kept: half way, and the last."""
    return lab.setup.rounds // 2, lab.setup.rounds


def path_of(lab: Lab, network: str, importance: str, seed: int, level: int) -> Path:
    return lab.folder / f"{network}-{importance}-seed{seed}-level{level}.safetensors"


def ticket_of(lab: Lab, table: str, network: str, importance: str, seed: int, level: int) -> pst.Ticket:
    """A kept level's ticket; where only its row is there, as in a fresh checkout, it is searched again."""
    path = path_of(lab, network, importance, seed, level)
    if not path.exists():
        search(lab, table, network, importance, seed)
    return pst.Ticket.load(path)


def prune(lab: Lab, table: str, network: str, importance: str, seed: int) -> None:
    levels = range(lab.setup.rounds + 1)
    if not all(lab.store.has(lab.row(table, network, f"imp {importance}", level, seed)) for level in levels):
        search(lab, table, network, importance, seed)


def search(lab: Lab, table: str, network: str, importance: str, seed: int) -> None:
    """All rounds; a row a level, whose search took all levels before it."""
    model, place, epoch = lab.build(network, seed), Place(), lab.setup.rewind_epoch
    optimizer = lab.optimizer(model)
    levels = pst.imp(
        model,
        optimizer,
        importance=importance,
        rounds=lab.setup.rounds,
        rewind_step=epoch * lab.epoch_steps,
        carry=[place],
        seed=seed,
        plan="tiled",
    )
    rows, began = [], time.perf_counter()
    for level in levels:
        found = time.perf_counter() - began
        if not level.index and epoch:
            place.kept = lab.train_until(model, optimizer, seed, epoch)
            level.step_done(epoch * lab.epoch_steps)
        values = lab.train(model, seed, place.kept, optimizer)
        gone = sum(not mask.any() for mask in level.ticket.masks.values())
        rows.append(
            lab.row(
                table, network, f"imp {importance}", level.index, seed,
                sparsity=level.sparsity, find_seconds=found, emptied=float(gone), **values,
            )
        )  # fmt: skip
        if level.index in shown(lab):
            level.ticket.save(path_of(lab, network, importance, seed, level.index))
    lab.add(*rows)


def run(lab: Lab, seeds: Sequence[int]) -> None:
    for seed in seeds:
        order = IMPORTANCES[seed % 5 :] + IMPORTANCES[: seed % 5]  # none always runs first
        for importance in order:
            prune(lab, TABLE, NETWORK, importance, seed)
        compare(lab, seed)


def compare(lab: Lab, seed: int) -> None:
    """Overlaps of every pair, and of the three that the paper's section on overlaps compares."""
    sets = (*itertools.combinations(IMPORTANCES, 2), ("magnitude", "l1", "l2"))
    for level in shown(lab):
        wanted = {names: lab.row(TABLE, NETWORK, " ".join(names), level, seed) for names in sets}
        if all(map(lab.store.has, wanted.values())):
            continue
        tickets = {name: ticket_of(lab, TABLE, NETWORK, name, seed, level) for name in IMPORTANCES}
        lab.add(*(replace(row, **pst.overlap(*(tickets[n] for n in names))) for names, row in wanted.items()))


def render(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if row.table == TABLE]
    trained = [row for row in rows if row.accuracy is not None]
    last = max(int(row.level) for row in trained)
    half = last // 2
    parts = []
    for (data,), group in grouped(trained, lambda row: (row.data,)).items():
        header = ["importance"]
        for level in (0, half, last):
            at = [row for row in group if row.level == str(level)]
            header += [f"acc % at {100 * at[0].sparsity:.2f}%" if level else "acc % dense", "train s"]
        header += [f"search s to {last} rounds", "emptied tensors"]
        body = []
        for (arm,), own in grouped(group, lambda row: (row.arm,)).items():
            cells = [arm.removeprefix("imp ")]
            for level in (0, half, last):
                at = [row for row in own if row.level == str(level)]
                cells += [spread(of(at, "accuracy"), scale=100), middle(of(at, "train_seconds"))]
            at = [row for row in own if row.level == str(last)]
            body.append([*cells, middle(of(at, "find_seconds")), spread(of(at, "emptied"), 1)])
        order = {f"{name}": i for i, name in enumerate(IMPORTANCES)}
        body.sort(key=lambda cells: order[cells[0]])
        parts.append(f"{data}, ResNet-20:\n\n{markdown_table(header, body)}")
    compared = [row for row in rows if row.overlap is not None]
    header, body = ["tickets of", "rounds"], []
    sets = list(dict.fromkeys(row.data for row in compared))
    for data in sets:
        header += [f"{data}: overlap %", "IoU %", "chance %"]
    for (arm, level), own in grouped(compared, lambda row: (row.arm, row.level)).items():
        cells = [arm.replace(" ", ", "), level]
        for data in sets:
            cells += [spread(of((r for r in own if r.data == data), n), 1, 100) for n in ("overlap", "iou", "chance")]
        body.append(cells)
    body.sort(key=lambda cells: int(cells[1]))
    return "\n".join([*parts, markdown_table(header, body)])
