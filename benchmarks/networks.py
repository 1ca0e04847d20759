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
from pysparse_ticket.structure import filter_chains
from pysparse_ticket.ticket import fingerprint

LOGITS_ERROR = 1e-4  # of ResNets: 2e-6 by tiles, 6e-5 by torch's own batch norm in channels_last
# where a ReLU's input rounds to the other side of zero, gradients jump: 5e-3 by tiles, 1e-2 by torch's own modules
UPDATE_ERROR = 2e-2
FEW = 32  # samples; torch's convolutions are slow in fp64

Optimize = Callable[[nn.Module], torch.optim.Optimizer]


def keep(channels: int, sparsity: float) -> Tensor:
    """bool [channels], the sparsity's share of them removed at random."""
    return torch.rand(channels).argsort() >= round(sparsity * channels)


def filter_ticket(model: nn.Module, sparsity: float) -> pst.Ticket:
    """The same share of every convolution's filters removed, where they can go."""
    producers = [chain.producer for chain in filter_chains(model)]
    filters = {name: keep(model.get_submodule(name).out_channels, sparsity) for name in producers}
    return pst.Ticket(filters=filters, architecture=fingerprint(model))


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


def compiled_step(model: nn.Module, x: Tensor, labels: Tensor, optimize: Optimize) -> Calls:
    """The same with the model compiled, once its logits are those of the eager one.

    Not under autocast: inductor takes more than a minute over a ResNet-20's bf16 backward pass, and its step then takes
    several times the eager one's.
    """
    torch.compiler.reset()
    own = copy.deepcopy(model).train()
    compiled = torch.compile(own, dynamic=False)
    _same("compiled logits", compiled(x).detach(), copy.deepcopy(model).train()(x).detach(), LOGITS_ERROR)
    return {"step": _step(compiled, x, labels, optimize(own), False)}


def dense_rivals(
    model: nn.Module, x: Tensor, labels: Tensor, options: argparse.Namespace, optimize: Optimize = sgd
) -> dict[str, Calls]:
    """Eager contiguous, with convolutions channels_last, and torch.compile on the latter."""
    rivals = {"contiguous": training_step(model, x, labels, optimize, options)}
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        model, x = to_channels_last(model, x)
        rivals["channels_last"] = training_step(model, x, labels, optimize, options)
    if options.compile:
        rivals["compile"] = compiled_step(model, x, labels, optimize)
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
    """SystemExit unless the logits of the batch agree with those of the densified model, and the weights' first SGD
    update by a few samples with that of the densified model in fp64."""
    sparse, dense = copy.deepcopy(model).train(), pst.densify(copy.deepcopy(model)).train()
    with torch.no_grad():
        _same(f"{what}: the logits", sparse(x), dense(x), LOGITS_ERROR)
    before, after = _weights(dense), []
    for one, data in ((sparse, x[:FEW]), (dense.double(), x[:FEW].double())):
        F.cross_entropy(one(data), labels[:FEW]).backward()
        torch.optim.SGD(one.parameters(), 1.0).step()
        after.append(_weights(one if one is dense else pst.densify(one)))
    moved = [torch.cat([(b - a)[a != 0] for a, b in zip(before, new, strict=True)]) for new in after]
    _same(f"{what}: the weights' update", *moved, UPDATE_ERROR)


def _weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().double().clone() for p in model.parameters() if p.dim() > 1]


def _same(what: str, a: Tensor, b: Tensor, limit: float) -> None:
    error = ((a - b).norm() / b.norm()).item()
    if not error < limit:
        raise SystemExit(f"{what} is wrong by {error:.1e}")
