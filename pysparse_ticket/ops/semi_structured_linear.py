"""``F.linear(x, weight * mask, bias)`` under a transposable 2:4 mask; forward and input gradient on sparse units."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from . import semi_structured
from .linear_shapes import check_features
from .pattern import Pattern
from .semi_structured import Compressed, is_transposable

CHECKED = ("output", "input gradient", "weight gradient")


def compute_dtype(values: Tensor) -> torch.dtype:
    """The dtype that a product of these weights has: autocast's where that is on, else their own."""
    device = values.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else values.dtype


class CompressedWeight:
    """The compressed forms of one layer's values, renewed when they change: once an optimizer step, not once a forward.

    A change is another tensor, other memory or a new version, as every in-place operation of torch makes one; writing
    through ``.data`` into the same memory is not seen. Within the capture of a CUDA graph the values are always
    compressed, so that a replay does it too. A copy starts empty.
    """

    def __init__(self) -> None:
        self._made: tuple | None = None  # each is exchanged whole: replicas on other devices run in other threads
        self._prepared: tuple | None = None

    def __reduce__(self) -> tuple:
        return CompressedWeight, ()

    def get(self, values: Tensor, pattern: Pattern, dtype: torch.dtype) -> tuple[Compressed, Tensor]:
        """values ``[nnz]`` under ``pattern``, compressed in ``dtype``, and where in the dense weight each of them lies.
        RuntimeError where that cannot be done."""
        mask_key, index, maker, _ = self._prepare(pattern, dtype)
        if values.is_inference() or (values.is_cuda and torch.cuda.is_current_stream_capturing()):
            return self._compress(values, pattern, index, maker, dtype), index
        key = (values.data_ptr(), values._version, mask_key)
        made = self._made
        if made is None or made[0] != key or made[1]() is not values:
            made = self._made = key, weakref.ref(values), self._compress(values, pattern, index, maker, dtype)
        return made[2], index

    @staticmethod
    @torch.no_grad()
    def _compress(values: Tensor, pattern: Pattern, index: Tensor, maker, dtype: torch.dtype) -> Compressed:
        dense = torch.zeros(pattern.shape, dtype=dtype, device=values.device)
        dense.view(-1)[index] = values.to(dtype)
        return maker.compress(dense)

    def _prepare(self, pattern: Pattern, dtype: torch.dtype) -> tuple:
        """What depends on the mask alone. The pattern's own tensors tell masks apart: a new mask brings new ones."""
        device = pattern.col.device
        key = (pattern.col.data_ptr(), dtype, device)
        prepared = self._prepared
        if prepared is None or prepared[0] != key:
            if reason := semi_structured.why_not(pattern.shape, dtype, device):
                raise RuntimeError(f"format '2:4' cannot run here: {reason}; set_format('packed') can")
            maker = semi_structured.backend(device)(pattern.mask(), dtype)
            # col is held, so that no other mask gets its address
            prepared = self._prepared = key, pattern.flat_index(), maker, pattern.col
        return prepared


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, bias, weight, index):
        """x ``[tokens, in]`` in the weight's dtype; values and index ``[nnz]``; bias ``[out]`` or None."""
        ctx.weight = weight
        ctx.has_bias, ctx.dtypes = bias is not None, (values.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(x, index)
        return weight.forward(x, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, index = ctx.saved_tensors
        need_x, need_values, need_bias = ctx.needs_input_grad[:3]
        grad = grad.contiguous()
        dx = ctx.weight.backward(grad) if need_x else None
        dvalues = dbias = None
        if need_values:
            dvalues = (grad.t() @ x).view(-1)[index].to(ctx.dtypes[0])
        if need_bias and ctx.has_bias:
            dbias = grad.sum(0, dtype=torch.float32).to(ctx.dtypes[1])
        return dx, dvalues, dbias, None, None


_outside_of_graphs = None


def keep_out_of_graphs() -> None:
    """Whether the values changed is known when the product runs, not when it is traced: torch.compile leaves its graph
    for it. Called before a layer runs, since torch's compiler takes a second to import and brings triton along."""
    global _outside_of_graphs
    _outside_of_graphs = _outside_of_graphs or torch.compiler.disable(_product)


def semi_structured_linear(
    x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, held: CompressedWeight
) -> Tensor:
    """``F.linear(x, pattern.scatter(values), bias)`` in float16 or bfloat16, or under autocast to one of them.

    x ``[..., in]``, values ``[nnz]`` under a 2:4 pattern of shape ``[out, in]`` that is 2:4 transposed too, bias
    ``[out]`` or None; returns ``[..., out]``. ``held`` keeps the compressed weight from call to call. The gradient of
    values is a dense product, of which the surviving weights' entries are taken. No second derivative, and nothing
    waits for the device. RuntimeError where torch's operators cannot run, ValueError for an x that does not fit.
    """
    if _outside_of_graphs is None:
        keep_out_of_graphs()
    return _outside_of_graphs(x, values, bias, pattern, held)


def _product(x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, held: CompressedWeight) -> Tensor:
    check_features(x, None, pattern.shape, "pattern")
    dtype = compute_dtype(values)
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
        x = x.to(dtype)
    if x.dtype != dtype:
        raise ValueError(f"x of {x.dtype} does not match the weights' {dtype}; cast one of them or use torch.autocast")
    weight, index = held.get(values, pattern, dtype)
    tokens = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        y = _Linear.apply(tokens, values, bias, weight, index)
    return y.view(*x.shape[:-1], pattern.shape[0])


@torch.no_grad()
def why_unfit(pattern: Pattern, values: Tensor) -> str | None:
    """Why a layer of these weights cannot run as 2:4: its mask, dtype, shape or device; None when it can."""
    if len(pattern.shape) != 2 or not is_transposable(pattern.mask()):
        return "the mask is not 2:4 in its rows and in its columns (granularity '2:4t' makes such)"
    return semi_structured.why_not(pattern.shape, compute_dtype(values), values.device)


def why_wrong(values: Tensor, bias: Tensor | None, pattern: Pattern, shape: tuple[int, ...]) -> str | None:
    """Why the 2:4 product of these weights differs from the masked dense one for an input of ``shape``; None if not.

    Output and gradients on random tokens are compared with a float32 product of the same rounded factors, which TF32
    leaves exact too. Allowed are one unit in the last place of the result, and for n terms summed in float32 n units
    of 2^-22 of the root of their squares' sum.
    """
    dtype, device = compute_dtype(values), values.device
    generator = torch.Generator(device).manual_seed(0)
    count = 1
    for size in shape[:-1]:
        count *= size

    def draw(width: int) -> Tensor:
        return torch.randn(count, width, generator=generator, device=device).to(dtype)

    with torch.autocast(device.type, enabled=False):
        x, grad = draw(pattern.shape[1]), draw(pattern.shape[0])
        held = values.detach().to(dtype)
        added = None if bias is None else bias.detach().to(dtype)
        try:
            with torch.enable_grad():
                inputs = x.clone().requires_grad_(), held.clone().requires_grad_()
                y = semi_structured_linear(*inputs, added, pattern, CompressedWeight())
                found = y.detach(), *torch.autograd.grad(y, inputs, grad)
        except RuntimeError as error:
            return f"torch's 2:4 operators refuse it: {str(error).splitlines()[0]}"

        def products(x: Tensor, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x @ weight.t(), grad @ weight, pattern.gather(grad.t() @ x)

        factors = x.float(), grad.float(), pattern.scatter(held.float())
        expected, squares = products(*factors), products(*(factor.square() for factor in factors))
        if added is not None:
            expected[0].add_(added)
    unit = torch.finfo(dtype).eps
    terms = (pattern.shape[1], pattern.shape[0], count)
    for what, actual, right, square, n in zip(CHECKED, found, expected, squares, terms, strict=True):
        allowed = unit * right.abs() + n * 2.0**-22 * square.sqrt() + unit * torch.finfo(dtype).smallest_normal
        wrong = ~((actual.float() - right).abs() <= allowed)  # NaN is wrong too
        if wrong.any():
            return f"its {what} differs from the masked dense one in {int(wrong.sum())} of {wrong.numel()} entries"
    return None
