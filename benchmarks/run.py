"""Run every benchmark program and keep the rows in benchmarks/results/cpu.csv and cpu.md.

python benchmarks/run.py [name ...]      names as in bench_<name>.py, whose rows are replaced; all of them by default

Dense rivals compile and bf16 is timed. BENCH_OPTIONS in the environment is passed on to each program.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from record import from_csv, store

HERE = Path(__file__).parent


def main() -> None:
    programs = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}
    names = sys.argv[1:] or list(programs)
    for name in names:
        if name not in programs:
            raise SystemExit(f"unknown benchmark {name!r}; known: {', '.join(programs)}")
    options = ["--compile", "--bf16", *shlex.split(os.environ.get("BENCH_OPTIONS", ""))]
    for name in names:
        print(f"\n# {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "rows.csv"
            words = [sys.executable, programs[name], *options, "--store", found]
            if subprocess.run(words).returncode:
                raise SystemExit(f"{name} failed, its earlier rows stay")
            store(HERE / "results", from_csv(found.read_text()))


if __name__ == "__main__":
    main()
