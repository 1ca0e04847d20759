"""What fixes a training run, each field checked, and the learning rate that follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class TrainConfig:
    """Plain SGD for image classifiers, with the usual CIFAR defaults (papers 1 to 3: lr 0.1, momentum 0.9).

    epochs          passes over the training set
    batch_size      samples a step; the last batch of an epoch holds what is left, or is left out with ``drop_last``
    weight_decay    on all parameters, batch norm and biases among them, as torch.optim.SGD does
    milestones      epochs at whose start the rate is multiplied by ``gamma``, rising, each below ``epochs``
    warmup_epochs   the rate rises linearly, step by step, from lr / (warm-up steps) to lr; may be a fraction
    autocast        None, "bfloat16" or "float16" (on a GPU with a gradient scaler)
    channels_last   memory format of the model and of each batch
    seed            of the data order, the augmentation and torch's global generator; not of the first weights
    device          anything that torch.device takes

    Raises ValueError naming the field, for a value out of its range or of the wrong type.
    """

    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_epochs: float = 0
    autocast: str | None = None
    channels_last: bool = False
    seed: int = 0
    device: str = "cpu"
    drop_last: bool = False

    def __post_init__(self):
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            _require(_is_whole(value) and value >= least, name, f"a whole number, at least {least}", value)
        for name in ("lr", "gamma"):
            value = getattr(self, name)
            _require(_is_finite(value) and value > 0, name, "a finite number above 0", value)
        _require(_is_finite(self.momentum) and 0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)
        decay, warmup = self.weight_decay, self.warmup_epochs
        _require(_is_finite(decay) and decay >= 0, "weight_decay", "a finite number, at least 0", decay)
        _require(_is_finite(warmup) and 0 <= warmup <= self.epochs, "warmup_epochs", f"in [0, {self.epochs}]", warmup)
        for name in ("nesterov", "channels_last", "drop_last"):
            _require(isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name))
        _require(not self.nesterov or self.momentum > 0, "momentum", "above 0 with nesterov=True", self.momentum)
        _require(
            self.autocast in (None, "bfloat16", "float16"), "autocast", "None, 'bfloat16' or 'float16'", self.autocast
        )
        self._check_milestones()
        try:
            torch.device(self.device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"device must be one that torch knows ('cpu', 'cuda', ...), got {self.device!r}"
            ) from error
        object.__setattr__(self, "device", str(self.device))

    def _check_milestones(self):
        wanted = f"rising epochs between 1 and {self.epochs - 1}"
        _require(isinstance(self.milestones, (list, tuple)), "milestones", wanted, self.milestones)
        marks = tuple(self.milestones)
        whole = all(_is_whole(mark) and 1 <= mark < self.epochs for mark in marks)
        _require(whole and list(marks) == sorted(set(marks)), "milestones", wanted, self.milestones)
        object.__setattr__(self, "milestones", marks)


def steps_per_epoch(config: TrainConfig, samples: int) -> int:
    """Optimizer steps in one pass over so many training samples; ValueError where that is none."""
    batches = samples / config.batch_size
    steps = math.floor(batches) if config.drop_last else math.ceil(batches)
    if steps == 0:
        raise ValueError(f"{samples} training samples give no batch of {config.batch_size}: lower batch_size")
    return steps


def sgd(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.SGD:
    """The config's optimizer over the parameters, at its base rate."""
    return torch.optim.SGD(
        parameters, config.lr, config.momentum, nesterov=config.nesterov, weight_decay=config.weight_decay
    )


def learning_rate_factor(config: TrainConfig, step: int, epoch_steps: int) -> float:
    """What the base rate is multiplied by at ``step``, counted from 0, with ``epoch_steps`` steps an epoch."""
    factor = config.gamma ** sum(step >= mark * epoch_steps for mark in config.milestones)
    warm = round(config.warmup_epochs * epoch_steps)
    return factor * (step + 1) / warm if step < warm else factor


def _require(holds: bool, name: str, wanted: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
