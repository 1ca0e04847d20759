"""Loads the compiled ops and says which backends are there.

Schemas live in ``csrc/ops.cpp``. When the extension cannot be loaded the reason is kept, the ``reference`` backend
still works, and asking for another one raises with that reason: nothing falls back in silence.
"""

from __future__ import annotations

from pathlib import Path

import torch

NAMESPACE = "pysparse_ticket"


def _load() -> str | None:
    """Load ``_C``; the reason when that fails, else None."""
    found = sorted(Path(__file__).parent.parent.glob("_C*.so")) + sorted(Path(__file__).parent.parent.glob("_C*.pyd"))
    if not found:
        return "the extension pysparse_ticket._C was not built; reinstall with a C++ compiler at hand"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} does not load: {error}"
    return None


CPU_ERROR: str | None = _load()


def cpu_isa(name: str = "?") -> str:
    """The instruction set of the C++ kernels: ``"?"`` asks, a name (portable, avx2, avx512) sets, ``""`` resets."""
    if CPU_ERROR:
        raise RuntimeError(f"no cpu backend: {CPU_ERROR}")
    return torch.ops.pysparse_ticket.cpu_isa(name)
