"""What a figure taken on a GPU depends on beside the code."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from pathlib import Path

import torch

DRIVER = Path("/proc/driver/nvidia/version")


@functools.cache
def gpu_facts(index: int = 0) -> dict[str, str]:
    """gpu, capability, driver, cuda and triton of torch's GPU ``index``, each "unknown" where it cannot be read.

    RuntimeError when torch sees no GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    return {
        "gpu": torch.cuda.get_device_name(index),
        "capability": "sm_{}{}".format(*torch.cuda.get_device_capability(index)),
        "driver": driver_version(),
        "cuda": torch.version.cuda or "unknown",
        "triton": _version("triton"),
    }


def driver_version() -> str:
    """Of the NVIDIA driver, from NVML or else from the kernel's own line."""
    try:
        import pynvml

        pynvml.nvmlInit()
        found = pynvml.nvmlSystemGetDriverVersion()
        return found.decode() if isinstance(found, bytes) else found
    except Exception:  # the module may be absent, older, or find no library; each has its own error
        pass
    try:
        found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", DRIVER.read_text())
    except OSError:
        found = None
    return found.group(1) if found else "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
