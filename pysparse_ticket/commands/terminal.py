"""What the commands share of the terminal: output, progress, and how errors and Ctrl-C end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..interrupt import Interrupted

console = Console()
errors = Console(stderr=True)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Errors that name what the user gave become one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        errors.print(f"[red]error:[/red] {error}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from None


@contextmanager
def progress(
    first: str, go_on: str = "go on with the same command"
) -> Iterator[Callable[[str, int | None, int | None], None]]:
    """A bar, as a function of (what runs, steps done, steps in all). Ctrl-C in the body says how to go on; code 130."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(first, total=None)
        try:
            yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
        except Interrupted as stop:
            bar.stop()
            errors.print(f"{stop}; {go_on}", soft_wrap=True)
            raise typer.Exit(130) from None
