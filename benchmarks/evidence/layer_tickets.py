"""(b) Layer tickets at initialisation and after training, each beside a filter ticket of as many filters (Jordao et
al. 2023, tables 1 to 3)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

import pysparse_ticket as pst
from evidence.lab import Lab
from evidence.rows import Row, grouped, middle, of, spread
from pysparse_ticket.report import markdown_table

TABLE = "b"
NETWORK = "resnet32"
REMOVE = 5
AT_INIT = ("snip", "grasp", "synflow", "magnitude", "random")
TRAINED = ("hrank", "expectabs", "kl", "pls-vip", "cka", "snip", "random")
OF_WEIGHTS = ("snip",)  # of the trained ones; the others score blocks alone, and magnitude finds their filter twins
KINDS = (("layers", "0"), ("layers", "half"), ("filters", "0"))  # what is pruned, and the epoch rewound to


def run(lab: Lab, seeds: Sequence[int]) -> None:
    for seed in seeds:
        lab.run_dense(TABLE, NETWORK, seed, 0)
        for score in AT_INIT:
            at_init(lab, score, seed)
        after_training(lab, seed)


def at_init(lab: Lab, score: str, seed: int) -> None:
    pairs, found = lab.pairs(seed), {}

    def layers(model: nn.Module) -> pst.Ticket:
        found["layers"] = pst.at_init(model, pairs, score=score, granularity="layer", remove=REMOVE, seed=seed)
        return found["layers"]

    def filters(model: nn.Module) -> pst.Ticket:
        return pst.filter_twin(model, found.get("layers") or layers(model), pairs, seed=seed)

    lab.run(lab.row(TABLE, NETWORK, f"layers {score}", "init", seed), layers, 0)
    lab.run(lab.row(TABLE, NETWORK, f"filters {score}", "init", seed), filters, 0)


def after_training(lab: Lab, seed: int) -> None:
    """All criteria score one trained network; the ticket starts from its first weights, or from half way."""
    half = lab.setup.epochs // 2
    wanted = [
        lab.row(TABLE, NETWORK, f"{kind} {score}", level, seed) for score in TRAINED for kind, level in kinds(score)
    ]
    if all(map(lab.store.has, wanted)):
        return
    starts = {epoch: lab.start(NETWORK, seed, epoch) for epoch in (0, half)}
    trained = lab.build(NETWORK, seed)
    trained.load_state_dict(starts[half].state)
    began = time.perf_counter()
    lab.train(trained, seed, starts[half].position)
    cost = (time.perf_counter() - began) * lab.setup.epochs / (lab.setup.epochs - half)
    early = {epoch: start.state for epoch, start in starts.items()}
    for score in TRAINED:
        train_scored(lab, score, seed, trained, early, half, cost)


def train_scored(lab: Lab, score: str, seed: int, trained: nn.Module, early: dict, half: int, cost: float) -> None:
    pairs, found = lab.pairs(seed), {}

    def layers() -> pst.Ticket:
        if not found:
            found["layers"] = pst.after_training(trained, pairs, score=score, remove=REMOVE, seed=seed)
        return found["layers"]

    def filters() -> pst.Ticket:
        by = score if score in OF_WEIGHTS else "magnitude"
        return pst.filter_twin(trained, layers(), pairs, score=by, bn_mode="eval", seed=seed)

    for kind, level in kinds(score):
        epoch = half if level == "half" else 0
        find = layers if kind == "layers" else filters
        row = lab.row(TABLE, NETWORK, f"{kind} {score}", level, seed)
        lab.run(row, lambda _, find=find, epoch=epoch: replace(find(), rewind=early[epoch]), epoch, extra=cost)


def kinds(score: str) -> tuple[tuple[str, str], ...]:
    """Random blocks rewound to the start are those at initialisation."""
    return KINDS[1:2] if score == "random" else KINDS


def render(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if row.table == TABLE]
    header = ["blocks scored by", "on", "layers: gone %", "acc %", "over dense", "train s", "find s"]
    header += ["from half way: acc %", "over dense", "train s", "filters: gone %", "acc %", "train s", "find s"]
    parts = []
    for (data,), group in grouped(rows, lambda row: (row.data,)).items():
        own = grouped(group, lambda row: (row.arm, row.level))
        dense = own.get(("dense", "0"), [])
        base = {row.seed: row.accuracy for row in dense}
        body = [["dense", "", "0", spread(of(dense, "accuracy"), scale=100), "", middle(of(dense, "train_seconds"))]]
        body[0] += [""] * (len(header) - len(body[0]))
        for when, scores in (("init", AT_INIT), ("trained", TRAINED)):
            for score in (name for name in scores if (when, name) != ("trained", "random")):
                level = "init" if when == "init" else "0"
                layers, filters = (own.get((f"{kind} {score}", level), []) for kind in ("layers", "filters"))
                half = own.get((f"layers {score}", "half"), [])
                late = [accuracy(half), over(half, base), middle(of(half, "train_seconds"))]
                late = late if when == "trained" or score == "random" else [""] * 3
                cells = [score, when, gone(layers), accuracy(layers), over(layers, base), *seconds(layers), *late]
                body.append([*cells, gone(filters), accuracy(filters), *seconds(filters)])
        parts.append(f"{data}, ResNet-32, {REMOVE} of 15 blocks removed:\n\n{markdown_table(header, body)}")
    return "\n".join(parts)


def accuracy(rows: Sequence[Row]) -> str:
    return spread(of(rows, "accuracy"), scale=100)


def gone(rows: Sequence[Row]) -> str:
    return spread(of(rows, "sparsity"), 0, 100)


def over(rows: Sequence[Row], dense: Mapping[int, float]) -> str:
    """Percentage points above the dense network of the same seed."""
    return spread((row.accuracy - dense[row.seed] for row in rows if row.seed in dense), 1, 100)


def seconds(rows: Sequence[Row]) -> list[str]:
    return [middle(of(rows, "train_seconds")), middle(of(rows, "find_seconds"))]
