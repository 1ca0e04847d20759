"""Training steps on one batch: the dense network's rivals of ours, the whole step, and its peak memory."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .measure import peak_bytes
from .train_config import TrainConfig, sgd


def dense_rivals(model: nn.Module, x: Tensor, race_compile: bool) -> dict[str, tuple[nn.Module, Tensor]]:
    """{dense format: (the model so, the batch so)}; "compile" has the weights of "channels_last"."""
    last, batch = copy.deepcopy(model).to(memory_format=torch.channels_last), channels_last(x)
    rivals = {"contiguous": (model, x), "channels_last": (last, batch)}
    if race_compile:
        # inductor's own compile workers go on starting up while the first arm trains and take its cores
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        rivals["compile"] = (torch.compile(last), batch)
    return rivals


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def training_step(
    model: nn.Module, x: Tensor, y: Tensor, config: TrainConfig
) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """Forward, cross entropy, backward and SGD step of the model on one batch; and its optimizer."""
    optimizer = sgd(model.parameters(), config)

    def one_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return one_step, optimizer


def peak_bytes_of(model: nn.Module, x: Tensor, y: Tensor, config: TrainConfig) -> int:
    """Peak memory of one training step on a copy of the model."""
    twin = copy.deepcopy(model).train()
    one_step, optimizer = training_step(twin, x, y, config)
    return peak_bytes(one_step, twin, optimizer, config.device)
