"""(c) Elastic transfer 14 to 20 and 20 to 32, against pruning the target itself and against scores of its early weights
(Chen et al. 2021, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

import pysparse_ticket as pst
from evidence import importances
from evidence.lab import Lab
from evidence.rows import Row, grouped, middle, of, spread
from pysparse_ticket.report import markdown_table

TABLE = "c"
PAIRS = (("resnet14", "resnet20"), ("resnet20", "resnet32"))
SCORES = ("magnitude", "snip", "grasp", "grasp-magnitude", "synflow", "random")  # Chen et al. take |theta Hg|
TRANSFERS = {  # arm: order, control
    "elastic append": ("append", None),
    "elastic interpolate": ("interpolate", None),
    "elastic append, random mask": ("append", "random-mask"),
    "elastic append, reinit": ("append", "reinit"),
}


def run(lab: Lab, seeds: Sequence[int]) -> None:
    for seed in seeds:
        for network in ("resnet14", "resnet20", "resnet32"):
            importances.prune(lab, table_of(network), network, "magnitude", seed)
        for source, target in PAIRS:
            for level in importances.shown(lab):
                transfer(lab, source, target, level, seed)
                score(lab, target, level, seed)


def table_of(network: str) -> str:
    """The ResNet-20's search is that of table (a)."""
    return importances.TABLE if network == importances.NETWORK else TABLE


def ticket_of(lab: Lab, network: str, seed: int, level: int) -> pst.Ticket:
    return importances.ticket_of(lab, table_of(network), network, "magnitude", seed, level)


def transfer(lab: Lab, source: str, target: str, level: int, seed: int) -> None:
    same = source == "resnet14"  # one unit a stage is repeated, so both orders are one mapping
    arms = {arm: how for arm, how in TRANSFERS.items() if not (how[0] == "interpolate" and same)}
    if all(lab.store.has(lab.row(TABLE, target, arm, level, seed)) for arm in arms):
        return
    ticket, model = ticket_of(lab, source, seed, level), lab.build(source, seed)
    for arm, (order, control) in arms.items():

        def find(into: nn.Module, order=order, control=control) -> pst.Ticket:
            return pst.elastic(ticket, model, into, order, control=control, seed=seed)

        lab.run(lab.row(TABLE, target, arm, level, seed), find, lab.setup.rewind_epoch)


def score(lab: Lab, target: str, level: int, seed: int) -> None:
    """The scores at the sparsity of the target's own ticket, of the weights that it rewinds to."""
    arms = {"random ERK" if name == "random" else name: name for name in SCORES}
    if all(lab.store.has(lab.row(TABLE, target, arm, level, seed)) for arm in arms):
        return
    epoch, pairs = lab.setup.rewind_epoch, lab.pairs(seed)
    sparsity = ticket_of(lab, target, seed, level).sparsity
    state = lab.start(target, seed, epoch).state
    for arm, name in arms.items():

        def find(model: nn.Module, name=name) -> pst.Ticket:
            scope = "erk" if name == "random" else "global"
            return pst.at_init(
                model, pairs, score=name, granularity="weight", sparsity=sparsity, scope=scope, state=state,
                allow_empty=True, seed=seed,
            )  # fmt: skip

        lab.run(lab.row(TABLE, target, arm, level, seed), find, epoch)


def render(rows: Sequence[Row]) -> str:
    parts = []
    mine = [row for row in rows if row.table == TABLE or row.arm == "imp magnitude"]
    for (data,), group in grouped(mine, lambda row: (row.data,)).items():
        if not any(row.table == TABLE for row in group):
            continue
        last = max(int(row.level) for row in group)
        levels = [str(last // 2), str(last)]
        for source, target in PAIRS:
            named = f"IMP on the source, {source.replace('resnet', 'ResNet-')}"
            lines = {named: (source, "imp magnitude"), "IMP on the target": (target, "imp magnitude")}
            lines |= {arm: (target, arm) for arm in TRANSFERS}
            arms = ["random ERK" if name == "random" else name for name in SCORES]
            lines |= {f"{arm}, early weights": (target, arm) for arm in arms}
            body = []
            for name, (network, arm) in lines.items():
                own = [row for row in group if (row.network, row.arm) == (network, arm)]
                if not own:
                    continue
                cells = [name]
                for level in levels:
                    at = [row for row in own if row.level == level]
                    cells += [f"{spread(of(at, 'sparsity'), scale=100)}", spread(of(at, "accuracy"), scale=100)]
                    cells += [middle(of(at, "train_seconds")), middle(of(at, "find_seconds"))]
                body.append(cells)
            dense = [row for row in group if (row.network, row.arm, row.level) == (target, "imp magnitude", "0")]
            first = [spread(of(dense, "accuracy"), scale=100), middle(of(dense, "train_seconds"))]
            body.insert(0, ["dense target", "0", *first, "0", "", "", "", ""])
            header = ["arm", *(["sparsity %", "acc %", "train s", "find s"] * 2)]
            title = f"{data}, {source} to {target}".replace("resnet", "ResNet-")
            parts.append(f"{title}, after {levels[0]} and {levels[1]} rounds:\n\n{markdown_table(header, body)}")
    return "\n".join(parts)
