"""The command ``pysparse-ticket``. Bad input ends with one sentence and exit code 2, never a traceback."""

from __future__ import annotations

import typer

from .commands.analyze import analyze
from .commands.bench import bench
from .commands.compare import compare
from .commands.find import find
from .commands.find_trained import find_trained
from .commands.info import info
from .commands.transfer import transfer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
for command in (info, find, find_trained, transfer, compare, bench):
    app.command()(command)
app.add_typer(analyze, name="analyze")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
