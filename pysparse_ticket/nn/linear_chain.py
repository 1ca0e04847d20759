"""Finds runs of masked linear layers in a traced model and lets them pass tiles of samples to each other.

Between two layers of a run may stand a ReLU, which the layer's kernel then does, and elementwise modules. Only the
first layer packs its input and only the last unpacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.fx
from torch import Tensor, nn

from ..ops.tiled_linear import linear_pack, linear_unpack, tiled_linear
from .masked_linear import MaskedLinear
from .trace import is_relu

# of one input and no say in the layout: the same on tiles (a dropout draws other places than on the ordinary tensor)
ELEMENTWISE = (nn.Dropout, nn.Identity)

Nodes = list[torch.fx.Node]


@dataclass
class _Step:
    """A linear layer with its ReLU, or one elementwise module; ``nodes`` ends with the last of them."""

    nodes: Nodes
    linear: bool

    @property
    def relu(self) -> bool:
        return self.linear and len(self.nodes) > 1


Run = list[_Step]


def _packs(module: nn.Module | None) -> bool:
    return isinstance(module, MaskedLinear) and not module.why_dense and module.schedule is not None


def find_linear_runs(
    graph: torch.fx.Graph,
    modules: dict[str, nn.Module],
    takes: Callable[[nn.Module | None], bool] = _packs,
    between: tuple[type[nn.Module], ...] = ELEMENTWISE,
) -> list[Run]:
    """Runs of two or more of the layers that it ``takes``, each read by the next step alone; modules of the types
    ``between`` may stand among them."""
    taken: set[torch.fx.Node] = set()
    runs = []

    def module_of(node: torch.fx.Node) -> nn.Module | None:
        return modules.get(node.target) if node.op == "call_module" else None

    def only_user(node: torch.fx.Node) -> torch.fx.Node | None:
        user = next(iter(node.users)) if len(node.users) == 1 else None
        return user if user is None or user.all_input_nodes == [node] else None

    for node in graph.nodes:
        if node in taken or not takes(module_of(node)):
            continue
        run: Run = []
        at = node
        while at is not None:
            if takes(module_of(at)):
                step = _Step([at], True)
                user = only_user(at)
                if user is not None and is_relu(user, modules):
                    step.nodes.append(user)
            elif type(module_of(at)) in between:
                step = _Step([at], False)
            else:
                break
            run.append(step)
            at = only_user(step.nodes[-1])
        while not run[-1].linear:
            run.pop()
        taken.update(node for step in run for node in step.nodes)
        if sum(step.linear for step in run) >= 2:
            runs.append(run)
    return runs


def chain_linears(graph: torch.fx.Graph, runs: list[Run]) -> None:
    """Rewrite the runs, in place, as calls on tiles."""
    for run in runs:
        source = run[0].nodes[0].args[0]
        with graph.inserting_before(run[0].nodes[0]):
            tiles = graph.call_function(_pack, (source,))
        relu = False
        for step in run:
            with graph.inserting_before(step.nodes[0]):
                if step.linear:
                    module = graph.get_attr(step.nodes[0].target)
                    tiles = graph.call_function(_run, (tiles, source, module, step.relu, step is not run[-1], relu))
                    relu = step.relu
                else:
                    tiles = graph.call_module(step.nodes[0].target, (tiles,))
        last = run[-1].nodes[-1]
        with graph.inserting_before(last):
            plain = graph.call_function(_unpack, (tiles, source, module))
        last.replace_all_uses_with(plain)
        for node in reversed([node for step in run for node in step.nodes]):
            graph.erase_node(node)
    graph.lint()


def linear_names(runs: list[Run]) -> list[str]:
    """Names of the linear layers in the runs, each once."""
    return list(dict.fromkeys(step.nodes[0].target for run in runs for step in run if step.linear))


def _samples(source: Tensor) -> int:
    return source.shape[:-1].numel()


def _pack(source: Tensor) -> Tensor:
    return linear_pack(source.reshape(_samples(source), source.shape[-1]))


def _run(tiles: Tensor, source: Tensor, layer: MaskedLinear, relu: bool, gated: bool, gate_x: bool) -> Tensor:
    return tiled_linear(
        tiles,
        _samples(source),
        layer.packed_values(),
        layer.bias,
        layer.pattern,
        relu=relu,
        gated=gated,
        gate_x=gate_x,
        schedules=(layer.schedule, layer.t_schedule),
    )


def _unpack(tiles: Tensor, source: Tensor, last: MaskedLinear) -> Tensor:
    y = linear_unpack(tiles, _samples(source), last.out_features)
    return y.view(*source.shape[:-1], last.out_features)
