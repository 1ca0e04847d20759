"""Runs a traced model's sparse convolutions, with the norms, adds and ReLUs between them, as one chain of batch tiles,
and its runs of masked linear layers as others. Masked, filter-sparse and, beside those, whole convolutions take part.

Only the model's ``forward`` changes (``nn/rewritten.py``); nothing is packed or unpacked between two of our layers.
"""

from __future__ import annotations

import operator

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.masked_conv2d import is_channels_last
from ..ops.tiled_conv2d import tile_pack, tile_unpack, tiled_conv2d, tiled_mean
from ..ops.tiled_norm_conv2d import Raw, tiled_norm, tiled_norm_conv2d
from .filter_sparse_conv2d import FilterSparseConv2d
from .linear_chain import chain_linears, find_linear_runs, linear_names
from .masked_conv2d import MaskedConv2d, resolve_padding
from .rewritten import RewrittenForward, own_forward, rewrite_forward
from .tile_operands import Tileable, drop_pattern, keep_pattern, operands
from .trace import trace
from .units import Unit, find_units


class TiledChain(RewrittenForward):
    """Other dtypes and devices run the modules one by one."""

    PREFIX = "Tiled"

    @staticmethod
    def _takes(x: Tensor) -> bool:
        """float32 on the CPU, and half precision where autocast casts as the kernels do."""
        half = x.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled("cpu")
        return x.device.type == "cpu" and (x.dtype == torch.float32 or half)


def tile_chain(model: nn.Module, whole: bool = False) -> nn.Module:
    """Give the model a forward that runs its sparse convolutions in batch tiles, its masked linear layers in tiles of
    samples (``nn/linear_chain.py``), or both, and return it. A convolution that the ticket left whole joins where it
    feeds a sparse one or is fed by it; with ``whole`` all of them do, as the network of a layer ticket has no others.

    ValueError with the reason when it has no two of either in a row or cannot be traced (:func:`.trace.trace`); the
    model is then as before.
    """
    graph, modules = trace(model)
    units, runs = _find_units(graph, modules, whole), find_linear_runs(graph, modules)
    if len(units) < 2 and not runs:
        raise ValueError(
            f"{type(model).__name__} has fewer than two sparse convolutions, or masked linear layers in a row, to chain"
        )
    chain_linears(graph, runs)
    if len(units) >= 2:
        for unit in units.values():
            keep_pattern(modules[unit.conv.target])
        graph = _rewrite(graph, units, modules)
    return rewrite_forward(model, graph, TiledChain)


def untile(model: nn.Module) -> nn.Module:
    """Undo :func:`tile_chain`, as any other rewriting; another model is returned as it is."""
    if isinstance(model, TiledChain):
        for module in model.modules():
            drop_pattern(module)
    return own_forward(model)


def _find_units(graph: torch.fx.Graph, modules: dict[str, nn.Module], whole: bool) -> dict[torch.fx.Node, Unit]:
    """{last node of the unit: unit}, in the order of the graph."""
    units = find_units(graph, modules, _tileable)
    return {unit.nodes[-1]: unit for unit in (units if whole else _beside_sparse(units, modules))}


def _tileable(module: nn.Module) -> bool:
    if isinstance(module, MaskedConv2d):
        return not module.why_dense
    if type(module) is nn.Conv2d:  # a hook may change its weight, as torch.nn.utils.prune does
        plain = module.groups == 1 and module.padding_mode == "zeros"
        plain = plain and not module._forward_pre_hooks and not module._forward_hooks
    else:
        plain = isinstance(module, FilterSparseConv2d)
    return plain and resolve_padding(module) is not None


def _beside_sparse(units: list[Unit], modules: dict[str, nn.Module]) -> list[Unit]:
    """Without the whole convolutions that would be packed and unpacked for nobody."""
    kept = {unit.nodes[-1] for unit in units if type(modules[unit.conv.target]) is not nn.Conv2d}
    grows = True
    while grows:
        grows = False
        for unit in units:
            end = unit.nodes[-1]
            reads = {unit.conv.args[0], unit.residual}
            feeds = any(end in (other.conv.args[0], other.residual) for other in units if other.nodes[-1] in kept)
            if end not in kept and (feeds or reads & kept):
                kept.add(end)
                grows = True
    return [unit for unit in units if unit.nodes[-1] in kept]


def _is_global_mean(node: torch.fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """ "flat" for a mean over the pixels to ``[N, C]``, "pooled" for one to ``[N, C, 1, 1]``, else None."""
    if node.op == "call_module" and type(modules[node.target]) is nn.AdaptiveAvgPool2d:
        return "pooled" if modules[node.target].output_size in (1, (1, 1)) else None
    if node.op == "call_function" and node.target is F.adaptive_avg_pool2d and not node.kwargs:
        return "pooled" if node.args[1] in (1, (1, 1)) else None
    if (node.op, node.target) in (("call_method", "mean"), ("call_function", torch.mean)) and not node.kwargs:
        dims = tuple(node.args[1]) if len(node.args) == 2 and isinstance(node.args[1], tuple | list) else ()
        return "flat" if dims in ((2, 3), (-2, -1)) else None
    return None


def _rewrite(graph: torch.fx.Graph, units: dict[torch.fx.Node, Unit], modules: dict[str, nn.Module]) -> torch.fx.Graph:
    """The graph with each unit as one call on tiles, packing and unpacking only where a neighbour is not ours."""
    halo = max(max(resolve_padding(modules[unit.conv.target])) for unit in units.values())
    inner = {node for unit in units.values() for node in unit.nodes[:-1]}
    new = torch.fx.Graph()
    plain: dict[torch.fx.Node, torch.fx.Node] = {}
    tiled: dict[torch.fx.Node, torch.fx.Node] = {}
    raw: dict[torch.fx.Node, torch.fx.Node] = {}  # outputs of units with a norm, until something reads them
    root: torch.fx.Node | None = None

    def as_plain(node: torch.fx.Node) -> torch.fx.Node:
        if node not in plain:
            plain[node] = new.call_function(_unpack, (as_tiled(node), root, halo))
        return plain[node]

    def as_tiled(node: torch.fx.Node) -> torch.fx.Node:
        if node in raw:
            tiled[node] = new.call_function(_norm, (raw.pop(node), root, halo))
        if node not in tiled:
            tiled[node] = new.call_function(_pack, (plain[node], root, halo))
        return tiled[node]

    for node in graph.nodes:
        source = node.args[0] if node.args and isinstance(node.args[0], torch.fx.Node) else None
        mean = _is_global_mean(node, modules)
        if node in inner:
            continue
        if node in units:
            unit = units[node]
            read = unit.conv.args[0]
            keep = len(read.users) > 1
            residual = as_tiled(unit.residual) if unit.residual else None
            conv = new.get_attr(unit.conv.target)
            if unit.norm:
                given = raw.pop(read) if read in raw else as_tiled(read)
                norm = new.get_attr(unit.norm)
                out = new.call_function(_run_raw, (given, root, halo, conv, norm, residual, unit.relu, keep))
                raw[node] = new.call_function(operator.getitem, (out, 0))
            else:
                out = new.call_function(_run, (as_tiled(read), root, halo, conv, residual, unit.relu))
                tiled[node] = new.call_function(operator.getitem, (out, 0))
            # later readers of the input take it from here: their gradient joins inside the input gradient's kernel
            if keep:
                tiled[read] = new.call_function(operator.getitem, (out, 1))
        elif mean and (source in tiled or source in raw):
            flat = new.call_function(_mean, (as_tiled(source), root, halo))
            plain[node] = flat if mean == "flat" else new.call_function(operator.getitem, (flat, (..., None, None)))
        else:
            plain[node] = new.node_copy(node, as_plain)
            root = plain[node] if node.op == "placeholder" else root
    new.lint()
    return new


def _arguments(x: Tensor | Raw, root: Tensor, halo: int, conv: Tileable) -> tuple:
    values, pattern = operands(conv)[:2]
    return x, root.shape[0], halo, values, pattern, conv.stride, resolve_padding(conv), conv.dilation


def _run(
    x: Tensor, root: Tensor, halo: int, conv: Tileable, residual: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor]:
    return tiled_conv2d(*_arguments(x, root, halo, conv), bias=operands(conv)[2], residual=residual, relu=relu)


def _run_raw(
    x: Tensor | Raw,
    root: Tensor,
    halo: int,
    conv: Tileable,
    norm: nn.BatchNorm2d,
    residual: Tensor | None,
    relu: bool,
    keep: bool,
) -> tuple[Raw, Tensor | None]:
    arguments, bias = _arguments(x, root, halo, conv), operands(conv)[2]
    return tiled_norm_conv2d(*arguments, bias=bias, norm=norm, residual=residual, relu=relu, keep=keep)


def _norm(raw: Raw, root: Tensor, halo: int) -> Tensor:
    return tiled_norm(raw, root.shape[0], halo)


def _pack(x: Tensor, root: Tensor, halo: int) -> Tensor:
    if len(x) != len(root):
        raise ValueError(f"a chain of tiles keeps its input's {len(root)} samples, but meets a tensor of {len(x)}")
    return tile_pack(x, halo)


def _unpack(tiles: Tensor, root: Tensor, halo: int) -> Tensor:
    return tile_unpack(tiles, root.shape[0], halo, is_channels_last(root)).to(root.dtype)


def _mean(tiles: Tensor, root: Tensor, halo: int) -> Tensor:
    return tiled_mean(tiles, root.shape[0], halo).to(root.dtype)


def chained_layers(model: nn.Module, whole: bool = False) -> list[str]:
    """Names of the sparse layers, and with ``whole`` of all convolutions, that a tiled model runs in its chains;
    ValueError as :func:`tile_chain`."""
    graph, modules = trace(model)
    units = [unit.conv.target for unit in _find_units(graph, modules, whole).values()]
    convs = [name for name in units if whole or type(modules[name]) is not nn.Conv2d] if len(units) >= 2 else []
    return convs + linear_names(find_linear_runs(graph, modules))
