"""One small training loop: schedule, checkpoint, resume. Your own loop serves as well; nothing else needs this one.

A run is fixed by its config, its data and the model's first weights. On a CPU with the same number of threads (and on a
GPU with deterministic kernels) a run that was killed at any moment and resumed ends with the same bits as one that ran
through: weights, buffers, optimizer, generators and losses.
"""

from __future__ import annotations

import copy
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from . import checkpoint as checkpoints
from .evaluate import autocast_to, evaluate, laid_out
from .interrupt import Interrupted, sigint_held
from .train_config import TrainConfig, learning_rate_factor, sgd, steps_per_epoch

__all__ = ["History", "Interrupted", "Progress", "TrainConfig", "evaluate", "position", "train"]


@dataclass
class History:
    """One entry an epoch. ``seconds`` and ``steps`` are cumulated; seconds leave out evaluation and checkpoints."""

    train_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """What ``on_step`` gets: ``step`` of ``steps`` are done, ``loss`` (a tensor, on the device) is the last one's."""

    step: int
    steps: int
    epoch: int
    loss: torch.Tensor


def train(
    model: torch.nn.Module,
    data,
    config: TrainConfig,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Callable = F.cross_entropy,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    on_step: Callable[[Progress], None] | None = None,
    stop_after: int | None = None,
    extra: dict[str, torch.Tensor] | None = None,
    start: Mapping | None = None,
    carry: Sequence = (),
) -> History:
    """Trains ``model`` in place and returns its history.

    ``data`` has ``train_labels``, ``test_images``, ``test_labels``, ``to(device)``, ``normalize(images)`` and
    ``train_batch(index, generator)``. The order of epoch e is drawn from (seed, e), the augmentation from a generator
    of its own, and torch's global generator (dropout) is seeded with ``config.seed`` at a fresh start. The first
    weights are the caller's.

    optimizer: after ``sparsify``, over the parameters that are left; its own rates are scaled by the schedule, and
        config.lr, momentum, nesterov and weight_decay are not used. Default: SGD over all parameters.
    checkpoint: a file, written at the start, every ``checkpoint_every`` steps (default: after each epoch) and at the
        end. With ``resume`` a file that is there is gone on from, else it is overwritten.
    on_step: called after each optimizer step, its time counted as training. It may change the model or ``extra``.
    stop_after: leave, with a checkpoint, once so many steps are done in all.
    extra: further tensors of the run (masks, say), kept in the checkpoint and on resume copied into in place.
    start: :func:`position` of another run's checkpoint with the same config: begin there and not at step 0, with its
        history, data order and generators, and with ``model`` and ``optimizer`` as they are (rewound, say).
    carry: further objects of the run with state_dict() and load_state_dict(), a schedule of ``pst.dynamic`` say; on
        resume loaded in their order, before the model and the optimizer.

    Raises Interrupted after Ctrl-C (the step in progress is finished and kept), FloatingPointError when the loss is no
    longer finite, ValueError when the checkpoint belongs to another run, OSError when it cannot be written.
    """
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1 step, or None for once an epoch, got {checkpoint_every}")
    run = _Run(model, data, config, optimizer, loss, checkpoint, extra or {}, carry)
    if checkpoint is not None and resume and Path(checkpoint).exists():
        run.restore()
    else:
        if start is None:
            torch.manual_seed(config.seed)
        else:
            run.place(copy.deepcopy(dict(start)))
        run.save()
    try:
        run.go(checkpoint_every, on_step, stop_after)
    except KeyboardInterrupt:
        raise Interrupted(run.keep_on_interrupt()) from None
    return run.history


def position(checkpoint: str | Path) -> dict:
    """Where the run of a checkpoint stands, without its weights and its optimizer: what ``train(start=)`` takes."""
    tree = checkpoints.load(checkpoint)
    return {name: tree[name] for name in ("step", "seconds", "history", "losses", "scaler", "augmentation", "rng")}


class _Run:
    """Everything a checkpoint holds, and the loop over it."""

    def __init__(self, model, data, config, optimizer, loss, path, extra, carry):
        self.config, self.loss, self.path, self.extra, self.carry = config, loss, path, extra, tuple(carry)
        self.device = torch.device(config.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {config.device!r} was asked for, but torch sees no GPU: use device='cpu'")
        self.model = model.to(self.device)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        self.data = data.to(self.device)
        self.samples = len(data.train_labels)
        self.epoch_steps = steps_per_epoch(config, self.samples)
        self.steps = self.epoch_steps * config.epochs
        self.optimizer = sgd(model.parameters(), config) if optimizer is None else optimizer
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        # float16 alone has too few exponent bits for the gradients
        self.scaler = torch.amp.GradScaler("cuda", enabled=config.autocast == "float16" and self.device.type == "cuda")
        self.augmentation = torch.Generator(self.device).manual_seed(_seed(config.seed, 1))
        self.history = History()
        self.step = 0
        self.saved_step = None
        self.seconds = 0.0
        self.losses = torch.zeros(self.epoch_steps, device=self.device)
        self.checked = 0  # losses of this epoch known to be finite
        self.torn = False  # in the middle of a change of state
        self.since = None

    def go(self, every, on_step, stop_after):
        while (epoch := len(self.history.steps)) < self.config.epochs:
            shuffle = torch.Generator().manual_seed(_seed(self.config.seed, 0, epoch))
            order = torch.randperm(self.samples, generator=shuffle).to(self.device)
            self.model.train()
            self.start_clock()
            while (position := self.step - epoch * self.epoch_steps) < self.epoch_steps:
                if stop_after is not None and self.step >= stop_after:
                    self.save()
                    return
                with self.whole_change():
                    value = self.one_step(order, epoch, position)
                    if on_step is not None:
                        on_step(Progress(self.step, self.steps, epoch, value))
                if every is not None and self.step % every == 0:
                    self.save()
                    self.start_clock()
            self.stop_clock()
            self.check_finite(self.epoch_steps)
            accuracy = evaluate(
                self.model, self.data, autocast=self.config.autocast, channels_last=self.config.channels_last
            )
            with self.whole_change():
                self.close_epoch(accuracy)
            if every is None or self.step == self.steps:
                self.save()

    def one_step(self, order, epoch, position):
        index = order[position * self.config.batch_size : (position + 1) * self.config.batch_size]
        images, labels = self.data.train_batch(index, self.augmentation)
        factor = learning_rate_factor(self.config, self.step, self.epoch_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        with autocast_to(self.device, self.config.autocast):
            value = self.loss(self.model(laid_out(images, self.config.channels_last)), labels)
        self.losses[position] = value.detach()
        # free on a CPU; on a GPU reading the loss would wait for it at every step
        if self.device.type == "cpu" and not math.isfinite(value.item()):
            self.check_finite(position + 1)
        self.scaler.scale(value).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        return value.detach()

    def close_epoch(self, accuracy):
        batch = self.config.batch_size
        sizes = torch.full((self.epoch_steps,), batch, dtype=torch.float64)
        sizes[-1] = min(batch, self.samples - (self.epoch_steps - 1) * batch)
        self.history.train_loss.append(float((self.losses.cpu().double() * sizes).sum() / sizes.sum()))
        self.history.test_accuracy.append(accuracy)
        self.history.seconds.append(self.seconds)
        self.history.steps.append(self.step)
        self.checked = 0

    def check_finite(self, count):
        bad = torch.nonzero(~torch.isfinite(self.losses[self.checked : count]))
        if len(bad):
            position = self.checked + int(bad[0])
            step = len(self.history.steps) * self.epoch_steps + position + 1
            kept = f"; {self.path} keeps step {self.saved_step}" if self.path is not None else ""
            raise FloatingPointError(
                f"the loss is {self.losses[position]:g} at step {step} of {self.steps}: "
                f"lower the learning rate, or warm up{kept}"
            )
        self.checked = count

    def start_clock(self):
        self.synchronize()
        self.since = time.perf_counter()

    def stop_clock(self):
        if self.since is not None:
            self.synchronize()
            self.seconds += time.perf_counter() - self.since
            self.since = None

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def whole_change(self):
        """The body happens wholly, Ctrl-C waits for its end; after an exception in it the state is not to be kept."""
        with sigint_held():
            self.torn = True
            yield
            self.torn = False

    def keep_on_interrupt(self) -> str:
        self.stop_clock()
        if self.path is None:
            return f"stopped after step {self.step} of {self.steps}; pass checkpoint= a file name to be able to go on"
        if not self.torn:
            self.save()
        return (
            f"stopped after step {self.step} of {self.steps}; {self.path} keeps step {self.saved_step}: "
            "run the same again to go on from it"
        )

    def save(self):
        self.stop_clock()
        if self.path is None:
            return
        self.check_finite(self.step - len(self.history.steps) * self.epoch_steps)
        checkpoints.save(
            self.path,
            {
                "identity": self.identity(),
                "step": self.step,
                "seconds": self.seconds,
                "history": asdict(self.history),
                "losses": self.losses,
                "model": dict(self.model.state_dict()),
                "extra": self.extra,
                "carry": [thing.state_dict() for thing in self.carry],
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "rng": checkpoints.rng_state(self.device),
                "augmentation": self.augmentation.get_state(),
            },
        )
        self.saved_step = self.step

    def restore(self):
        tree = checkpoints.load(self.path)
        checkpoints.check_same_run(self.path, tree, self.identity())
        for thing, state in zip(self.carry, tree.get("carry", ()), strict=True):
            thing.load_state_dict(state)
        weights = OrderedDict(tree["model"])
        weights._metadata = getattr(self.model.state_dict(), "_metadata", None)  # module versions, which torch looks up
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(tree["optimizer"])
        for name, tensor in self.extra.items():
            tensor.copy_(tree["extra"][name])
        self.place(tree)
        self.saved_step = self.step

    def place(self, tree):
        self.scaler.load_state_dict(tree["scaler"])
        self.history = History(**tree["history"])
        self.step = tree["step"]
        self.seconds = tree["seconds"]
        self.losses.copy_(tree["losses"])
        self.augmentation.set_state(tree["augmentation"])
        checkpoints.set_rng_state(tree["rng"], self.device)

    def identity(self) -> dict:
        """What has to be equal for a checkpoint to be gone on from, by the names that an error message gives."""
        facts = {**asdict(self.config), "number of training samples": self.samples}
        facts["shape of the test images"] = tuple(self.data.test_images.shape)
        facts["optimizer"] = type(self.optimizer).__name__
        if self.carry:
            facts["carry"] = [type(thing).__name__ for thing in self.carry]
        for i, group in enumerate(self.optimizer.param_groups):
            facts[f"number of parameters in optimizer group {i}"] = len(group["params"])
            settings = (key for key in group if key not in ("params", "lr"))  # lr moves; initial_lr stands for it
            facts.update({f"{key} of optimizer group {i}": group[key] for key in settings})
        named = {**self.model.state_dict(), **{f"extra {name}": tensor for name, tensor in self.extra.items()}}
        facts.update(
            {f"shape of {name}": tuple(value.shape) for name, value in named.items() if torch.is_tensor(value)}
        )
        return facts


def _seed(*parts: int) -> int:
    """One 64-bit seed from several numbers, so that (seed 1, epoch 0) and (seed 0, epoch 1) share nothing."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])
