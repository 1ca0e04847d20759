"""Blocks of layers that can be skipped, found by running the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..scores.magnitude import prunable


@dataclass(frozen=True)
class Block:
    """One composite child of a Sequential or ModuleList, as seen in a forward pass."""

    name: str
    stage: str
    first: bool  # of its container
    keeps_shape: bool


@dataclass(frozen=True)
class Blocks:
    """Every block in the order of execution, and those that may be removed (Jordao et al. 2023, A.1)."""

    all: tuple[Block, ...]
    candidates: tuple[str, ...]

    @property
    def stages(self) -> dict[str, str]:
        return {block.name: block.stage for block in self.all}

    @property
    def stage_sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for block in self.all:
            sizes[block.stage] = sizes.get(block.stage, 0) + 1
        return sizes


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode within it, each back in its own mode after it."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def find_blocks(model: nn.Module, sample: Tensor, strict: bool = False) -> Blocks:
    """Run ``sample`` and list the blocks of the model's Sequential and ModuleList containers.

    A block has children and prunable weights, takes one tensor first and returns one tensor; a Sequential of blocks is
    their stage, and what lies inside a block is not one. A candidate returns the
    shape that it was given and is not the first of its container; a stage is a run of blocks of one container with
    one output shape. ``strict`` also spares the neighbours of a block that changes the shape ("we cannot remove
    layers before and after the downsampling layers").
    """
    weights = tuple(prunable(model))
    inside: dict[str, tuple[str, int]] = {}
    for container, module in model.named_modules():
        if not isinstance(module, nn.Sequential | nn.ModuleList):
            continue
        for index, (child, block) in enumerate(module.named_children()):
            name = f"{container}.{child}".removeprefix(".")
            if any(True for _ in block.children()) and any(w.startswith(f"{name}.") for w in weights):
                inside[name] = (container, index)
    containers = {container for container, _ in inside.values()}  # a stage of blocks is no block itself
    inside = {name: where for name, where in inside.items() if name not in containers}
    outermost = [n for n in inside if not any(n.startswith(f"{other}.") for other in inside)]

    calls: list[tuple[str, torch.Size, torch.Size]] = []
    handles = []
    for name in outermost:

        def hook(_, args, output, name=name):
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                calls.append((name, args[0].shape, output.shape))

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        with eval_mode(model), torch.no_grad():
            model(sample)
    finally:
        for handle in handles:
            handle.remove()

    blocks: list[Block] = []
    stage, previous = "", None
    for name, given, returned in calls:
        container, index = inside[name]
        if (container, returned) != previous:
            stage, previous = name, (container, returned)
        blocks.append(Block(name, stage, index == 0, given == returned))
    repeated = {b.name for b in blocks if sum(o.name == b.name for o in blocks) > 1}
    candidates = []
    for i, block in enumerate(blocks):
        beside = blocks[max(i - 1, 0) : i + 2]
        if block.keeps_shape and not block.first and block.name not in repeated:
            if strict and not all(b.keeps_shape for b in beside):
                continue
            candidates.append(block.name)
    return Blocks(tuple(blocks), tuple(candidates))
