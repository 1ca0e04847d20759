"""A user's own training loop over the rounds of a search: every source of state, few enough steps for tests."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import pysparse_ticket as pst

STEPS = 6


class Stop(Exception):
    """The process is gone."""


class Net(nn.Module):
    """20 x 25 + 6 x 20 + 1 x 5 = 625 prunable weights, 5^4, so that rounds of a fifth are exact: 500, 400, 320, 256."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(25, 20, bias=False)
        self.norm = nn.BatchNorm1d(20)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(20, 6)
        self.extra = nn.Linear(5, 1, bias=False)

    def forward(self, x):
        y = self.last(self.drop(F.relu(self.norm(self.first(x)))))
        return y + self.extra(x[:, :5])


def setting(kind="sgd", seed=3):
    """A model, its optimizer, and what is to be carried beside them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    model = Net()
    if kind == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], 0.5)
    order = torch.Generator().manual_seed(5)
    return model, optimizer, [scheduler, order, np.random.default_rng(7)]


def train(search, model, optimizer, carry, *, seen=None, stop=None, steps=STEPS):
    """Go through the search; ``stop=(level, step)`` is a kill. ``seen`` collects what each level starts from."""
    scheduler, order, noise = carry
    for level in search:
        if seen is not None:
            seen.append(snapshot(level, model, optimizer, carry))
        model.train()
        for step in range(level.start, steps):
            if stop == (level.index, step):
                raise Stop
            x = torch.randn(12, 25, generator=order) * (1 + 0.1 * random.random() * np.random.rand() * noise.random())
            optimizer.zero_grad()
            F.cross_entropy(model(x), x[:, :6].argmax(1)).backward()
            optimizer.step()
            scheduler.step()
            level.step_done(step + 1)
        model.eval()
    return search


def snapshot(level, model, optimizer, carry):
    dense = {name: t.detach().clone() for name, t in model.state_dict().items()}
    moments = {}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            moments[f"{name} {key}"] = value.clone() if torch.is_tensor(value) else value
    formats = [row.format for row in pst.plan(model).layers] if level.index else []
    draws = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    return {
        "level": level,
        "training": model.training,
        "dense": dense,
        "moments": moments,
        "rate": optimizer.param_groups[0]["lr"],
        "position": carry[0].last_epoch,
        "order": carry[1].get_state(),
        "noise": carry[2].bit_generator.state,
        "draws": draws,
        "formats": formats,
        "values": {n: tuple(p.shape) for n, p in model.named_parameters()},
    }


def search_of(model, optimizer, carry, **options):
    return pst.imp(model, optimizer, carry=carry, plan="packed", **({"rounds": 3, "rewind_step": 2} | options))
