"""One file to one file, or a folder of files to a folder: what vocode, resynth and mel share."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

import typer

from waveflow.cli.console import counting, note
from waveflow.cli.options import check_writable
from waveflow.errors import AudioError, ConfigError, DataError, MelMismatchError


class Jobs(NamedTuple):
    """What is to be made.

    Attributes:
        pairs: (input, output), each a file.
        folder: of the outputs, where a folder was given; None for one file.
        n_kept: outputs of a folder job that are there already and stay.
    """

    pairs: list[tuple[Path, Path]]
    folder: Path | None
    n_kept: int


def plan_jobs(
    source: Path, out: Path, suffixes: Sequence[str], out_suffix: str, force: bool
) -> Jobs:
    """Pairs inputs and outputs, before anything is loaded or written.

    Args:
        source: a file, or a folder whose files with one of the suffixes are meant.
        out: the output file, or the folder of the outputs, which is made.
        out_suffix: of the outputs in a folder.
        force: whether outputs in a folder that are there already are made again.

    Raises:
        DataError: the source is missing, or a folder without such a file.
        ConfigError: an output is an input, two outputs are one, or `out` cannot be written.
    """
    from waveflow.audio.io import list_inputs

    if not source.exists():
        raise DataError(f"{source} does not exist")
    if not source.is_dir():
        _check_apart([(source, out)])
        check_writable(out)
        return Jobs([(source, out)], None, 0)
    pairs = [(path, out / f"{path.stem}{out_suffix}") for path in list_inputs(source, suffixes)]
    _check_apart(pairs)
    _make_folder(out)
    wanted = [(path, target) for path, target in pairs if force or not target.exists()]
    return Jobs(wanted, out, len(pairs) - len(wanted))


def run_jobs(jobs: Jobs, work: Callable[[Path, Path], None]) -> None:
    """Calls `work(input, output)` for each pair.

    A folder job goes on after a file that cannot be used, and reports at the end.

    Raises:
        WaveflowError: of the one file.
        typer.Exit: with status 2, if files of a folder could not be used.
    """
    if jobs.folder is None:
        work(*jobs.pairs[0])
        return
    bad = []
    with counting("files") as progress:
        for done, (source, target) in enumerate(jobs.pairs, start=1):
            try:
                work(source, target)
            except (AudioError, MelMismatchError) as error:
                bad.append(str(error))
            progress(done, len(jobs.pairs))
    kept = f", {jobs.n_kept} kept (--force makes them again)" if jobs.n_kept else ""
    failed = f", {len(bad)} failed:" if bad else ""
    note(f"{len(jobs.pairs) - len(bad)} written to {jobs.folder}{kept}{failed}")
    for message in bad:
        note(message)
    if bad:
        raise typer.Exit(2)


@contextmanager
def about(source: Path | str) -> Iterator[None]:
    """Names the source in what a vocoder says of its contents: warnings (as notes) and errors."""
    from waveflow.engine.vocoder import VocoderWarning

    show = warnings.showwarning

    def show_as_note(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, VocoderWarning):
            note(f"{source}: {message}")
        else:
            show(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.simplefilter("always", VocoderWarning)
        warnings.showwarning = show_as_note
        try:
            yield
        except (AudioError, MelMismatchError) as error:
            raise type(error)(f"{source}: {error}") from error


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if out.is_file() else error.strerror
        raise ConfigError(f"cannot make the folder {out}: {reason}") from error
    if not os.access(out, os.W_OK):
        raise ConfigError(f"cannot write to the folder {out}: no permission")


def _check_apart(pairs: list[tuple[Path, Path]]) -> None:
    """No output may be an input, under whatever name, or another's output."""
    inputs = {_identity(source) for source, _ in pairs}
    makers: dict[Path, Path] = {}
    for source, target in pairs:
        if target.exists() and _identity(target) in inputs:
            raise ConfigError(f"output {target} is also an input: name another output")
        if target in makers:
            raise ConfigError(f"{makers[target]} and {source} would both become {target}")
        makers[target] = source


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
