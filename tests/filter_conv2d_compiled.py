"""Compiles every kernel of filter_conv2d for one architecture and prints as JSON what became of it."""

import json
import sys

import torch
from ahead_of_time import compiled

from pysparse_ticket.ops.library import kernel_module

kernels = kernel_module("filter_conv2d")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CASES = (("bf16", 64, False), ("bf16", 256, False), ("bf16", 256, True), ("fp32", 16, False), ("fp32", 256, False))
POINTERS = ("x", "w", "bias", "y", "grad", "out")
SIZES = ("H", "W", "OH", "OW", "M", "N", "each")
GEOMETRY = {"KH": 3, "KW": 3, "TAPS": 9, "SH": 1, "SW": 1, "PH": 1, "PW": 1, "DH": 1, "DW": 1}


def build(arch: int, name: str, dtype: str, channels: int, gather: bool) -> dict[str, object]:
    """One kernel at the tile that its launcher takes for so many channels in and out."""
    kernel = getattr(kernels, name)
    tiles = kernels._gradient_tiles if name == "_weight_gradient" else kernels._tiles
    tile = tiles(channels, channels, DTYPES[dtype], gather)
    options = {option: tile.pop(option) for option in ("num_warps", "num_stages")}
    constants = (
        GEOMETRY
        | tile
        | {"STEP_H": 1, "STEP_W": 1}
        | {"PRECISION": "tf32" if dtype == "fp32" else "ieee", "BIAS": True, "STATS": True}
    )
    constants |= dict.fromkeys(("GATHER", "SCATTER", "GATHER_X", "GATHER_G"), gather)
    if not gather:
        constants |= {"in_index": None, "out_index": None}
    types = dict.fromkeys(POINTERS, f"*{dtype}") | {"parts": "*fp32", "in_index": "*i64", "out_index": "*i64"}
    if name == "_weight_gradient":
        types["out"] = "*fp32"
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    return compiled(kernel, types, constants, arch, options["num_warps"], options["num_stages"], SIZES)


def main() -> None:
    found = []
    for name in ("_forward", "_input_gradient", "_weight_gradient"):
        for dtype, channels, gather in CASES:
            case = {"dtype": dtype, "channels": channels, "gather": gather}
            found.append(case | build(int(sys.argv[1]), name, dtype, channels, gather))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
