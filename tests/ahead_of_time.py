"""Compile a Triton kernel for a GPU that is not there, and read what the compiler made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Compiled:
    """What one kernel became; ``stack`` is bytes a thread, where spilled registers go."""

    ptx: str
    registers: int
    stack: int
    shared: int

    @property
    def wgmma(self) -> set[str]:
        return set(re.findall(r"wgmma\.mma_async\S*?\.(m64n\d+k\d+)", self.ptx))

    @property
    def copies(self) -> set[int]:
        """Sizes in bytes of the asynchronous copies to shared memory."""
        return {int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+|\d+),", self.ptx)}


def compile_for(arch: int, kernel, types: dict[str, str], constants: dict[str, object], aligned, **options) -> Compiled:
    """``types`` {argument: Triton type}, ``constants`` {constexpr or None argument: value}, ``aligned`` the arguments
    that are known to be multiples of 16; options are num_warps and num_stages. Run it with TRITON_INTERPRET=0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in constants},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # triton 3.9 announces another default for fused multiply-adds
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Compiled(made.asm["ptx"], registers, stack, made.metadata.shared)
