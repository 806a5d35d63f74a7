"""What goes to stderr: notes of one line, log records, progress bars."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn


def note(message: str) -> None:
    """One line on stderr."""
    print(f"waveflow: {' '.join(message.splitlines())}", file=sys.stderr)


class NoteHandler(logging.Handler):
    """Log records as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def progress_bar(*columns: "ProgressColumn") -> "Progress":
    """A bar on stderr that vanishes at its end; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        # The bar's console is stderr: results that are printed meanwhile must not move there.
        redirect_stdout=False,
    )


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over `what`, with the time left; gives a function to call with (done, in all)."""
    from rich.progress import TimeRemainingColumn

    with progress_bar(TimeRemainingColumn()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
