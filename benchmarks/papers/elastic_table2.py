"""Chen et al. 2021, Table 2: tickets transferred from ResNet-26 at 73.79%, against RigL trained five times as long.

RigL-5x: the whole schedule stretched by five, an update every 100 steps until three quarters of them, a share of 0.3
that decays by a cosine, an Erdos-Renyi-kernel distribution (Evci et al. 2020; the table names none).
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import torch
from elastic_setup import DIGITS, IMAGENET, quick
from recipe import Recipe, main

import pysparse_ticket as pst
from pysparse_ticket import checkpoint as checkpoints
from pysparse_ticket.files import write_whole
from pysparse_ticket.train import train
from pysparse_ticket.train_config import sgd

LEVEL, SOURCE, TIMES = 6, 26, 5
PAPER = {
    "Res-18": {"E-LTH": 68.17, "RigL-5x": 69.59},
    "Res-26": {"E-LTH": 72.94, "RigL-5x": 72.66},
    "Res-34": {"E-LTH": 73.37, "RigL-5x": 73.88},
}


def measure(runs, part, seed):
    found = runs.search(f"imp-{SOURCE}-{seed}", seed, f"tiny-resnet{SOURCE}")[LEVEL]
    ticket = pst.Ticket.load(found["ticket"])
    for depth in (18, 26, 34):
        network = f"tiny-resnet{depth}"
        row = f"Res-{depth}"
        if depth == SOURCE:
            yield row, "E-LTH", found["accuracy"]
        else:
            find = partial(pst.elastic, ticket, None, runs.network(seed, network))
            yield row, "E-LTH", runs.ticket(f"ett-{depth}-{seed}", seed, find, found["place"], network)["accuracy"]
        yield row, "RigL-5x", rigl(runs, f"rigl-{depth}-{seed}", seed, network, 1 - 0.8**LEVEL)


def rigl(runs, name: str, seed: int, network: str, sparsity: float) -> float:
    """Accuracy in % of one run; its schedule's state lies in the run's own checkpoint, so that it resumes."""
    result, path = runs.folder / f"{name}.json", runs.folder / f"{name}.checkpoint"
    if result.exists():
        return json.loads(result.read_text())["accuracy"]
    config = runs.config(seed)
    config = replace(config, epochs=TIMES * config.epochs, milestones=tuple(TIMES * m for m in config.milestones))
    config = replace(config, warmup_epochs=TIMES * config.warmup_epochs)
    model = runs.network(seed, network)
    optimizer = sgd(model.parameters(), config)
    schedule = pst.dynamic(
        model, optimizer, sparsity=sparsity, every=runs.settings.every,
        until=max(1, 3 * runs.epoch_steps * config.epochs // 4), seed=seed,
    )  # fmt: skip
    extra = _tensors(schedule.state_dict())
    if path.exists():
        kept = checkpoints.load(path)["extra"]
        state = schedule.state_dict()
        masks, ever = ({n: kept[f"{kind} {n}"] for n in state[kind]} for kind in ("masks", "ever"))
        state |= {"masks": masks, "ever": ever, "generator": kept["generator"], "step": int(kept["step"])}
        schedule.load_state_dict(state)

    def on_step(_) -> None:
        if schedule.step():
            for key, tensor in _tensors(schedule.state_dict()).items():
                extra[key].copy_(tensor)
        extra["step"].fill_(schedule.steps)

    history = train(model, runs.data, config, optimizer=optimizer, checkpoint=path, on_step=on_step, extra=extra)
    accuracy = 100 * history.test_accuracy[-1]
    write_whole(result, json.dumps({"accuracy": accuracy, "exploration": schedule.exploration}).encode())
    path.unlink()
    return accuracy


def _tensors(state: dict) -> dict[str, torch.Tensor]:
    found = {f"{kind} {name}": mask for kind in ("masks", "ever") for name, mask in state[kind].items()}
    return found | {"generator": state["generator"], "step": torch.tensor(state["step"])}


full = replace(IMAGENET, rounds=tuple(range(1, LEVEL + 1)))
RECIPE = Recipe(
    "elastic_table2",
    "Chen et al. 2021, Table 2: accuracy in % at 73.79% (the paper's on ImageNet, ours on TinyImageNet)",
    PAPER,
    {"": full},
    {"": quick(full, (LEVEL,), **DIGITS)},
    measure,
)

if __name__ == "__main__":
    main(RECIPE)
