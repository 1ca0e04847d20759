"""Loads the compiled ops and says which backends are there.

Schemas live in ``csrc/ops.cpp``. When the extension cannot be loaded the reason is kept, the ``reference`` backend
still works, and asking for another one raises with that reason: nothing falls back in silence.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, ModuleType

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


def _why_no_cuda() -> str | None:
    if CPU_ERROR:
        return CPU_ERROR
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible" if torch.version.cuda else "this torch is a CPU build"
    if not hasattr(torch.ops.pysparse_ticket, "cuda_arch"):
        return "the extension was built without CUDA; reinstall with nvcc at hand"
    return None


CUDA_ERROR: str | None = _why_no_cuda()
_CUDA_OPS = frozenset([] if CUDA_ERROR else torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"))


def on_cuda(op: str) -> bool:
    """Whether the ``cuda`` backend runs here and has a kernel of ``op``."""
    return f"{NAMESPACE}::{op}" in _CUDA_OPS


def cpu_isa(name: str = "?") -> str:
    """The instruction set of the C++ kernels: ``"?"`` asks, a name (portable, avx2, avx512) sets, ``""`` resets."""
    if CPU_ERROR:
        raise RuntimeError(f"no cpu backend: {CPU_ERROR}")
    return torch.ops.pysparse_ticket.cpu_isa(name)


PACKAGE = __name__.partition(".")[0]
BACKENDS = ("reference", "cpu", "triton", "cuda")
_ON_GPU = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "triton": _ON_GPU, "cuda": _ON_GPU}
_forced: str | None = None
_ran: dict[str, str] = {}


def why_missing(backend: str) -> str | None:
    """Why ``backend`` cannot run here; None when it can. ValueError for an unknown name."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    if backend == "triton":
        return _no_triton()
    return {"cpu": CPU_ERROR, "cuda": CUDA_ERROR}.get(backend)


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _no_triton() -> str | None:
    if CPU_ERROR:
        return CPU_ERROR  # the schemas are in the extension
    if not _installed("triton"):
        return "triton is not installed"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible; the kernels run on CPU tensors under TRITON_INTERPRET=1 alone"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"the GPU's compute capability is {major}.{minor}; the kernels need 8.0"


def kernel_module(name: str) -> ModuleType:
    """A module of ``kernels/``, imported when an op first needs it: importing triton takes a second."""
    package = sys.modules[PACKAGE]
    root = Path(package.__file__).parent.parent
    inside = Path(package.__file__).parent / "kernels"
    if not inside.is_dir() and (root / "kernels" / f"{name}.py").is_file() and str(root) not in package.__path__:
        package.__path__.append(str(root))  # run from a source tree, where kernels/ lies beside the package
    return importlib.import_module(f"{PACKAGE}.kernels.{name}")


def register_triton(
    op: str,
    run: Callable,
    run_backward: Callable,
    fake: Callable,
    fake_backward: Callable,
    backward: Callable,
    setup: Callable,
) -> None:
    """The op and ``<op>_backward``, whose schemas csrc/ops.cpp has, on Triton: on CPU tensors under its interpreter."""
    if CPU_ERROR is not None:  # no schemas
        return
    for name, launch, shapes in ((op, run, fake), (f"{op}_backward", run_backward, fake_backward)):
        torch.library.impl(f"{NAMESPACE}::{name}", ("CUDA", "CPU"))(launch)
        torch.library.register_fake(f"{NAMESPACE}::{name}", shapes)
    torch.library.register_autograd(f"{NAMESPACE}::{op}", backward, setup_context=setup)


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


def choose_backend(
    op: str, backend: str | None, tensor: torch.Tensor, own: Mapping[str, str] = MappingProxyType({"cpu": "cpu"})
) -> str:
    """The backend that ``op`` runs on: the one asked for, else its own one for the tensor's device, if that takes the
    dtype, else ``reference``.

    own  {device type: backend} of the op's kernels. One that cannot run here warns once; asked for by name it raises.
    """
    name, tracing = backend or _forced, torch.compiler.is_compiling()
    if name:
        name = name if tracing else _checked(name)
        if name not in ("reference", *own.values()):
            raise RuntimeError(f"{op} has no {name} backend, only reference, {', '.join(own.values())}")
        if name in ("cpu", "cuda") and tensor.device.type != name:
            raise RuntimeError(f"{op} cannot run on the {name} backend: the tensor is on {tensor.device}")
    else:
        name = own.get(tensor.device.type, "reference")
        if name != "reference" and tensor.dtype not in DTYPES[name]:
            name = "reference"
        elif reason := None if tracing and name == "triton" else why_missing(name):
            warnings.warn(f"{op} runs on the reference backend: {reason}", RuntimeWarning, stacklevel=3)
            name = "reference"
    if not tracing:
        _ran[op] = name
    return name


def backend_of(op: str) -> str | None:
    """The backend that the last eager call of ``op`` (such as ``"masked_linear"``) ran on; None before the first."""
    return _ran.get(op)
