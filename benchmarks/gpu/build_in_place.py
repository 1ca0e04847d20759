"""Builds the extension in place with the Python that runs this, installing nothing, from nothing but what it has.

    python benchmarks/gpu/build_in_place.py

Afterwards the checkout on PYTHONPATH is a whole package: pysparse_ticket/kernels is a link, the metadata is beside it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def link_kernels() -> None:
    link = ROOT / "pysparse_ticket" / "kernels"
    if not link.exists():
        link.symlink_to(Path("..") / "kernels", target_is_directory=True)


def setup_py(folder: Path, *commands: str) -> int:
    jobs = {"MAX_JOBS": os.environ.get("MAX_JOBS") or str(min(16, os.cpu_count() or 1))}
    return subprocess.run([sys.executable, "setup.py", *commands], cwd=folder, env=os.environ | jobs).returncode


def build_apart() -> int:
    """For a setuptools that cannot read pyproject.toml: setup.py alone, beside links to the sources."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("csrc", "kernels"):
            (folder / part).symlink_to(ROOT / part, target_is_directory=True)
        (folder / "pysparse_ticket").mkdir()
        (folder / "pysparse_ticket" / "__init__.py").touch()
        shutil.copyfile(ROOT / "setup.py", folder / "setup.py")
        code = setup_py(folder, "build_ext", "--inplace")
        for built in (folder / "pysparse_ticket").glob("_C*"):
            shutil.copyfile(built, ROOT / "pysparse_ticket" / built.name)
        return code


def main() -> None:
    link_kernels()
    built = setup_py(ROOT, "build_ext", "--inplace") == 0 or build_apart() == 0
    setup_py(ROOT, "-q", "egg_info")
    check = "from pysparse_ticket.backends import summary; print(*(f'{a}: {b}' for a, b in summary()), sep='; ')"
    shown = subprocess.run([sys.executable, "-c", check], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    raise SystemExit(0 if built and shown.returncode == 0 else 1)


if __name__ == "__main__":
    main()
