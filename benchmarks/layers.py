"""The passes of one layer: dense rivals, our modules, torch's own sparse products; each checked against an oracle."""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Sequence

import torch
from harness import BF16, Arm, Calls, layer_flops
from torch import Tensor, nn

FP32_ERROR = 1e-5  # sums of up to 3072 products: sqrt(3072) / 2 roundings of 2^-24 are 2e-6
BF16_ERROR = 2e-2  # x, weight, gradient and result are each rounded to 8 bits: sqrt(4) * 2^-8 is 0.8%

warnings.filterwarnings("ignore", "Sparse (CSR|BSR) tensor support is in beta")

Function = Callable[[Tensor], Tensor]
Plain = Callable[[str, Tensor], Tensor]


def conv_site(batch: int, channels: int, side: int) -> tuple[nn.Conv2d, Tensor, Tensor, int]:
    """A 3x3 convolution that keeps its image's size, with an input, an output gradient and its multiply-adds."""
    layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    x, grad = (torch.randn(batch, channels, side, side) for _ in range(2))
    return layer, x, grad, grad.numel() * channels * 9


def passes(function: Function, x: Tensor, parameters: Sequence[Tensor], grad: Tensor, options) -> Calls:
    """forward, dX, dW, step and, if asked for, bf16 of ``function(x)``; the weight is the first of its parameters."""
    weight, *_ = parameters

    def need(wanted: Sequence[Tensor]) -> None:
        for p in parameters:
            p.requires_grad_(any(p is w for w in wanted))

    def forward() -> Tensor:
        with torch.no_grad():
            return function(x)

    leaf = x.detach().requires_grad_()
    need([])
    y_of_x = function(leaf)
    need([weight])
    y_of_weight = function(x)
    need(parameters)
    wanted = [leaf, *parameters]

    def step() -> tuple[Tensor, ...]:
        y = function(leaf)
        return y, *torch.autograd.grad(y, wanted, grad)

    calls = {
        "forward": forward,
        "dX": lambda: torch.autograd.grad(y_of_x, leaf, grad, retain_graph=True)[0],
        "dW": lambda: torch.autograd.grad(y_of_weight, weight, grad, retain_graph=True)[0],
        "step": step,
    }
    if options.bf16:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            cast = grad.to(function(x).dtype)

        def bf16() -> tuple[Tensor, ...]:
            with torch.autocast("cpu", torch.bfloat16):
                y = function(leaf)
            return y, *torch.autograd.grad(y, wanted, cast)

        calls[BF16] = bf16
    return calls


def oracle(dense: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients of a plain dense layer."""
    leaf = x.detach().requires_grad_()
    y = dense(leaf)
    dx, *rest = torch.autograd.grad(y, [leaf, *dense.parameters()], grad)
    return dict(zip(("y", "dX", "dW", "db"), (y.detach(), dx, *rest), strict=False))


def checked(what: str, calls: Calls, want: dict[str, Tensor], plain: Plain = lambda _, tensor: tensor) -> Calls:
    """The calls, once every result agrees with the oracle's; SystemExit names the first that does not.

    ``plain(name, tensor)`` turns an arm's own y, dX, dW or db into the oracle's shape.
    """
    for p, call in calls.items():
        got = call()
        named = dict(zip(want, got, strict=False)) if isinstance(got, tuple) else {{"forward": "y"}.get(p, p): got}
        for name, tensor in named.items():
            a, b = plain(name, tensor.detach()).float(), want[name]
            error = ((a - b).norm() / b.norm()).item()
            if a.shape != b.shape or not error < (BF16_ERROR if p == BF16 else FP32_ERROR):
                raise SystemExit(f"{what}: {name} of {p} is wrong by {error:.1e}")
    return calls


def dense_rivals(layer: nn.Module, x: Tensor, grad: Tensor, options: argparse.Namespace) -> dict[str, Calls]:
    """Eager contiguous, for images channels_last, and torch.compile on the latter; weights of any values."""
    want = oracle(layer, x, grad)
    torch.compiler.reset()
    image = x.dim() == 4

    def rival(name: str, run: Callable[[nn.Module], Function] = lambda module: module, last: bool = False) -> Calls:
        module, data, cotangent = layer, x, grad
        if last:
            form = torch.channels_last
            module, data, cotangent = (
                layer.to(memory_format=form),
                x.to(memory_format=form),
                grad.to(memory_format=form),
            )
        module.requires_grad_()
        return checked(name, passes(run(module), data, list(module.parameters()), cotangent, options), want)

    rivals = {"contiguous": rival("contiguous")}
    layer = copy.deepcopy(layer)
    if image:
        rivals["channels_last"] = rival("channels_last", last=True)
        layer = copy.deepcopy(layer)
    if options.compile:
        rivals["compile"] = rival("compile", lambda module: torch.compile(module, dynamic=False), last=image)
    return rivals


def module_arm(
    name: str, module: nn.Module, sparsity: float, x: Tensor, grad: Tensor, macs: float, options: argparse.Namespace
) -> Arm:
    """A masked module on ordinary tensors; ``macs`` are the dense layer's multiply-adds for the batch."""
    module.requires_grad_()
    weight = module.weight_parameter
    parameters = [weight, *(p for p in module.parameters() if p is not weight)]
    calls = passes(module, x, parameters, grad, options)
    checked(f"{name} {sparsity:.0%}", calls, masked_oracle(module, x, grad), packed(module))
    return Arm(name, sparsity, calls, layer_flops(macs * (1 - module.sparsity)))


def masked_oracle(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Of the dense layer with zeros, the weight's gradient masked."""
    want = oracle(module.to_dense().requires_grad_(), x, grad)
    return want | {"dW": want["dW"] * module.mask}


def packed(module: nn.Module) -> Plain:
    """Values' gradients to the dense weight's shape."""
    return lambda name, tensor: module.dense_like(tensor) if name == "dW" else tensor


def sparse_tensor_arm(
    name: str, module: nn.Module, sparsity: float, x: Tensor, grad: Tensor, macs: float, block: tuple[int, int] | None
) -> Arm:
    """torch's own CSR or BSR tensor of a masked linear layer's weight: ``weight @ x^T``, the transposed one for dX and,
    of CSR, a sampled product for dW. There is no autograd for it, so the step is one product after the other, and BSR,
    which has no sampled product, has no dW and no step."""
    weight = module.weight.detach()
    turned = weight.t().contiguous()
    if block:
        w, wt = weight.to_sparse_bsr(block), turned.to_sparse_bsr(block[::-1])
    else:
        w, wt = weight.to_sparse_csr(), turned.to_sparse_csr()

    def forward() -> Tensor:
        return (w @ x.t()).t()

    def grad_input() -> Tensor:
        return (wt @ grad.t()).t()

    def grad_weight() -> Tensor:
        return torch.sparse.sampled_addmm(w, grad.t(), x, beta=0)

    calls: Calls = {"forward": forward, "dX": grad_input}
    if not block:
        calls |= {"dW": grad_weight, "step": lambda: (forward(), grad_input(), grad_weight())}
    want = masked_oracle(module, x, grad)
    want["y"] = want["y"] - module.bias.detach() if module.bias is not None else want["y"]
    checked(f"{name} {sparsity:.0%}", calls, want, lambda n, t: t.to_dense() if n == "dW" else t)
    flops = layer_flops(macs * (1 - module.sparsity))
    return Arm(name, sparsity, calls, {p: flops[p] for p in calls})
