"""Makes each run of linear layers that run dense, masked ones among them, one call of ``ops/linear_stack.py``."""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor, nn

from ..ops.linear_stack import linear_stack
from .linear_chain import Run, find_linear_runs, linear_names
from .masked_linear import MaskedLinear
from .rewritten import RewrittenForward, rewrite_forward
from .trace import trace


class LinearStacks(RewrittenForward):
    """Ordinary float32 on the CPU; under autocast and torch.compile the modules run one by one."""

    PREFIX = "Stacked"

    @staticmethod
    def _takes(x: Tensor) -> bool:
        plain = x.device.type == "cpu" and x.dtype == torch.float32
        return plain and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


def stack_linears(model: nn.Module) -> nn.Module:
    """Give the model a forward that runs each two or more dense linear layers in a row, a masked one among them, as one
    call, and return it.

    ValueError with the reason when it has no such layers or cannot be traced; the model is then as before.
    """
    graph, _, runs = _find_runs(model)
    for run in runs:
        first, last = run[0].nodes[0], run[-1].nodes[-1]
        with graph.inserting_before(first):
            layers = [graph.get_attr(step.nodes[0].target) for step in run]
            y = graph.call_function(_run, (first.args[0], layers, [step.relu for step in run]))
        last.replace_all_uses_with(y)
        for node in reversed([node for step in run for node in step.nodes]):
            graph.erase_node(node)
    graph.lint()
    return rewrite_forward(model, graph, LinearStacks)


def stacked_layers(model: nn.Module) -> list[str]:
    """Names of the masked layers that would run so; ValueError as :func:`stack_linears`."""
    _, modules, runs = _find_runs(model)
    return [name for name in linear_names(runs) if isinstance(modules[name], MaskedLinear)]


def _find_runs(model: nn.Module) -> tuple[torch.fx.Graph, dict[str, nn.Module], list[Run]]:
    graph, modules = trace(model)
    runs = find_linear_runs(graph, modules, _runs_dense, ())
    runs = [run for run in runs if any(isinstance(modules[name], MaskedLinear) for name in linear_names([run]))]
    if not runs:
        raise ValueError(f"{type(model).__name__} has no two dense linear layers in a row, one of them masked")
    return graph, modules, runs


def _runs_dense(module: nn.Module | None) -> bool:
    dense = type(module) is nn.Linear or (isinstance(module, MaskedLinear) and module.format == "dense")
    return dense and not module._forward_pre_hooks and not module._forward_hooks  # which may change what it returns


def _run(x: Tensor, layers: list[nn.Linear | MaskedLinear], relus: list[bool]) -> Tensor:
    weights = [
        layer.masked_weight() if isinstance(layer, MaskedLinear) and not layer.packed else layer.weight
        for layer in layers
    ]
    return linear_stack(x, weights, [layer.bias for layer in layers], relus)
