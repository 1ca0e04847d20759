"""Run every benchmark program and keep what it prints, with machine, versions and revision, under benchmarks/results/.

python benchmarks/run.py [name ...]      names as in bench_<name>.py; all of them by default
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pysparse_ticket.files import write_whole
from pysparse_ticket.report import machine_line

HERE = Path(__file__).parent


def main() -> None:
    programs = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}
    for name in sys.argv[1:] or programs:
        if name not in programs:
            raise SystemExit(f"unknown benchmark {name!r}; known: {', '.join(programs)}")
        lines = []
        with subprocess.Popen([sys.executable, programs[name]], stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
        if process.returncode:
            raise SystemExit(f"{name} failed, its earlier result stays")
        text = f"# {name}\n\n{machine_line()}\n\n```\n{''.join(lines)}```\n"
        write_whole(HERE / "results" / f"cpu-{name}.md", text.encode())


if __name__ == "__main__":
    main()
