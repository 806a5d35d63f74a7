"""The only place of the command line that prints: results to stdout, everything else to stderr."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from waveflow.processes import ALONE, Group

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn


def show(line: str) -> None:
    """Prints a line of the result on stdout."""
    print(line, flush=True)


def show_table(rows: Sequence[Sequence[str]], n_left: int = 2) -> None:
    """Prints rows in columns: the first `n_left` aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if i < n_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        show("  ".join(cells).rstrip())


def note(message: str) -> None:
    """Prints a message on stderr, as one line."""
    print(f"waveflow: {' '.join(message.splitlines())}", file=sys.stderr)


class NoteHandler(logging.Handler):
    """Prints log records as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def progress_bar(*columns: "ProgressColumn") -> "Progress":
    """Returns a bar on stderr that vanishes at its end; it is silent if stderr is no terminal.

    Args:
        columns: what stands to its right.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        # Otherwise rich would move results that are printed meanwhile to stderr.
        redirect_stdout=False,
    )


@contextmanager
def counting(what: str, group: Group = ALONE) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar over `what` with the time left; yields a function to call with (done, in all).

    Of a group, rank 0 shows its own share: bars of several processes would overwrite each other.
    """
    if group.rank > 0:
        yield lambda done, total: None
        return
    from rich.progress import MofNCompleteColumn, TimeRemainingColumn

    share = f" of process 1 of {group.world_size}" if group.world_size > 1 else ""
    with progress_bar(MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task(f"{what}{share}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
