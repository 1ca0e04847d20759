"""2:4 products through torch's semi-structured operators: what they take, and the only place that calls them.

A sparse unit multiplies a 2:4 matrix on the left, so a linear layer is ``y = (W x^T)^T`` and its input gradient
``(W^T dy^T)^T``: both need their factor 2:4 along its rows, hence a transposable mask. Ampere (8.x) runs CUTLASS, whose
pattern is made once a mask and applied to new values in one small kernel; Hopper (9.x) runs cuSPARSELt, which
compresses W and W^T anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16)
SIDE = 64  # a warp of CUTLASS's compression covers 32x64 weights, and the transpose turns that round
TOKENS = 8  # 16 bytes of a token's row or column at a time


@dataclass(frozen=True)
class Compressed:
    """A weight ``[out, in]`` and its transpose, as a backend stores them; only CUTLASS has ``meta`` and ``meta_t``."""

    shape: tuple[int, int]
    packed: Tensor
    packed_t: Tensor
    meta: Tensor | None = None
    meta_t: Tensor | None = None

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``F.linear(x, W, bias)``: ``[tokens, in]`` to ``[tokens, out]``, all of one dtype."""
        return _product(self.packed, self.meta, x, bias, self.shape[0])

    def backward(self, grad: Tensor) -> Tensor:
        """``grad @ W``: ``[tokens, out]`` to ``[tokens, in]``."""
        return _product(self.packed_t, self.meta_t, grad, None, self.shape[1])


def _product(packed: Tensor, meta: Tensor | None, x: Tensor, bias: Tensor | None, width: int) -> Tensor:
    tokens = len(x)
    if not tokens:
        return x.new_empty(0, width)
    x = F.pad(x, (0, 0, 0, -tokens % TOKENS)) if tokens % TOKENS else x.contiguous()
    if meta is None:
        # the operator reads a right factor that is not contiguous as the transpose of one that is
        return torch._cslt_sparse_mm(packed, x.t(), bias=bias, transpose_result=True)[:tokens]
    if bias is None:
        y = torch._sparse_semi_structured_mm(packed, meta, x.t())
    else:
        y = torch._sparse_semi_structured_addmm(bias, packed, meta, x.t())
    return y[:, :tokens].t().contiguous()


class Cutlass:
    """``torch._sparse_semi_structured_tile`` once a mask, ``_apply`` for new values."""

    def __init__(self, mask: Tensor, dtype: torch.dtype) -> None:
        # it keeps the largest values first, two a row and column: of a mask in place of the values, all that is kept
        _, self.meta, _, self.meta_t, self.threads = torch._sparse_semi_structured_tile(mask.to(dtype))

    def compress(self, weight: Tensor) -> Compressed:
        packed, packed_t = torch._sparse_semi_structured_apply(weight, self.threads)
        return Compressed(tuple(weight.shape), packed, packed_t, self.meta, self.meta_t)


class CuSparseLt:
    """``torch._cslt_compress`` of the weight and of its transpose."""

    def __init__(self, mask: Tensor, dtype: torch.dtype) -> None:
        pass  # the pattern is read from the zeros of the values

    def compress(self, weight: Tensor) -> Compressed:
        return Compressed(
            tuple(weight.shape), torch._cslt_compress(weight), torch._cslt_compress(weight.t().contiguous())
        )


def backend(device: torch.device) -> type[Cutlass] | type[CuSparseLt] | str:
    """What compresses and multiplies on this device, or why nothing does."""
    if device.type != "cuda":
        return f"torch's 2:4 operators run on CUDA, not on {device.type}"
    if torch.version.hip:
        return "torch's 2:4 operators are tried on NVIDIA GPUs alone"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return Cutlass
    if major < 8:
        return f"2:4 needs compute capability 8.0, and this GPU has {major}.{minor}"
    if not torch.backends.cusparselt.is_available():
        return f"compute capability {major}.{minor} needs cuSPARSELt, and this torch was built without it"
    return CuSparseLt


def why_not(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a weight of this ``[out, in]`` shape cannot run as 2:4 there; None when it can."""
    found = backend(device)
    if isinstance(found, str):
        return found
    if dtype not in DTYPES:
        return f"2:4 runs in float16 or bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if any(size % SIDE or not size for size in shape):
        return f"2:4 takes features in multiples of {SIDE}, not {shape[1]} to {shape[0]}"
    return None


def is_transposable(mask: Tensor, n: int = 2, m: int = 4) -> bool:
    """Whether a bool matrix keeps at most n of every m consecutive weights along its rows and along its columns."""
    rows, cols = mask.shape
    high, wide = -(-rows // m), -(-cols // m)
    padded = mask.new_zeros(high * m, wide * m)
    padded[:rows, :cols] = mask
    along = padded.view(high * m, wide, m).sum(2), padded.view(high, m, wide * m).sum(1)
    return all(int(counts.amax()) <= n if counts.numel() else True for counts in along)
