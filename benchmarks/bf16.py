"""Keeps torch's bf16 products from killing the process; before the first product, no torch is imported here."""

from __future__ import annotations

import os
import subprocess
import sys

PROBE = "import torch; a = torch.ones(64, 64, dtype=torch.bfloat16); a @ a"


def avoid_broken_amx() -> None:
    """Some virtual machines advertise AMX and fault on its first use: there oneDNN is held to AVX512_CORE_BF16."""
    if "ONEDNN_MAX_CPU_ISA" in os.environ:
        return
    if subprocess.run([sys.executable, "-c", PROBE], capture_output=True).returncode < 0:
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
