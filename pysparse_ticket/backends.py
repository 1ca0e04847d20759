"""What this installation can run, and why a backend is not there."""

from __future__ import annotations

from pathlib import Path

import torch

from .ops.library import BACKENDS, cpu_isa, interpreted, why_missing

CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_bf16")


def cpu_features() -> list[str]:
    """Those of the CPU flags that matter to the kernels which this machine names."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    present = set(line.split())
    return [flag for flag in CPU_FLAGS if flag in present]


def backends() -> dict[str, str | None]:
    """{backend: None if it is there, else the reason why not}."""
    return {name: why_missing(name) for name in BACKENDS}


def summary() -> list[tuple[str, str]]:
    """Rows for ``pysparse-ticket info``."""
    return [
        (f"backend {name}", f"not available: {reason}" if reason else f"available{_how(name)}")
        for name, reason in backends().items()
    ]


def _how(backend: str) -> str:
    if backend == "cpu":
        return f", runs {cpu_isa()}"
    if backend == "cuda":
        return f", built for {torch.ops.pysparse_ticket.cuda_arch()}"
    if backend == "triton" and interpreted():
        return ", in triton's interpreter, on CPU tensors"
    return f", on {torch.cuda.get_device_name()}" if backend == "triton" else ""
