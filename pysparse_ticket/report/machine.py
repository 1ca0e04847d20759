"""The line that every stored figure carries."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

from ..measure import gpu_facts
from ..planner import cpu_model


def machine() -> dict[str, str | int | None]:
    """CPU, threads, GPU and its driver (None without one), versions, git revision (None where unknown), date."""
    gpu = gpu_facts() if torch.cuda.is_available() else {}
    return {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "gpu": gpu.get("gpu"),
        "driver": gpu.get("driver"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": gpu.get("triton"),
        "package": package_version(),
        "revision": revision(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def machine_line(facts: dict | None = None) -> str:
    facts = facts or machine()
    if facts["gpu"]:
        where = f"{facts['gpu']}, driver {facts.get('driver')}; triton {facts.get('triton')}"
    else:
        where = f"{facts['cpu']}, {facts['threads']} threads"
    return f"{where}; torch {facts['torch']}, python {facts['python']}, revision {facts['revision']}, {facts['date']}"


def package_version() -> str | None:
    """None for a checkout that was built in place and never installed."""
    try:
        return importlib.metadata.version("pysparse-ticket")
    except importlib.metadata.PackageNotFoundError:
        return None


def revision() -> str | None:
    """The checkout's commit, with "+" when files differ from it, stored results apart; None where git cannot say."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", root, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):  # no git, not its owner, or a slow disk
        return None
