"""Compiles a Triton kernel for a GPU that need not be there, and reads what the compiler made of it.

Kernels are decorated for the interpreter, as in the tests, or for the compiler: a program that compiles runs by itself.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path


def facts_from(program: str, *words: object) -> list[dict]:
    """What a program of this folder prints last, as JSON: one entry a kernel."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    here = Path(__file__).parent
    env["PYTHONPATH"] = os.pathsep.join([str(here.parent), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, here / program, *map(str, words)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def compiled(fn, types: dict, constants: dict, arch: int, warps: int, stages: int, odd: Collection[str] = ()) -> dict:
    """``types`` {argument: Triton type, "i32" if absent}, ``constants`` {constexpr or None argument: value}, ``odd``
    those that need be no multiples of 16, beside those that the kernel is not specialized on."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = fn.arg_names
    odd = {*odd, *(p.name for p in fn.params if p.do_not_specialize)}
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, a in enumerate(names)
        if a not in constants and a not in odd and not signature[a].startswith("tensordesc")
    }
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    source = ASTSource(fn, signature, constants, aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx, report = kernel.asm["ptx"], _ptxas(kernel.asm["ptx"], arch)
    buffers = re.findall(r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x\d+x\d+x[bf]", kernel.asm["ttgir"])
    loads = re.findall(r"\bld\.global\S*?\.v(\d)\.b(\d+)", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+|\d+),", ptx)
    return {
        "kernel": fn.__name__,
        "arch": arch,
        "warps": warps,
        "stages": stages,
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report))),
        "serialized": "wgmma.mma_async instructions are serialized" in report,
        "shared": kernel.metadata.shared,
        "wgmma": sorted(set(re.findall(r"wgmma\.mma_async\S*?\.(m64n\d+k\d+)", ptx))),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "bulk_copies": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        "async_copies": len(re.findall(r"cp\.async\.c[ag]", ptx)),
        "copy_bytes": sorted({int(size, 0) for size in copies}),
        "load_bytes": max((int(n) * int(bits) // 8 for n, bits in loads), default=0),
        "in_flight": max(map(int, re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)), default=0),
        "buffers": max(map(int, buffers), default=0),
    }


def _ptxas(ptx: str, arch: int) -> str:
    """What the assembler reports: registers, spills, matrix instructions that it had to run one after another."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        name = "sm_90a" if arch == 90 else f"sm_{arch}"
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", source, "-o", Path(folder) / "kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        return done.stderr
