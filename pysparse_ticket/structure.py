"""What a network consists of, found by running or tracing it: blocks that can be skipped, filters that can go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from .scores.magnitude import prunable


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


@dataclass(frozen=True)
class FilterChain:
    """A convolution whose output reaches one other convolution alone, channel by channel: its filters can go."""

    producer: str
    norms: tuple[str, ...]
    consumer: str


_CHANNELWISE = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.Tanh,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
)
_CHANNELWISE_CALLS = {
    torch.relu,
    F.relu,
    F.relu6,
    F.gelu,
    F.silu,
    F.leaky_relu,
    F.elu,
    torch.tanh,
    F.max_pool2d,
    F.avg_pool2d,
}


def filter_chains(model: nn.Module) -> list[FilterChain]:
    """Trace the model and list its :class:`FilterChain`; ValueError with the reason when it cannot be traced."""
    try:
        graph = torch.fx.Tracer().trace(model)
    except Exception as error:  # tracing runs the user's code and may raise anything
        raise ValueError(
            f"{type(model).__name__} cannot be traced, so its filters cannot be pruned: {error}"
        ) from error
    modules = dict(model.named_modules())
    calls = [node.target for node in graph.nodes if node.op == "call_module"]

    def plain_conv(node) -> bool:
        return (
            node.op == "call_module"
            and type(modules[node.target]) is nn.Conv2d
            and modules[node.target].groups == 1
            and calls.count(node.target) == 1
        )

    chains = []
    for start in graph.nodes:
        if not plain_conv(start):
            continue
        norms: list[str] = []
        node = start
        while len(node.users) == 1:
            node = next(iter(node.users))
            if plain_conv(node):
                chains.append(FilterChain(start.target, tuple(norms), node.target))
                break
            if (
                node.op == "call_module"
                and type(modules[node.target]) is nn.BatchNorm2d
                and calls.count(node.target) == 1
            ):
                norms.append(node.target)
            elif not (
                (node.op == "call_module" and isinstance(modules[node.target], _CHANNELWISE))
                or (node.op == "call_function" and node.target in _CHANNELWISE_CALLS)
                or (node.op == "call_method" and node.target in ("relu", "tanh"))
            ):
                break
    return chains
