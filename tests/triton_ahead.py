"""Compiles the Triton kernels that walk tiles for a GPU that need not be there, and says what came out.

``python tests/triton_ahead.py [90 80]`` prints the table of docs/gpu.md. Run without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import ahead_of_time
import torch
import triton

from pysparse_ticket.ops.library import kernel_module
from pysparse_ticket.ops.tile_mask import _group

kernels, conv_kernels = kernel_module("masked_linear"), kernel_module("masked_conv2d_tiles")
configs = kernel_module("tile_configs")
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ODD = {"tiles", "entries", "T", "out_rows", "spin", "programs", "n_items", "chunk"}  # no multiples of 16


def compiled(fn, signature: dict, constants: dict, config, arch: int) -> dict:
    facts = ahead_of_time.compiled(fn, signature, constants, arch, config.warps, config.stages, ODD)
    return facts | {"resident": config.resident}


def matmul(config, tile, dtype, precision, described, arch, transposed=False, activation=None) -> dict:
    (side, depth), name = tile, NAMES[dtype]
    step = min(depth, 64 if dtype.itemsize == 2 else 32)
    box = (step, side) if transposed else (side, step)
    piece = f"tensordesc<{name}[{config.block}, {side // config.pieces}]>"
    operands = {
        "x": f"tensordesc<{name}[{config.block}, {step}]>",
        "w": f"tensordesc<{name}[{box[0]}, {box[1]}]>",
        "y": piece,
        "z": piece,
    }
    operands = operands if described else dict.fromkeys(operands, f"*{name}")
    constants = {
        "BM": config.block,
        "BO": side,
        "BR": depth,
        "BK": step,
        "TRANSPOSED": transposed,
        "HAS_BIAS": not transposed,
        "ACTIVATION": activation,
        "KEEP": activation == "gelu",
        "PIECES": config.pieces,
        "PRECISION": precision,
        "DESC": described,
    }
    signature = operands | {"bias": f"*{name}", "walk": "*i32"}
    what = f"{'input gradient' if transposed else activation or 'forward'} {name} {side}x{depth}, {config.block} tokens"
    return {"what": what} | compiled(kernels.matmul_tiles, signature, constants, config, arch)


def weight_grad(config, tile, dtype, precision, described, arch, split=4) -> dict:
    (bn, bk), name = tile, NAMES[dtype]
    constants = {"BT": config.block, "BN": bn, "BK": bk, "SPLIT": split, "PRECISION": precision}
    lists = dict.fromkeys(("items", "col", "partial", "bits"), "*i32")
    signature = lists | {"out": "*fp32" if split > 1 else f"*{name}", "bias_out": "*fp32"}
    fn, constants["GROUP"] = kernels.weight_grad_boxes, _group(bk)
    if described:
        signature |= {
            "x": f"tensordesc<{name}[{config.block}, {bk}]>",
            "dy": f"tensordesc<{name}[{config.block}, {bn}]>",
        }
    else:
        fn = kernels.weight_grad_gather
        signature |= {"x": f"*{name}", "dy": f"*{name}"}
    what = f"weight gradient {name} {bn}x{bk}, {config.block} tokens"
    return {"what": what} | compiled(fn, signature, constants, config, arch)


def conv(config, tile, dtype, precision, arch, transposed=False) -> dict:
    (side, depth), name = tile, NAMES[dtype]
    constants = {"BM": config.block, "BO": side, "BR": depth, "BK": min(depth, 64 if dtype.itemsize == 2 else 32)}
    constants |= {"TRANSPOSED": transposed, "BIAS": not transposed, "PRECISION": precision}
    types = dict.fromkeys(("x", "w", "bias", "y"), f"*{name}") | {"walk": "*i32"}
    direction = "input gradient" if transposed else "forward"
    what = f"convolution {direction} {name} {side}x{depth}, {config.block} pixels"
    return {"what": what} | compiled(conv_kernels.conv_tiles, types, constants, config, arch)


def conv_weight_grad(config, tile, dtype, precision, arch, split=4) -> dict:
    (bn, bk), name = tile, NAMES[dtype]
    constants = {"BT": config.block, "BN": bn, "BK": bk, "GROUP": _group(bk), "SPLIT": split, "PRECISION": precision}
    types = {"x": f"*{name}", "dy": f"*{name}", "out": "*fp32" if split > 1 else f"*{name}"}
    types |= dict.fromkeys(("items", "walk", "partial", "bits"), "*i32")
    what = f"convolution weight gradient {name} {bn}x{bk}, {config.block} pixels"
    return {"what": what} | compiled(conv_kernels.conv_weight_grad, types, constants, config, arch)


def small(fn, arch, **constants) -> dict:
    signature = {"values": "*fp32", "sums": "*fp32", "out": "*bf16", "partial": "*i32", "bits": "*i32"}
    config = configs.Config(1, 4, 3)
    return {"what": fn.__name__} | compiled(fn, signature, {"BN": 128, "BK": 128} | constants, config, arch)


def every(arch: int) -> Iterator[dict]:
    """Each kernel with each configuration that may be chosen for square tiles; below sm_90 the first ones."""
    half, single = torch.bfloat16, torch.float32
    hopper = arch >= 90
    for kernel, compile_one in (("matmul", matmul), ("weight_grad", weight_grad)):
        for side in (128, 64, 32, 16):
            described = hopper and (kernel == "matmul" or side >= 64)
            for config in configs.candidates(kernel, side, half, "tf32", described, 8192)[: None if hopper else 1]:
                yield compile_one(config, (side, side), half, "tf32", described, arch)
        for precision in ("tf32", "ieee") if hopper else ("tf32",):
            described = hopper and kernel == "matmul"
            config = configs.candidates(kernel, 128, single, precision, described, 8192)[0]
            yield compile_one(config, (128, 128), single, precision, described, arch)
    first = configs.candidates("weight_grad", 128, half, "tf32", hopper, 8192)[0]
    yield weight_grad(first, (128, 64), half, "tf32", hopper, arch, split=1)
    first = configs.candidates("matmul", 128, half, "tf32", hopper, 8192)[0]
    yield matmul(first, (128, 128), half, "tf32", hopper, arch, transposed=True)
    yield matmul(first, (128, 128), half, "tf32", hopper, arch, activation="gelu")
    for side in (128, 64, 32, 16):
        for config in configs.candidates("conv", side, half, "ieee", False, 8192)[: None if hopper else 1]:
            yield conv(config, (side, side), half, "ieee", arch)
        for config in configs.candidates("conv_weight_grad", side, half, "ieee", False, 8192)[: None if hopper else 1]:
            yield conv_weight_grad(config, (side, side), half, "ieee", arch)
    first = configs.candidates("conv", 64, half, "ieee", False, 8192)[0]
    yield conv(first, (64, 64), half, "ieee", arch, transposed=True)
    for side, precision in ((128, "tf32"), (64, "tf32"), (64, "ieee"))[: None if hopper else 2]:
        for kernel, compile_one in (("conv", conv), ("conv_weight_grad", conv_weight_grad)):
            config = configs.candidates(kernel, side, single, precision, False, 8192)[0]
            yield compile_one(config, (side, side), single, precision, arch)
    yield small(kernels.mask_tiles, arch, TRANSPOSE=False)
    yield small(kernels.sum_splits, arch, SPLIT=4)


def main(arches: list[int]) -> None:
    head = ("kernel", "sm", "warps", "registers", "shared KB", "buffers", "residents", "matrix instruction", "copies")
    print(f"triton {triton.__version__}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for facts in (facts for arch in arches for facts in every(arch)):
        instruction = ", ".join(facts["wgmma"]) or ("mma.sync" if facts["mma"] else "none")
        copies = "descriptor" if facts["bulk_copies"] else "cp.async" if facts["async_copies"] else "plain"
        cells = (
            *(facts[key] for key in ("what", "arch", "warps", "registers")),
            facts["shared"] // 1024,
            *(facts["buffers"], facts["resident"], instruction, copies),
        )
        print("| " + " | ".join(map(str, cells)) + " |" + (" SPILLS" if facts["spilled"] else ""), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--json"]:
        print(json.dumps([facts for arch in map(int, sys.argv[2:]) for facts in every(arch)]))
    else:
        main([int(arch) for arch in sys.argv[1:]] or [90, 80])
