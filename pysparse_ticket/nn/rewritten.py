"""A model whose forward is a rewritten graph of its own.

Its modules stay where they are and keep their names, parameters and buffers; only its ``forward`` changes, by a class
that derives from the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.fx
from torch import Tensor, nn


class RewrittenForward:
    """Mixed into the class of such a model. What the rewritten forward does not take runs the modules one by one."""

    def forward(self, *args, **kwargs):
        rewritten = len(args) == 1 and not kwargs and not self.__dict__.get("_modules_one_by_one")
        if rewritten and isinstance(args[0], Tensor) and self._takes(args[0]):
            return self._rewritten_forward(args[0])
        return super().forward(*args, **kwargs)

    PREFIX: str  # of the class's name

    @staticmethod
    def _takes(x: Tensor) -> bool:
        raise NotImplementedError

    @contextmanager
    def modules_one_by_one(self) -> Iterator[None]:
        """Within it every module is called, so that hooks on them see their calls."""
        self._modules_one_by_one = True
        try:
            yield
        finally:
            del self._modules_one_by_one


def rewrite_forward(model: nn.Module, graph: torch.fx.Graph, how: type[RewrittenForward]) -> nn.Module:
    """Give the model the graph as its forward, under the conditions of ``how``, and return it."""
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(code.src, namespace)  # fx's own generated source, as torch.fx.GraphModule runs it
    own = type(model)
    model.__class__ = type(f"{how.PREFIX}{own.__name__}", (how, own), {"_rewritten_forward": namespace["forward"]})
    return model


def own_forward(model: nn.Module) -> nn.Module:
    """Undo :func:`rewrite_forward`; another model is returned as it is."""
    if isinstance(model, RewrittenForward):
        model.__class__ = type(model).__bases__[1]
    return model
