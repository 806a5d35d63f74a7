"""The only place of the command line that prints: results to stdout, everything else to stderr."""

import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from waveflow.errors import WaveflowError, fault
from waveflow.processes import ALONE, Group

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn


def open_streams() -> None:
    """Makes every standard stream safe to write to, before anything else is opened.

    A stream that the parent has closed leads to /dev/null: otherwise the next file that is opened
    would take its place, and Python would print on stdout what is meant for stderr. A character
    that the terminal's encoding lacks is written as an escape.
    """
    for name, descriptor in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, this one
            closed.add(name)
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(descriptor, mode, closefd=False))
            closed.add(name)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


# Standard streams that the parent of this process has closed.
closed: set[str] = set()


def show(line: str) -> None:
    """Prints a line of the result on stdout.

    Raises:
        OSError: it cannot be written. A reader that wants no more is no error.
    """
    _write(sys.stdout, line)


def show_table(rows: Sequence[Sequence[str]], n_left: int = 2) -> None:
    """Prints rows in columns: the first `n_left` aligned to the left, the others to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if i < n_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        show("  ".join(cells).rstrip())


def note(message: str) -> None:
    """Prints a message on stderr, as one line; where that is impossible, it is lost."""
    with suppress(OSError):
        _write(sys.stderr, f"waveflow: {' '.join(message.splitlines())}")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """For the body of a script: a user's mistake is one line on stderr and exit status 2."""
    try:
        yield
    except WaveflowError as error:
        _write(sys.stderr, f"{Path(sys.argv[0]).name}: {error}")
        sys.exit(2)


def show_faults(wanted: bool) -> None:
    """Says whether the tracebacks of faults of ours are printed (`--debug`)."""
    _Faults.shown = wanted


def faults_are_shown() -> bool:
    """Whether `show_faults` wants tracebacks."""
    return _Faults.shown


class _Faults:
    shown = False


def fault_line(error: Exception) -> str:
    """Returns a line about a fault of ours, after its traceback was printed with `--debug`."""
    if _Faults.shown:
        with suppress(OSError):
            for line in "".join(traceback.format_exception(error)).splitlines():
                _write(sys.stderr, line)
    return f"{fault(error)} (waveflow --debug shows where)"


def printable(text: str) -> str:
    """The text with all that a terminal would obey, or could not show, as escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def _write(stream: TextIO, line: str) -> None:
    try:
        print(printable(line), file=stream, flush=True)
    except OSError as error:
        to_nowhere(stream)
        if not isinstance(error, BrokenPipeError):
            raise OSError(error.errno, error.strerror, stream.name) from error


def to_nowhere(stream: TextIO) -> None:
    """Drops all that is written to a stream from now on, also as Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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
