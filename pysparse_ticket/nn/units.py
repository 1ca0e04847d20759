"""Finds convolutions in a traced model, with the norm, residual add and ReLU behind each."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.fx
from torch import nn

from .filter_sparse_conv2d import CompactBatchNorm2d
from .trace import is_relu

NORMS = (nn.BatchNorm2d, CompactBatchNorm2d)


@dataclass
class Unit:
    """conv, then norm, then + residual, then ReLU, as far as each is there; ``nodes`` ends with the last of them."""

    conv: torch.fx.Node
    nodes: list[torch.fx.Node]
    norm: str | None = None
    residual: torch.fx.Node | None = None
    relu: bool = False


def find_units(graph: torch.fx.Graph, modules: dict[str, nn.Module], takes: Callable[[nn.Module], bool]) -> list[Unit]:
    """One a convolution that ``takes`` accepts and that is called once, in the order of the graph. What is behind it
    belongs to it as long as nothing else reads what is between."""
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    taken: set[torch.fx.Node] = set()
    units = []

    def only_user(node: torch.fx.Node) -> torch.fx.Node | None:
        user = next(iter(node.users)) if len(node.users) == 1 else None
        return None if user in taken else user

    for node in graph.nodes:
        module = modules.get(node.target) if node.op == "call_module" else None
        if module is None or not takes(module) or calls.count(node.target) > 1:
            continue
        unit = Unit(node, [node])
        user = only_user(node)
        if user is not None and user.op == "call_module" and type(modules[user.target]) in NORMS:
            unit.norm = user.target
            unit.nodes.append(user)
            user = only_user(user)
        if user is not None and (other := _other_summand(user, unit.nodes[-1])) is not None:
            unit.residual = other
            unit.nodes.append(user)
            user = only_user(user)
        if user is not None and is_relu(user, modules):
            unit.relu = True
            unit.nodes.append(user)
        taken.update(unit.nodes)
        units.append(unit)
    return units


def _other_summand(node: torch.fx.Node, one: torch.fx.Node) -> torch.fx.Node | None:
    functions = (operator.add, operator.iadd, torch.add)
    is_add = (node.op == "call_function" and node.target in functions) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    if not is_add or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    other = second if first is one else first
    # a parameter or buffer has no samples, and is broadcast
    return other if isinstance(other, torch.fx.Node) and other is not one and other.op != "get_attr" else None
