"""A tiny training run that uses every source of state, for tests in their process and for those that kill a child."""

from __future__ import annotations

import itertools
import os
import random

import numpy as np
import torch
import torch._dynamo  # which the first optimizer step imports: 2 s, here once for all children
from torch import nn

from pysparse_ticket.train import Interrupted, TrainConfig, train


class Images:
    """Two kinds of noisy 1x6x6 images, shifted by the given generator, dimmed by Python's and numpy's."""

    def __init__(self, train=40, test=12):
        draw = torch.Generator().manual_seed(5)
        self.train_labels = torch.arange(train) % 2
        self.test_labels = torch.arange(test) % 2
        self.train_images = self._draw(self.train_labels, draw)
        self.test_images = self._draw(self.test_labels, draw)

    @staticmethod
    def _draw(labels, draw):
        noise = torch.randint(0, 120, (len(labels), 1, 6, 6), generator=draw)
        noise[:, :, :, :3] += 100 * labels.view(-1, 1, 1, 1)
        return noise.to(torch.uint8)

    def to(self, device):
        return self

    def normalize(self, images):
        return images.float() / 128 - 1

    def train_batch(self, index, generator):
        shift = int(torch.randint(-1, 2, (), generator=generator))
        images = self.normalize(self.train_images[index]).roll(shift, 3)
        return images * (1 + 0.1 * random.random() * np.random.rand()), self.train_labels[index]


def build(kind: str):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(4, 4, 1),
        nn.Flatten(),
        nn.Linear(144, 2),
    ).to(memory_format=torch.channels_last)
    return model, torch.optim.AdamW(model.parameters(), 0.01) if kind == "adamw" else None


CONFIG = TrainConfig(
    epochs=3, batch_size=12, lr=0.05, nesterov=True, milestones=(2,), warmup_epochs=0.5, channels_last=True, seed=11
)
STEPS = 12  # 40 images are 4 batches, the last of 4


def run(kind: str, path, **options):
    random.seed(1)
    np.random.seed(1)
    model, optimizer = build(kind)
    return train(model, Images(), CONFIG, optimizer=optimizer, checkpoint=path, checkpoint_every=3, **options)


def main(link, kind: str, path, stop_in_write: bool = False) -> None:
    """The run in a child process: tells each step through ``link`` and waits there for the word to go on."""

    def say(line):
        link.send(line)
        link.recv()

    torch.set_num_threads(1)
    if stop_in_write:
        flush, count = os.fsync, itertools.count(1)

        def slow_fsync(handle):
            say(f"fsync {next(count)}")
            flush(handle)

        os.fsync = slow_fsync
    try:
        run(kind, path, on_step=lambda progress: say(f"step {progress.step}"))
        link.send("end")
    except Interrupted as stop:
        link.send(f"interrupted: {stop}")
