"""Settings of the whole suite, made before torch is imported."""

import os
import subprocess
import sys

import pytest

# some virtual machines advertise AMX and fault on its first use: torch's own bf16 products then kill the process
_PROBE = "import torch; a = torch.ones(64, 64, dtype=torch.bfloat16); a @ a"
if subprocess.run([sys.executable, "-c", _PROBE], capture_output=True).returncode < 0:
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


@pytest.fixture(autouse=True)
def plan_cache(tmp_path_factory, monkeypatch):
    """Races of the tests stay out of the user's cache."""
    monkeypatch.setenv("PYSPARSE_TICKET_CACHE", str(tmp_path_factory.getbasetemp() / "plans"))
