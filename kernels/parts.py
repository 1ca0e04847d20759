"""What the kernels of several ops have in common: products, mask bits, pixels, and the memory that images lie in."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# triton's interpreter multiplies the bits of bfloat16 numbers
WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y"))
OPTIONS = {"enable_fp_fusion": True}  # triton 3.9 warns where it is left to a default that changes


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr):
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def coordinates(m, height, width):
    """Number m of images of this height and width to its (image, row, column)."""
    column = m % width
    rest = m // width
    return rest // height, rest % height, column


@triton.jit
def mask_of(bits, part, rows, cols, BN: tl.constexpr, BK: tl.constexpr):
    """bool, of the shape that ``rows`` and ``cols`` broadcast to: which weights of partial tile ``part`` survive."""
    WORDS: tl.constexpr = (BK + 31) // 32
    word = tl.load(bits + part.to(tl.int64) * (BN * WORDS) + rows * WORDS + cols // 32)
    return ((word >> (cols % 32)) & 1) != 0


@triton.jit
def put_group(
    acc, out, tile, there, number, tiles, partial, bits, k, n,
    BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Neighbouring tiles of a weight gradient, one below the other in ``acc [tiles * BK, BN]``: masked into their
    places or, of a gradient that is split, as they are into the sums that ``sum_splits`` adds up.

    tile, there, k  of each row of acc: its tile, whether there is such a tile, its column in it; n  ``[BN]``
    """
    at = tile.to(tl.int64)[:, None] * (BN * BK) + n[None, :] * BK + k[:, None]
    if SPLIT == 1:
        part = tl.load(partial + tile, mask=there, other=-1)[:, None]
        WORDS: tl.constexpr = (BK + 31) // 32
        word_at = part.to(tl.int64) * (BN * WORDS) + n[None, :] * WORDS + k[:, None] // 32
        word = tl.load(bits + word_at, mask=part >= 0, other=-1)
        acc = tl.where(((word >> (k[:, None] % 32)) & 1) != 0, acc, 0.0)
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=there[:, None])
    else:
        tl.store(out + number.to(tl.int64) * tiles * (BN * BK) + at, acc, mask=there[:, None])


@dataclass(frozen=True)
class Device:
    multiprocessors: int
    descriptors: bool  # whether it copies tiles by descriptor (sm_90 and later)
    name: str


@cache
def device_of(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(3, True, "interpreter")
    facts = torch.cuda.get_device_properties(device)
    return Device(facts.multi_processor_count, facts.major >= 9, f"{facts.name} sm_{facts.major}{facts.minor}")


def conv_precision(dtype: torch.dtype) -> str:
    """Of products; torch's setting for convolutions decides about float32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def channels_last(t: Tensor) -> Tensor:
    """With channels innermost, whatever the other strides."""
    return t if t.stride(1) == 1 else t.contiguous(memory_format=torch.channels_last)


def pixel_strides(t: Tensor) -> tuple[int, int, int]:
    """Of image, row and column."""
    return t.stride(0), t.stride(2), t.stride(3)


def new_image(like: Tensor, size: tuple[int, ...]) -> Tensor:
    """Channels_last; holds anything."""
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
