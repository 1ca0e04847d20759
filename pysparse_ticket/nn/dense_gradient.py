"""Catches the gradient of all weights of masked layers, the absent ones included, in the passes of one step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from .masked import MaskedModule
from .rewritten import RewrittenForward


class DenseGradients:
    """Between :meth:`open` and :meth:`close` the layers' dense gradients add up over all backward passes.

    The layers run as they do otherwise, and beside them plain torch multiplies their input with the gradient of their
    output. Each input is held as a copy until then: a packed layer lets the model overwrite it. A model that runs in
    tiles calls its modules one by one meanwhile.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, MaskedModule]) -> None:
        self._model, self._layers = model, layers
        self._found: dict[str, Tensor] = {}
        self._open: ExitStack | None = None

    def open(self) -> None:
        self.close()
        self._open = ExitStack()
        for module in self._model.modules():
            if isinstance(module, RewrittenForward):
                self._open.enter_context(module.modules_one_by_one())
        for name, layer in self._layers.items():
            self._open.callback(layer.register_forward_hook(partial(self._watch, name)).remove)

    def close(self) -> dict[str, Tensor]:
        """Takes the hooks off and returns {name: gradient in the dense shape} of the layers that one reached."""
        if self._open is not None:
            self._open.close()
        found, self._open, self._found = self._found, None, {}
        return found

    def _watch(self, name: str, layer: MaskedModule, args: tuple, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._add, name, layer, args[0].detach().clone()))

    @torch.no_grad()
    def _add(self, name: str, layer: MaskedModule, x: Tensor, grad: Tensor) -> None:
        if self._open is None:
            return
        dtype = layer.weight_parameter.dtype  # autocast computes in half precision
        with torch.autocast(x.device.type, enabled=False):
            gradient = layer.dense_gradient(x.to(dtype), grad.to(dtype))
        self._found[name] = self._found[name] + gradient if name in self._found else gradient
