"""One file to one file, or a folder of files to a folder: what vocode, resynth and mel share.

Under torchrun each process makes its share of a folder's files; rank 0 reports for all of them.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

import typer

from waveflow.cli.console import note
from waveflow.cli.options import check_writable
from waveflow.cli.shards import ALONE, Group, check_alone, join_group
from waveflow.errors import AudioError, ConfigError, DataError, MelMismatchError


class Jobs(NamedTuple):
    """What this process is to make.

    Attributes:
        source: the input, a file or a folder.
        out: the output, likewise.
        names: of the output by that of the input, of this process's share of a folder job (there
            may be millions); None for one file.
        n_kept: outputs of the share that are there already and stay.
        group: the processes that share the folder.
    """

    source: Path
    out: Path
    names: dict[str, str] | None
    n_kept: int
    group: Group


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
        ConfigError: an output is an input, two outputs are one, or `out` cannot be written; or
            several processes are to make one file.
    """
    from waveflow.audio.io import list_names

    if not source.exists():
        raise DataError(f"{source} does not exist")
    if not source.is_dir():
        check_alone(f"the file {source}")
        _check_apart(source, out)
        check_writable(out)
        return Jobs(source, out, None, 0, ALONE)
    inputs = list_names(source, suffixes)
    _check_one_to_one(source, inputs, out_suffix)
    _make_folder(out)
    _check_folders_apart(source, inputs, out, out_suffix, force)
    group = join_group()
    names = {name: _renamed(name, out_suffix) for name in group.share(inputs)}
    n_all = len(names)
    if not force:
        made = _files_among(set(names.values()), out)
        names = {name: target for name, target in names.items() if target not in made}
    return Jobs(source, out, names, n_all - len(names), group)


def run_jobs(jobs: Jobs, work: Callable[[Path, Path], None]) -> None:
    """Calls `work(input, output)` for each pair.

    A folder job goes on after a file that cannot be used, and reports at the end.

    Raises:
        WaveflowError: of the one file.
        typer.Exit: with status 2, if files of a folder could not be used.
    """
    if jobs.names is None:
        work(jobs.source, jobs.out)
        return
    bad = []
    with jobs.group.counting("files") as progress:
        for done, (name, target) in enumerate(jobs.names.items(), start=1):
            try:
                work(jobs.source / name, jobs.out / target)
            except (AudioError, MelMismatchError) as error:
                bad.append(str(error))
            progress(done, len(jobs.names))
    shares = jobs.group.gather("jobs", (len(jobs.names) - len(bad), jobs.n_kept, bad))
    if shares is not None:
        written, kept, failures = zip(*shares, strict=True)
        _report(jobs, sum(written), sum(kept), [message for part in failures for message in part])


def _report(jobs: Jobs, n_written: int, n_kept: int, bad: list[str]) -> None:
    n_processes = jobs.group.world_size
    by = f" by {n_processes} processes" if n_processes > 1 else ""
    kept = f", {n_kept} kept (--force makes them again)" if n_kept else ""
    failed = f", {len(bad)} failed:" if bad else ""
    note(f"{n_written} written to {jobs.out}{by}{kept}{failed}")
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


def _renamed(name: str, suffix: str) -> str:
    return os.path.splitext(name)[0] + suffix


def _files_among(names: set[str], folder: Path) -> set[str]:
    """Those of the names that are files of the folder, which is read once."""
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.name in names and entry.is_file()}


def _check_apart(source: Path, out: Path) -> None:
    """The output may not be the input, under whatever name."""
    if out.exists() and out.samefile(source):
        raise _also_an_input(out)


def _check_one_to_one(source: Path, inputs: list[str], out_suffix: str) -> None:
    """No output may be another's."""
    makers: dict[str, str] = {}
    for name in inputs:
        target = _renamed(name, out_suffix)
        if target in makers:
            first = source / makers[target]
            raise ConfigError(f"{first} and {source / name} would both become {target}")
        makers[target] = name


def _check_folders_apart(
    source: Path, inputs: list[str], out: Path, out_suffix: str, force: bool
) -> None:
    """No output may be an input: in one and the same folder, or at the end of a link."""
    # Without regard to case, as some file systems see it.
    present = {name.casefold() for name in inputs} if source.samefile(out) else set()
    if force:  # else what is there stays
        folder = os.path.realpath(out)
        paths = (os.path.join(source, name) for name in inputs)
        ends = (os.path.split(os.path.realpath(path)) for path in paths if os.path.islink(path))
        present |= {name.casefold() for parent, name in ends if parent == folder}
    if present:
        for name in inputs:
            target = _renamed(name, out_suffix)
            if target.casefold() in present:
                raise _also_an_input(out / target)


def _also_an_input(out: Path) -> ConfigError:
    return ConfigError(f"output {out} is also an input: name another output")
