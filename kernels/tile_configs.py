"""How the kernels of ``masked_linear.py`` and ``masked_conv2d_tiles.py`` are launched, by tile, element type and GPU.

Registers and shared memory of these entries are in docs/gpu.md, from the compiler; the order within a list is an
estimate, not measured yet. The first that fits runs where nothing may be timed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """block: tokens of an output tile, or of a step of the weight gradient; pieces: parts of the output tile that pass
    through shared memory one after another; resident: programs a multiprocessor."""

    block: int
    warps: int
    stages: int
    pieces: int = 1
    resident: int = 1


# {side of the output tile: candidates}, 16-bit elements by descriptors. 256 x 128 does 85 operations a byte from L2 and
# fills a multiprocessor; 128 x 128 fits twice, so that one's epilogue hides behind the other's steps.
MATMUL = {
    128: [Config(256, 8, 4, 2), Config(256, 8, 3), Config(128, 4, 3, 2, 2), Config(128, 8, 3, 2, 2)],
    64: [Config(256, 8, 4), Config(256, 8, 2, 1, 2), Config(128, 4, 3, 1, 2)],
    32: [Config(256, 8, 4, 1, 2), Config(128, 4, 4, 1, 4)],
    16: [Config(256, 8, 4, 1, 2), Config(128, 4, 4, 1, 4)],
}
# by pointers: sm_80, and rows that are no multiple of 16 bytes
MATMUL_POINTERS = {128: [Config(128, 8, 3)]} | {side: [Config(128, 4, 3, 1, 2)] for side in (64, 32, 16)}
MATMUL_FLOAT = {side: [Config(128, 8 if side > 64 else 4, 3, 1)] for side in MATMUL}
# multiply-adds without matrix instructions keep their operands in registers
MATMUL_STRICT = {side: [Config(32, 8, 2)] for side in MATMUL}

# {longer side of the tile}; two steps of 40 KB cover the latency of L2 where the tiles are 64 wide
WEIGHT_GRAD = {
    128: [Config(64, 8, 4), Config(64, 8, 3)],
    64: [Config(64, 4, 2, 1, 2), Config(64, 4, 5), Config(64, 8, 4)],
}
WEIGHT_GRAD_POINTERS = {
    128: [Config(32, 8, 3)],
    64: [Config(32, 8, 3)],
    32: [Config(32, 4, 4, 1, 2), Config(64, 8, 4)],
    16: [Config(64, 4, 4, 1, 2), Config(64, 4, 3)],
}
WEIGHT_GRAD_FLOAT = {128: [Config(32, 8, 3)]} | {side: [Config(32, 4, 3)] for side in (64, 32, 16)}
WEIGHT_GRAD_STRICT = {side: [Config(16, 8, 2)] for side in MATMUL}

# Convolutions, through pointers, a program an output tile: several on a multiprocessor hide each other's beginnings and
# ends. ``block`` is pixels. 64 channels of 128 pixels on 4 warps take all 255 registers on sm_80, so 8 go first
CONV = {
    128: [Config(128, 8, 3), Config(128, 8, 4)],
    64: [Config(128, 8, 3), Config(256, 8, 3), Config(128, 4, 3)],
    32: [Config(128, 4, 4), Config(256, 8, 4)],
    16: [Config(128, 4, 4)],  # 8 warps have 2 bytes of the tile a thread, which cp.async does not copy
}
CONV_FLOAT = {side: [Config(128, 8 if side > 64 else 4, 3)] for side in MATMUL}
CONV_WEIGHT_GRAD = {
    128: [Config(32, 8, 3)],
    64: [Config(64, 8, 3), Config(32, 8, 3, 1, 2)],
    32: [Config(64, 8, 3), Config(32, 4, 3, 1, 2)],
    16: [Config(64, 4, 3, 1, 2)],
}
CONV_WEIGHT_GRAD_FLOAT = {128: [Config(16, 8, 3)]} | {side: [Config(32, 8, 3)] for side in (64, 32, 16)}
# {kernel: (16 bits by descriptors, 16 bits by pointers, TF32, strict float32)}
TABLES = {
    "matmul": (MATMUL, MATMUL_POINTERS, MATMUL_FLOAT, MATMUL_STRICT),
    "weight_grad": (WEIGHT_GRAD, WEIGHT_GRAD_POINTERS, WEIGHT_GRAD_FLOAT, WEIGHT_GRAD_STRICT),
    "conv": (None, CONV, CONV_FLOAT, MATMUL_STRICT),
    "conv_weight_grad": (None, CONV_WEIGHT_GRAD, CONV_WEIGHT_GRAD_FLOAT, WEIGHT_GRAD_STRICT),
}


def candidates(
    kernel: str, side: int, dtype: torch.dtype, precision: str, described: bool, tokens: int
) -> list[Config]:
    """The configurations to choose from, blocks far larger than the tokens left out."""
    column = 2 + (precision == "ieee") if dtype == torch.float32 else int(not described)
    table = TABLES[kernel][column][side]
    return [config for config in table if config.block < 2 * tokens or config.block <= 64] or [Config(64, 4, 3)]
