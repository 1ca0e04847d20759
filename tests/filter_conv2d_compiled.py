"""Compiles every kernel of filter_conv2d for one architecture and prints what became of it, one JSON line each.

A program of its own: kernels are decorated either for the interpreter, as in the tests, or for the compiler.
"""

import json
import sys

import torch
from ahead_of_time import compile_for
from pysparse_ticket.kernels import filter_conv2d as kernels

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CASES = (("bf16", 64, False), ("bf16", 256, False), ("bf16", 256, True), ("fp32", 16, False), ("fp32", 256, False))
POINTERS = ("x", "w", "bias", "y", "grad", "out")
SIZES = ("H", "W", "OH", "OW", "M", "N", "each")
STRIDES = ("C", "OC", "x_n", "x_h", "x_w", "y_n", "y_h", "y_w", "w_o", "w_t", "g_n", "g_h", "g_w")
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
    types = dict.fromkeys(POINTERS, f"*{dtype}") | dict.fromkeys((*SIZES, *STRIDES), "i32")
    types |= {"parts": "*fp32", "in_index": "*i64", "out_index": "*i64"}
    if name == "_weight_gradient":
        types["out"] = "*fp32"
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    aligned = [arg for arg in kernel.arg_names if arg in types and arg not in SIZES]
    made = compile_for(arch, kernel, types, constants, aligned, **options)
    facts = {"registers": made.registers, "stack": made.stack, "shared": made.shared}
    return facts | {"wgmma": sorted(made.wgmma), "copies": sorted(made.copies)}


def main() -> None:
    arch = int(sys.argv[1])
    for name in ("_forward", "_input_gradient", "_weight_gradient"):
        for dtype, channels, gather in CASES:
            case = {"kernel": name, "dtype": dtype, "channels": channels, "gather": gather}
            print(json.dumps(case | build(arch, name, dtype, channels, gather)), flush=True)


if __name__ == "__main__":
    main()
