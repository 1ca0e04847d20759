"""The line that every stored figure carries."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

from ..planner import cpu_model


def machine() -> dict[str, str | int | None]:
    """CPU, threads, GPU, versions, git revision (None outside a checkout) and the date."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "package": importlib.metadata.version("pysparse-ticket"),
        "revision": revision(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def machine_line(facts: dict | None = None) -> str:
    facts = facts or machine()
    where = facts["gpu"] or f"{facts['cpu']}, {facts['threads']} threads"
    return f"{where}; torch {facts['torch']}, python {facts['python']}, revision {facts['revision']}, {facts['date']}"


def revision() -> str | None:
    """The checkout's commit, with "+" when files differ from it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, timeout=10).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
