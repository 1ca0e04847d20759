"""``pysparse-ticket info``."""

from __future__ import annotations

import importlib.metadata
import platform

import numpy
import torch
from rich.table import Table

from .. import __version__
from ..backends import cpu_features, summary
from ..report import machine
from .terminal import console


def info() -> None:
    """Versions, CPU features, GPU, and each backend with why it is or is not available."""
    facts = machine()
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = [
        ("pysparse-ticket", f"{__version__}, revision {facts['revision'] or 'unknown'}"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("numpy", numpy.__version__),
        ("triton", _version("triton")),
        ("cpu", f"{facts['cpu']}, {facts['threads']} threads; {', '.join(cpu_features()) or 'no AVX'}"),
        ("gpu", facts["gpu"] or "none visible"),
        *summary(),
    ]
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
