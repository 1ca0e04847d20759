"""Runs fused filter-sparse convolutions of a traced model with the batch norm, add and ReLU behind each in one op."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.filter_conv2d_norm import filter_conv2d_norm
from .filter_sparse_conv2d import FilterSparseConv2d
from .rewritten import RewrittenForward, rewrite_forward
from .trace import trace
from .units import NORMS, Unit, find_units

FUSED_NORM = "fused norm"  # the format that a plan shows of such a convolution


class FusedNorms(RewrittenForward):
    """Whatever the input: the op has a reference for other devices and dtypes."""

    PREFIX = "FusedNorms"

    @staticmethod
    def _takes(x: Tensor) -> bool:
        return True


def fuse_norms(model: nn.Module) -> list[str]:
    """Give the model a forward in which every convolution of format "fused" that a batch norm alone reads takes that
    norm, and the residual add and ReLU behind it, into its op; returns the names of these convolutions.

    ValueError with the reason when there is none or the model cannot be traced (:func:`.trace.trace`); the model is
    then as before.
    """
    graph, modules = trace(model)
    units = [unit for unit in find_units(graph, modules, _is_fused) if unit.norm]
    if not units:
        raise ValueError(f"{type(model).__name__} has no batch norm behind a fused convolution")
    for unit in units:
        _rewrite(unit)
    graph.lint()
    rewrite_forward(model, graph, FusedNorms)
    return [unit.conv.target for unit in units]


def _is_fused(module: nn.Module) -> bool:
    return isinstance(module, FilterSparseConv2d) and module.format == "fused"


def _rewrite(unit: Unit) -> None:
    last, graph = unit.nodes[-1], unit.conv.graph
    with graph.inserting_before(last):
        conv, norm = graph.get_attr(unit.conv.target), graph.get_attr(unit.norm)
        fused = graph.call_function(_run, (unit.conv.args[0], conv, norm, unit.residual, unit.relu))
    last.replace_all_uses_with(fused)
    for node in reversed(unit.nodes):
        graph.erase_node(node)


def _run(x: Tensor, conv: FilterSparseConv2d, norm: nn.Module, residual: Tensor | None, relu: bool) -> Tensor:
    if _is_fused(conv) and type(norm) in NORMS:
        return filter_conv2d_norm(x, *conv.operands(), norm=norm, residual=residual, relu=relu)
    z = norm(conv(x))  # of another format by now, or a norm over all processes
    z = z if residual is None else z + residual
    return z.relu() if relu else z
