"""What this installation can run, and why a backend is not there."""

from __future__ import annotations

from pathlib import Path

import torch

from .ops.library import CPU_ERROR, CUDA_ERROR, cpu_isa, triton_error

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
    return {"reference": None, "cpu": CPU_ERROR, "triton": triton_error(), "cuda": CUDA_ERROR}


def summary() -> list[tuple[str, str]]:
    """Rows for ``pysparse-ticket info``."""
    built = {"cpu": lambda: f", runs {cpu_isa()}", "cuda": lambda: f", for {torch.ops.pysparse_ticket.cuda_arch()}"}
    rows = [(name, reason or "available" + built.get(name, str)()) for name, reason in backends().items()]
    return [
        (f"backend {name}", text if text.startswith("available") else f"not available: {text}") for name, text in rows
    ]
