"""Turns one file into one file, or a folder of files into a folder: for verbs that do both.

Under torchrun each process makes its share of a folder's files, and rank 0 reports for all.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import typer

from waveflow.cli.console import counting, note
from waveflow.cli.options import check_writable
from waveflow.errors import AudioError, ConfigError, DataError, MelMismatchError
from waveflow.processes import ALONE, Group, check_alone, join_group


class Jobs(NamedTuple):
    """The outputs that this process has to make.

    Attributes:
        source: the input, a file or a folder.
        out: the output, a file or a folder.
        names: for a folder, this process's share of it: output names by input names. There may be
            millions, so they are plain strings. None for one file.
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
        source: a file, or a folder; of a folder, the files with one of the suffixes are inputs.
        out: the output file, or the folder of the outputs, which is made.
        out_suffix: suffix of the outputs in a folder.
        force: whether to make outputs in a folder again that are there already.

    Raises:
        DataError: the source is missing, or is a folder without inputs.
        ConfigError: an output is also an input, two inputs have one output, `out` cannot be
            written, or several processes would make one file.
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

    In a folder it goes on after a file that cannot be used, and reports at the end.

    Raises:
        WaveflowError: the one file cannot be used.
        typer.Exit: with status 2, if files of a folder could not be used.
    """
    if jobs.names is None:
        work(jobs.source, jobs.out)
        return
    bad = []
    with counting("files", jobs.group) as progress:
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
def errors_of(source: Path | str) -> Iterator[None]:
    """Puts the source's name before errors about its content."""
    try:
        yield
    except (AudioError, MelMismatchError) as error:
        raise type(error)(f"{source}: {error}") from error


def note_about(source: Path | str, notes: Sequence[str]) -> None:
    """Prints notes about a source, if there are any, as one line."""
    if notes:
        note(f"{source}: {', '.join(notes)}")


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
    """The names that are files of the folder; the folder is read once."""
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.name in names and entry.is_file()}


def _check_apart(source: Path, out: Path) -> None:
    """Refuses an output that is the input, whatever their names are."""
    if out.exists() and out.samefile(source):
        raise _also_an_input(out)


def _check_one_to_one(source: Path, inputs: list[str], out_suffix: str) -> None:
    """Refuses two inputs whose outputs would have one name."""
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
    """Refuses an output that is an input: both in one folder, or one is a link to the other."""
    # Some file systems ignore case.
    present = {name.casefold() for name in inputs} if source.samefile(out) else set()
    if force:  # otherwise existing outputs stay
        folder = os.path.realpath(out)
        paths = (os.path.join(source, name) for name in inputs)
        ends = (os.path.split(os.path.realpath(path)) for path in paths if os.path.islink(path))
        present |= {name.casefold() for parent, name in ends if parent == folder}
        targets = (os.path.join(out, _renamed(name, out_suffix)) for name in inputs)
        links = {path: os.path.realpath(path) for path in targets if os.path.islink(path)}
        read = {os.path.realpath(source / name) for name in inputs} if links else set()
        for path, end in links.items():
            if end in read:  # it would be written through the link
                raise _also_an_input(Path(path))
    if present:
        for name in inputs:
            target = _renamed(name, out_suffix)
            if target.casefold() in present:
                raise _also_an_input(out / target)


def _also_an_input(out: Path) -> ConfigError:
    return ConfigError(f"output {out} is also an input: name another output")
