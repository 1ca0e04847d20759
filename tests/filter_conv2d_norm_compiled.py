"""Compiles every kernel behind filter_conv2d for one architecture and prints as JSON what became of it."""

import json
import sys

from ahead_of_time import compiled

from pysparse_ticket.ops.library import kernel_module

convolution, kernels = kernel_module("filter_conv2d"), kernel_module("filter_conv2d_norm")
CHANNELS = (16, 64, 256)
GATES = ("none", "y", "z")
POINTERS = ("y", "z", "grad", "residual", "gated", "out")
SIZES = ("M", "each", "blocks", "pixels")


def build(kernel, dtype: str, entries: int, arch: int, channels: int, **constants: object) -> dict[str, object]:
    tile = kernels._tile(channels, entries)
    warps = tile.pop("num_warps")
    types = dict.fromkeys(POINTERS, f"*{dtype}") | {"eps": "fp32"}
    types |= dict.fromkeys(("mean", "var", "weight", "bias", "parts", "sums"), "*fp32")
    constants = {"WEIGHT": True, "BIAS": True} | tile | constants
    return {"dtype": dtype} | compiled(kernel, types, constants, arch, warps, 3, SIZES)


def main(arch: int) -> None:
    found = []
    for dtype in ("bf16", "fp32"):
        for channels in CHANNELS if dtype == "bf16" else CHANNELS[2:]:
            options = {"RESIDUAL": True, "RELU": True}
            found.append(build(kernels._forward, dtype, kernels.ENTRIES, arch, channels, **options))
        for gate in GATES if dtype == "bf16" else GATES[2:]:
            options = {"GATE": gate, "WRITE": gate == "z"}
            found.append(build(kernels._sums, dtype, kernels.SUM_ENTRIES, arch, 256, **options))
            options = {"GATE": gate, "BATCH": True}
            found.append(build(kernels._gradient, dtype, kernels.ENTRIES, arch, 256, **options))
    types = {"parts": "*fp32", "found": "*fp32"}
    for blocks in (16, 512):
        found.append(compiled(convolution._join, types, {"BB": blocks, "BN": 8}, arch, 4, 3, SIZES))
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
