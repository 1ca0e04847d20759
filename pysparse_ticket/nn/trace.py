"""A model's graph as its chains need it: one input, the same in training and evaluation, and no tensor changed behind a
reader's back."""

from __future__ import annotations

import operator

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from .layer_skip import LayerSkip

_IN_PLACE = {
    getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
}


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        ours = type(module).__module__.startswith(__package__)
        return ours or super().is_leaf_module(module, name)


def trace(model: nn.Module) -> tuple[torch.fx.Graph, dict[str, nn.Module]]:
    """The graph, in which blocks that pass their input on are left out, and the model's modules by name.

    ValueError with the reason when the model cannot be traced, takes more than one input, asks for ``self.training``
    (which a graph holds as it was when traced), or changes a tensor in place that is read once more later on (which
    tiles and an ordinary tensor of the same values would then disagree about).
    """
    graph = _graph_of(model)
    if sum(node.op == "placeholder" for node in graph.nodes) != 1:
        raise ValueError(f"{type(model).__name__} takes more than one input")
    modules = dict(model.named_modules())
    _drop_identities(graph, modules)
    _check_in_place(graph, modules)
    return graph, modules


def is_relu(node: torch.fx.Node, modules: dict[str, nn.Module]) -> bool:
    return (
        (node.op == "call_module" and type(modules[node.target]) is nn.ReLU)
        or (node.op == "call_function" and node.target in (F.relu, torch.relu))
        or (node.op == "call_method" and node.target in ("relu", "relu_"))
    )


def _graph_of(model: nn.Module) -> torch.fx.Graph:
    modes = {module: module.training for module in model.modules()}
    graphs = {}
    try:
        for mode in (True, False):
            for module in modes:
                module.training = mode
            graphs[mode] = _Tracer().trace(model)
    except Exception as error:  # tracing runs the user's code and may raise anything
        raise ValueError(f"{type(model).__name__} cannot be traced: {error}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    if graphs[True].python_code("self").src != graphs[False].python_code("self").src:
        raise ValueError(
            f"{type(model).__name__} asks for self.training in a forward, which a graph cannot follow; use modules for "
            "what differs, such as nn.Dropout"
        )
    return graphs[False]


def _drop_identities(graph: torch.fx.Graph, modules: dict[str, nn.Module]) -> None:
    for node in list(graph.nodes):
        if node.op == "call_module" and isinstance(modules[node.target], LayerSkip | nn.Identity):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _check_in_place(graph: torch.fx.Graph, modules: dict[str, nn.Module]) -> None:
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not _is_in_place(node, modules) or not isinstance(node.args[0], torch.fx.Node):
            continue
        for user in node.args[0].users:
            if place[user] > place[node] and user.target not in (getattr, "size", "dim"):
                raise ValueError(f"{node.args[0]} is changed in place by {node} and read again by {user}")


def _is_in_place(node: torch.fx.Node, modules: dict[str, nn.Module]) -> bool:
    if not node.args:
        return False
    if node.op == "call_module":
        return bool(getattr(modules[node.target], "inplace", False))
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    if getattr(node.target, "__module__", "") == "_operator":
        return node.target in _IN_PLACE  # and not operator.and_, say
    told = node.kwargs.get("inplace") is True or (name == "relu" and node.args[1:] == (True,))
    return told or (name.endswith("_") and not name.endswith("__"))
