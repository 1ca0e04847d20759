"""Training steps of networks: the dense rivals, our models, and the check that both learn the same."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import BF16, Arm, Calls
from torch import Tensor, nn

import pysparse_ticket as pst
from pysparse_ticket.measure import macs

LOGITS_ERROR = 1e-4  # 20 to 56 layers of sums in another order
# of the update as a whole: where a ReLU's input rounds to the other side of zero, single gradients move; the dense
# ResNet-20 in fp32 is up to 3e-3 from itself in fp64
UPDATE_ERROR = 1e-2

Optimize = Callable[[nn.Module], torch.optim.Optimizer]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)


def training_step(model: nn.Module, x: Tensor, labels: Tensor, optimize: Optimize, options) -> Calls:
    """Forward, cross entropy, backward and optimizer, of a copy; and, if asked for, the same under autocast."""
    calls: Calls = {}
    for name in ("step", BF16) if options.bf16 else ("step",):
        own = copy.deepcopy(model).train()
        calls[name] = _step(own, x, labels, optimize(own), name == BF16)
    return calls


def _step(model: nn.Module, x: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer, bf16: bool):
    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()

    return step


def compiled_step(model: nn.Module, x: Tensor, labels: Tensor, optimize: Optimize, options) -> Calls:
    """The same with the model compiled, once its logits are those of the eager one."""
    torch.compiler.reset()
    calls: Calls = {}
    for name in ("step", BF16) if options.bf16 else ("step",):
        own = copy.deepcopy(model).train()
        eager, compiled = copy.deepcopy(own), torch.compile(own, dynamic=False)
        if name == "step":
            _same("compiled logits", compiled(x).detach(), eager(x).detach(), LOGITS_ERROR)
        calls[name] = _step(compiled, x, labels, optimize(own), name == BF16)
    return calls


def dense_rivals(
    model: nn.Module, x: Tensor, labels: Tensor, options: argparse.Namespace, optimize: Optimize = sgd
) -> dict[str, Calls]:
    """Eager contiguous, with convolutions channels_last, and torch.compile on the latter."""
    rivals = {"contiguous": training_step(model, x, labels, optimize, options)}
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        model, x = to_channels_last(model, x)
        rivals["channels_last"] = training_step(model, x, labels, optimize, options)
    if options.compile:
        rivals["compile"] = compiled_step(model, x, labels, optimize, options)
    return rivals


def to_channels_last(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Copies in channels_last."""
    form = torch.channels_last
    return copy.deepcopy(model).to(memory_format=form), x.contiguous(memory_format=form)


def network_arm(
    name: str,
    sparsity: float,
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    flops: float,
    options: argparse.Namespace,
    optimize: Optimize = sgd,
) -> Arm:
    """A sparsified model's step, once its logits and its first update are those of its dense twin."""
    check(f"{name} {sparsity:.0%}", model, x, labels)
    return Arm(name, sparsity, training_step(model, x, labels, optimize, options), {"step": flops})


def step_flops(model: nn.Module, first: nn.Module, x: Tensor) -> float:
    """Operations of a step: three passes of the layers' multiply-adds but for the ``first``, which has no dX."""
    sample = x[:1]
    read = sample.flatten(1) if hasattr(first, "in_features") else sample
    return 2.0 * len(x) * (3 * macs(model, sample) - macs(first, read))


def check(what: str, model: nn.Module, x: Tensor, labels: Tensor) -> None:
    """SystemExit unless logits and the weights' first SGD update agree with those of the densified model."""
    sparse = copy.deepcopy(model).train()
    dense = pst.densify(copy.deepcopy(model)).train()
    before = _weights(copy.deepcopy(dense))
    logits, after = [], []
    for one in (sparse, dense):
        out = one(x)
        F.cross_entropy(out, labels).backward()
        torch.optim.SGD(one.parameters(), 1.0).step()
        logits.append(out.detach())
        after.append(_weights(one if one is dense else pst.densify(one)))
    _same(f"{what}: the logits", *logits, LOGITS_ERROR)
    moved = [torch.cat([(b - a)[a != 0] for a, b in zip(before, new, strict=True)]) for new in after]
    _same(f"{what}: the weights' update", *moved, UPDATE_ERROR)


def _weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.dim() > 1]


def _same(what: str, a: Tensor, b: Tensor, limit: float) -> None:
    error = ((a - b).norm() / b.norm()).item()
    if not error < limit:
        raise SystemExit(f"{what} is wrong by {error:.1e}")
