"""Loads the compiled ops and says which backends are there.

Schemas live in ``csrc/ops.cpp``. When the extension cannot be loaded the reason is kept, the ``reference`` backend
still works, and asking for another one raises with that reason: nothing falls back in silence.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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


BACKENDS = ("reference", "cpu", "triton")
_forced: str | None = None
_ran: dict[str, str] = {}


def why_missing(backend: str) -> str | None:
    """Why ``backend`` cannot run here; None when it can. ValueError for an unknown name."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    return CPU_ERROR if backend == "cpu" else None


def _checked(backend: str) -> str:
    if reason := why_missing(backend):
        raise RuntimeError(f"no {backend} backend: {reason}")
    return backend


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Within it every op without a ``backend=`` of its own runs on ``backend``; None leaves the choice to the op.

    RuntimeError with the reason when that backend cannot run here.
    """
    global _forced
    before, _forced = _forced, backend and _checked(backend)
    try:
        yield
    finally:
        _forced = before


def choose_backend(op: str, backend: str | None, tensor: torch.Tensor) -> str:
    """The backend that ``op`` runs on: the one asked for, else ``cpu`` for float32 and bfloat16 CPU tensors where the
    extension is there, else ``reference``. A missing extension warns once; asked for by name it raises."""
    name = backend or _forced
    if name:
        name = _checked(name)
    elif tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.bfloat16):
        name = "reference"
    elif CPU_ERROR:
        warnings.warn(f"{op} runs on the reference backend: {CPU_ERROR}", RuntimeWarning, stacklevel=3)
        name = "reference"
    else:
        name = "cpu"
    if not torch.compiler.is_compiling():
        _ran[op] = name
    return name


def backend_of(op: str) -> str | None:
    """The backend that the last eager call of ``op`` (such as ``"masked_linear"``) ran on; None before the first."""
    return _ran.get(op)
