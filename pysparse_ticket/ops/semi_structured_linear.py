"""``F.linear(x, weight * mask, bias)`` under a transposable 2:4 mask; forward and input gradient on sparse units."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from ..transposable import is_transposable
from . import semi_structured
from .pattern import Pattern
from .semi_structured import Compressed

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
        self._of: weakref.ref[Tensor] | None = None
        self._key: tuple | None = None
        self._weight: Compressed | None = None
        self._mask_key: tuple | None = None

    def __reduce__(self) -> tuple:
        return CompressedWeight, ()

    def get(self, values: Tensor, pattern: Pattern, dtype: torch.dtype) -> Compressed:
        """values ``[nnz]`` under ``pattern``, compressed in ``dtype``. RuntimeError where that cannot be done."""
        self._prepare(values, pattern, dtype)
        key = None
        if not (values.is_inference() or (values.is_cuda and torch.cuda.is_current_stream_capturing())):
            key = (values.data_ptr(), values._version, self._mask_key)
        if key is None or key != self._key or self._of() is not values:
            with torch.no_grad():
                dense = torch.zeros(pattern.shape, dtype=dtype, device=values.device)
                dense.view(-1)[self.index] = values.to(dtype)
                self._weight = self._maker.compress(dense)
            self._key, self._of = key, weakref.ref(values)
        return self._weight

    def _prepare(self, values: Tensor, pattern: Pattern, dtype: torch.dtype) -> None:
        """What depends on the mask alone. The pattern's own tensors tell masks apart: a new mask brings new ones."""
        key = (pattern.col.data_ptr(), pattern.col._version, dtype, values.device)
        if key == self._mask_key:
            return
        if reason := semi_structured.why_not(pattern.shape, dtype, values.device):
            raise RuntimeError(f"format '2:4' cannot run here: {reason}; set_format('packed') can")
        self.index = pattern.flat_index()
        self._maker = semi_structured.backend(values.device)(pattern.mask(), dtype)
        self._mask_key, self._col = key, pattern.col  # held, so that no other mask gets its address


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


@torch.compiler.disable  # whether the values changed is known when it runs, not when it is traced
def semi_structured_linear(
    x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, held: CompressedWeight
) -> Tensor:
    """``F.linear(x, pattern.scatter(values), bias)`` in float16 or bfloat16, or under autocast to one of them.

    x ``[..., in]``, values ``[nnz]`` under a 2:4 pattern of shape ``[out, in]`` that is 2:4 transposed too, bias
    ``[out]`` or None; returns ``[..., out]``. ``held`` keeps the compressed weight from call to call. The gradient of
    values is a dense product, of which the surviving weights' entries are taken. No second derivative, and nothing
    waits for the device. RuntimeError where torch's operators cannot run, ValueError for an x of another dtype.
    """
    dtype = compute_dtype(values)
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
        x = x.to(dtype)
    if x.dtype != dtype:
        raise ValueError(f"x of {x.dtype} does not match the weights' {dtype}; cast one of them or use torch.autocast")
    weight = held.get(values, pattern, dtype)
    tokens = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        y = _Linear.apply(tokens, values, bias, weight, held.index)
    return y.view(*x.shape[:-1], pattern.shape[0])


@torch.no_grad()
def why_not(pattern: Pattern, values: Tensor) -> str | None:
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

    x, grad = draw(pattern.shape[1]), draw(pattern.shape[0])
    ours = values.detach().to(dtype).requires_grad_()
    own_bias = None if bias is None else bias.detach().to(dtype)
    with torch.autocast(device.type, enabled=False), torch.enable_grad():
        try:
            y = semi_structured_linear(x.requires_grad_(), ours, own_bias, pattern, CompressedWeight())
            dx, dvalues = torch.autograd.grad(y, (x, ours), grad)
        except RuntimeError as error:
            return f"torch's 2:4 operators refuse it: {str(error).splitlines()[0]}"
    x, grad, weight = x.detach().float(), grad.float(), pattern.scatter(ours.detach().float())
    own_bias = torch.zeros(pattern.shape[0], device=device) if own_bias is None else own_bias.float()

    def products(x: Tensor, grad: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return x @ weight.t(), grad @ weight, pattern.gather(grad.t() @ x)

    expected = products(x, grad, weight)
    expected = (expected[0] + own_bias, *expected[1:])
    squares = products(x.square(), grad.square(), weight.square())
    terms = (pattern.shape[1], pattern.shape[0], count)
    unit = torch.finfo(dtype).eps
    for what, ours, right, square, n in zip(CHECKED, (y.detach(), dx, dvalues), expected, squares, terms, strict=True):
        allowed = unit * right.abs() + n * 2.0**-22 * square.sqrt() + unit * torch.finfo(dtype).smallest_normal
        wrong = ~((ours.float() - right).abs() <= allowed)  # NaN is wrong too
        if wrong.any():
            return f"its {what} differs from the masked dense one in {int(wrong.sum())} of {wrong.numel()} entries"
    return None
