"""One line on the terminal that says what a command is doing, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """Gives a function that shows its text until it is called again; the line vanishes at the end.

    It goes to stderr, and only where that is a terminal.
    """
    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=False,  # what the command prints goes where it would go without the line
        redirect_stderr=False,
    ) as progress:
        task = progress.add_task("", total=None)

        def show(text: str) -> None:
            progress.reset(task, description=text, total=None)

        yield show
