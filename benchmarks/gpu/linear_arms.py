"""Ways to run a masked linear layer: dense rivals, our formats, torch's own sparse operators; each compared first."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu.program import Arm, compared, limit_of, passes
from gpu.timing import first_line
from pysparse_ticket.nn import MaskedLinear
from pysparse_ticket.ops import library
from pysparse_ticket.ops.masked_linear import linear_schedule

warnings.filterwarnings("ignore", "Sparse (CSR|BSR) tensor support is in beta")


class Problem:
    """A layer of random weights under a mask, an input and a gradient, and what the masked layer gives in wider sums.

    mask: bool [outputs, inputs]
    """

    def __init__(
        self, outputs: int, inputs: int, tokens: int, mask: Tensor, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dtype, self.mask = dtype, mask.to(device)
        self.layer = nn.Linear(inputs, outputs, device=device)
        with torch.no_grad():
            self.layer.weight.mul_(self.mask)
        self.layer.to(dtype)
        self.x = torch.randn(tokens, inputs, device=device).to(dtype)
        self.grad = torch.randn(tokens, outputs, device=device).to(dtype)
        wide = torch.float64 if dtype is torch.float32 else torch.float32
        x, grad, weight = self.x.to(wide), self.grad.to(wide), self.layer.weight.detach().to(wide)
        y = x @ weight.T + self.layer.bias.detach().to(wide)
        self.want = {"y": y, "dX": grad @ weight, "dW": (grad.T @ x) * self.mask, "db": grad.sum(0)}
        self.want = {name: t.float() for name, t in self.want.items()}

    def dense(self, compiled: bool) -> list[Arm]:
        """cuBLAS on the premultiplied weight, eager and, if asked for, compiled; its gradient is of all weights."""

        def arm(name: str, function, names: Iterable[str]) -> Arm:
            calls = passes(function, self.x, list(layer.parameters()), self.grad, names)
            return compared(Arm(name, calls), self.want, limit_of(self.dtype), self._masked)

        layer = copy.deepcopy(self.layer)
        arms = [arm("cuBLAS", layer, ("forward", "dX", "dW", "step"))]
        if compiled:
            torch.compiler.reset()
            layer = copy.deepcopy(self.layer)
            arms.append(arm("compiled", torch.compile(layer, dynamic=False), ("forward", "step")))
        return arms

    def _masked(self, name: str, tensor: Tensor) -> Tensor:
        return tensor * self.mask if name == "dW" else tensor

    def ours(
        self, name: str, fmt: str, windows: int | None = None, names: Iterable[str] = ("forward", "dX", "dW", "step")
    ) -> Arm:
        """Our module in a format; ValueError where this version has it not. Its note says which backend ran.

        windows: of ``linear_schedule``, for format "packed".
        """
        module = MaskedLinear.from_dense(copy.deepcopy(self.layer), self.mask)
        if module.format != fmt:
            module.set_format(fmt)
        if windows is not None:
            module.schedule, module.t_schedule = linear_schedule(module.pattern, windows)
        weight = module.weight_parameter
        parameters = [weight, *(p for p in module.parameters() if p is not weight)]
        calls = passes(module, self.x, parameters, self.grad, names)

        def plain(what: str, tensor: Tensor) -> Tensor:
            return module.dense_like(tensor) if what == "dW" else tensor

        library._ran.clear()
        arm = compared(Arm(name, calls), self.want, limit_of(self.dtype), plain)
        arm.note = ", ".join(f"{op} on {backend}" for op, backend in library._ran.items())
        return arm

    def bsr(self, side: int) -> Arm:
        """torch's BSR products of the same mask, and its sampled product for the gradient; no autograd joins them."""
        weight = self.layer.weight.detach()
        w, wt = weight.to_sparse_bsr((side, side)), weight.T.contiguous().to_sparse_bsr((side, side))
        bias, x, grad = self.layer.bias.detach(), self.x, self.grad
        product = _first_that_runs(
            lambda matrix, t: F.linear(t, matrix),
            lambda matrix, t: (matrix @ t.T).T,
            arguments=(w, x),
        )

        def forward() -> Tensor:
            return product(w, x) + bias

        def grad_input() -> Tensor:
            return product(wt, grad)

        def grad_weight() -> Tensor:
            return _sampled(w, grad, x)

        calls = {"forward": lambda: forward, "dX": lambda: grad_input}
        arm = Arm(f"torch BSR {side}", calls)
        try:
            grad_weight()
        except Exception as error:  # a torch without a sampled product of blocks: no dW and no step
            arm.note = f"no sampled product: {first_line(error)}"
        else:
            calls |= {
                "dW": lambda: grad_weight,
                "step": lambda: lambda: (forward(), grad_input(), grad_weight(), grad.sum(0)),
            }
        return compared(arm, self.want, limit_of(self.dtype), lambda _, t: _strided(t))

    def semi_structured(self) -> Arm:
        """torch's 2:4 operators, forward alone: the mask must keep two of four."""
        from torch.sparse import to_sparse_semi_structured

        weight = to_sparse_semi_structured(self.layer.weight.detach())
        bias, x = self.layer.bias.detach(), self.x
        return compared(
            Arm("torch 2:4", {"forward": lambda: lambda: F.linear(x, weight, bias)}), self.want, limit_of(self.dtype)
        )


def _first_that_runs(*ways, arguments):
    """The first of the ways that takes the arguments; the last one's error where none does."""
    for way in ways[:-1]:
        try:
            way(*arguments)
        except Exception:  # which operators take BSR differs by device, dtype and version
            continue
        return way
    ways[-1](*arguments)
    return ways[-1]


def _sampled(w: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """``grad^T x`` at the blocks of ``w``: by Triton on a GPU."""
    if w.device.type == "cuda":
        from torch.sparse._triton_ops import sampled_addmm

        return sampled_addmm(w, grad.T.contiguous(), x, beta=0.0)
    return torch.sparse.sampled_addmm(w, grad.T, x, beta=0)


def _strided(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()
