"""(d) SET and RigL against the random ERK mask that they start from, never moved (Evci et al. 2020)."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pysparse_ticket as pst
from evidence.lab import Lab
from evidence.rows import Row, grouped, middle, of, spread
from pysparse_ticket.report import markdown_table

TABLE = "d"
NETWORK = "resnet20"
SPARSITIES = (0.8, 0.9, 0.95)
ARMS = {"static ERK": "set", "SET": "set", "RigL": "rigl"}
UPDATES = 12  # between two updates lie a twelfth of all steps; the last is at three quarters of them


def run(lab: Lab, seeds: Sequence[int]) -> None:
    for seed in seeds:
        lab.run_dense(TABLE, NETWORK, seed, 0)
        for sparsity in SPARSITIES:
            for arm in ARMS:
                explore(lab, arm, sparsity, seed)


def explore(lab: Lab, arm: str, sparsity: float, seed: int) -> None:
    row = lab.row(TABLE, NETWORK, arm, f"{sparsity:.0%}", seed)
    if lab.store.has(row):
        return
    model = lab.build(NETWORK, seed)
    optimizer = lab.optimizer(model)
    still = arm == "static ERK"
    began = time.perf_counter()
    schedule = pst.dynamic(
        model,
        optimizer,
        method=ARMS[arm],
        sparsity=sparsity,
        every=lab.steps + 1 if still else max(1, lab.steps // UPDATES),
        until=3 * lab.steps // 4,
        seed=seed,
        plan="tiled",
    )
    found = time.perf_counter() - began
    values = lab.train(schedule.model, seed, None, optimizer, lambda _: schedule.step())
    ticket = schedule.ticket()
    lab.add(
        lab.row(
            TABLE, NETWORK, arm, row.level, seed,
            sparsity=ticket.sparsity, find_seconds=found, exploration=schedule.exploration, **values,
        )
    )  # fmt: skip


def render(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if row.table == TABLE]
    sets = list(dict.fromkeys(row.data for row in rows))
    header = ["arm", "sparsity"]
    for data in sets:
        header += [f"{data}: acc %", "train s", "weights ever active %"]
    body = []
    for (level, arm), own in grouped(rows, lambda row: (row.level, row.arm)).items():
        cells = [arm, "0" if arm == "dense" else level]
        for data in sets:
            at = [row for row in own if row.data == data]
            ever = "100" if arm == "dense" else spread(of(at, "exploration"), 1, 100)
            cells += [spread(of(at, "accuracy"), scale=100), middle(of(at, "train_seconds")), ever]
        body.append(cells)
    return f"ResNet-20:\n\n{markdown_table(header, body)}"
