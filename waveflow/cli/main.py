"""The command `waveflow`: collects its verbs, and turns errors into one line and a status."""

import logging
import os
import select
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, TextIO, cast

import typer

from waveflow import __version__
from waveflow.cli.bench import bench
from waveflow.cli.compare import compare
from waveflow.cli.console import (
    NoteHandler,
    fault_line,
    note,
    open_streams,
    show,
    show_faults,
    to_nowhere,
)
from waveflow.cli.convert import convert
from waveflow.cli.convert_mel import convert_mel
from waveflow.cli.denoise import denoise
from waveflow.cli.doctor import doctor
from waveflow.cli.evaluate import evaluate
from waveflow.cli.export import export
from waveflow.cli.info import info
from waveflow.cli.options import flat
from waveflow.cli.prepare import prepare
from waveflow.cli.say import say
from waveflow.cli.serve import serve
from waveflow.cli.synthesis import mel, resynth, vocode
from waveflow.cli.train import train
from waveflow.errors import WaveflowError
from waveflow.files import FULL

DONE, OUR_FAULT, USER_ERROR, INTERRUPTED = 0, 1, 2, 130

# Base of all usage errors. Older Typers use click's class and newer ones a copy of their own; both
# can be reached this way.
_UsageError = cast(type[Exception], typer.BadParameter.__base__)

app = typer.Typer(
    add_completion=False,
    # Plain text fits 80 columns everywhere and needs no rich.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        show(f"waveflow {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _waveflow(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of a fault of waveflow's.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Mel spectrograms to speech with normalizing flows.

    \b
    Examples:
      waveflow resynth in.wav -o out.wav
      waveflow vocode mel.npy -o out.wav
      waveflow train recipes/ljspeech/frameglow.toml --data LJSpeech-1.1 --out run
      waveflow VERB --help
    """
    show_faults(debug)
    if context.invoked_subcommand is None:
        for line in context.get_help().splitlines():
            show(line)


_VERBS = (
    vocode, resynth, say, serve, mel, convert_mel, doctor, denoise, prepare, train, compare,
    evaluate, bench, info, convert, export,
)  # fmt: skip
for _verb in _VERBS:
    app.command()(flat(_verb))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        Exit status: 0 done, 2 wrong input, 1 a fault of waveflow, 130 interrupted.
    """
    open_streams()
    logger = logging.getLogger("waveflow")
    logger.handlers = [NoteHandler()]
    logger.setLevel(logging.WARNING)
    show_faults(False)
    command = typer.main.get_command(app)
    stdout = sys.stdout
    try:
        status = command.main(
            args=None if argv is None else list(argv),
            prog_name="waveflow",
            standalone_mode=False,
        )
        status = status if isinstance(status, int) else DONE
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except SystemExit as error:
        # Also click's own answer to a broken pipe, which may be any.
        code = error.code if isinstance(error.code, int) else OUR_FAULT if error.code else DONE
        status = DONE if _reader_left(stdout) else code
    except Exception as error:
        status = _explain(error)
    if status == INTERRUPTED:
        note("interrupted")
    return status


def _reader_left(stdout: TextIO) -> bool:
    """Whether stdout is a pipe whose reader, such as `head`, wants no more."""
    with suppress(OSError, AttributeError):  # no descriptor; Windows has no poll
        poll = select.poll()
        poll.register(stdout.fileno(), select.POLLOUT)
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            to_nowhere(stdout)
            return True
    return False


def _explain(error: Exception) -> int:
    """Prints an error as one line; returns the exit status."""
    if isinstance(error, _UsageError):
        note(error.format_message())  # type: ignore[attr-defined]
        return USER_ERROR
    if isinstance(error, WaveflowError):
        note(str(error))
        return USER_ERROR
    if isinstance(error, OSError) and (error.filename is not None or error.errno in FULL):
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        note(f"{where}{error.strerror}")
        return USER_ERROR
    note(fault_line(error))
    return OUR_FAULT
