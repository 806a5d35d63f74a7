"""Turns one file into one file, or many files into a folder: for verbs that do both.

Under torchrun each process makes its share of the files, and rank 0 reports for all.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import typer

from waveflow.cli.ahead import Steps, work_ahead
from waveflow.cli.console import counting, fault_line, note
from waveflow.cli.options import check_writable
from waveflow.errors import AudioError, ConfigError, DataError, MelMismatchError, WaveflowError
from waveflow.processes import ALONE, Group, check_alone, join_group


class Jobs(NamedTuple):
    """The outputs that this process has to make.

    Attributes:
        source: the input, if there is one output file; otherwise unused.
        out: the output, a file or a folder.
        names: for a folder, this process's share: paths of outputs within it by paths of inputs.
            There may be millions, so they are plain strings. None for one file.
        n_kept: outputs of the share that are there already and stay.
        left_out: files of a folder that are no inputs although they may be wanted, in words.
        group: the processes that share the folder.
    """

    source: Path
    out: Path
    names: dict[str, str] | None
    n_kept: int
    left_out: Sequence[str]
    group: Group


def plan_jobs(
    sources: Sequence[Path], out: str, suffixes: Sequence[str], out_suffix: str, force: bool
) -> Jobs:
    """Pairs inputs and outputs, before anything is loaded or written.

    One file becomes one file, unless `out` is a folder or ends in a slash. All else becomes a
    folder, which is made.

    Args:
        sources: files and folders; of a folder, the files with one of the suffixes are inputs,
            also those in folders below it, which the outputs mirror.
        out: the output file, or the folder of the outputs.
        out_suffix: suffix of the outputs in a folder.
        force: whether to make outputs in a folder again that are there already.

    Raises:
        DataError: the one source is missing, or a folder has no inputs.
        ConfigError: an output is also an input, two inputs have one output, `out` cannot be
            written, or several processes would make one file.
    """
    target = Path(out)
    to_folder = target.is_dir() or out.endswith(("/", os.sep))
    if len(sources) == 1 and not sources[0].is_dir():
        if not sources[0].exists():
            raise DataError(f"{sources[0]} does not exist")
        if not to_folder:
            check_alone(f"the file {sources[0]}")
            _check_apart(sources[0], target)
            check_writable(target)
            return Jobs(sources[0], target, None, 0, (), ALONE)
    elif not to_folder and len(sources) > 1 and target.suffix:
        raise ConfigError(
            f"{len(sources)} inputs need a folder for their outputs, and {out} is the name of a "
            f"file: end it in a slash if it is a folder"
        )
    names, left_out = _pairs(sources, suffixes, out_suffix, out)
    _make_folder(target)
    _check_folders_apart(names, out, force)
    group = join_group()
    share = {name: names[name] for name in group.share(list(names))}
    n_all = len(share)
    if not force:
        made = _files_among(set(share.values()), out)
        share = {name: end for name, end in share.items() if end not in made}
    return Jobs(Path(), target, share, n_all - len(share), left_out, group)


def run_jobs(
    jobs: Jobs, work: Callable[[Path, Path], str], steps: Steps[Any, Any] | None = None
) -> None:
    """Calls `work(input, output)` for each pair; it returns the output's size in words.

    In a folder it goes on after a file that fails for any reason, and reports at the end.

    Args:
        steps: how a folder is made by batches instead.

    Raises:
        WaveflowError: the one file cannot be used.
        typer.Exit: with status 2, if files of a folder could not be used, and with 1, if a fault of
            ours was a reason.
    """
    if jobs.names is None:
        note_written(jobs.out, work(jobs.source, jobs.out))
        return
    bad: dict[str, str] = {}
    faults: dict[str, str] = {}
    made = _one_by_one(jobs, work) if steps is None else work_ahead(jobs.names, jobs.out, steps)
    with counting("files", jobs.group) as progress:
        for done, (name, error) in enumerate(made, start=1):
            if isinstance(error, WaveflowError):
                bad[name] = str(error)
            elif isinstance(error, OSError):
                bad[name] = f"{name}: {error.strerror or error}"
            elif error is not None:
                faults[name] = f"{name}: {fault_line(error)}"
            progress(done, len(jobs.names))
    n_written = len(jobs.names) - len(bad) - len(faults)
    # In the order of the files, whichever was done first.
    lists = [[found[name] for name in jobs.names if name in found] for found in (bad, faults)]
    shares = jobs.group.gather("jobs", (n_written, jobs.n_kept, *lists))
    if shares is None:
        return
    if status := _report(jobs, shares):
        raise typer.Exit(status)


def _one_by_one(
    jobs: Jobs, work: Callable[[Path, Path], str]
) -> Iterator[tuple[str, Exception | None]]:
    for name, end in (jobs.names or {}).items():
        target = jobs.out / end
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            work(Path(name), target)
        except Exception as error:
            yield name, error
        else:
            yield name, None


def _report(jobs: Jobs, shares: Sequence[tuple[int, int, list[str], list[str]]]) -> int:
    """Prints what all processes have done; returns the exit status."""
    written, kept, bad, faults = zip(*shares, strict=True)
    n_processes = jobs.group.world_size
    by = f" by {n_processes} processes" if n_processes > 1 else ""
    stayed = f", {sum(kept)} kept (--force makes them again)" if sum(kept) else ""
    messages = [message for lists in (bad, faults) for part in lists for message in part]
    failed = f", {len(messages)} failed:" if messages else ""
    note(f"{sum(written)} written to {jobs.out}{by}{stayed}{failed}")
    for message in messages:
        note(message)
    note_left_out(jobs.left_out)
    return 1 if any(faults) else 2 if messages else 0


def note_left_out(left_out: Sequence[str]) -> None:
    """Prints what a folder holds and nobody reads, if there is any, as one line."""
    if left_out:
        from waveflow.audio.io import listed

        note(listed(left_out))


def note_written(out: Path, size: str) -> None:
    """Prints that a file is there, and its size in words."""
    note(f"{out}, {size}")


def seconds(n_samples: int, sample_rate: int) -> str:
    """The length of audio in words."""
    return f"{n_samples / sample_rate:.1f} s"


@contextmanager
def errors_of(source: Path | str) -> Iterator[None]:
    """Puts the source's name before errors about its content."""
    try:
        yield
    except (AudioError, MelMismatchError) as error:
        raise about(source, error) from error


def about(source: Path | str, error: WaveflowError) -> WaveflowError:
    """The error, with the source's name before it if it is about its content."""
    is_content = isinstance(error, AudioError | MelMismatchError)
    return type(error)(f"{source}: {error}") if is_content else error


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


def _pairs(
    sources: Sequence[Path], suffixes: Sequence[str], out_suffix: str, out: str
) -> tuple[dict[str, str], list[str]]:
    """Names of outputs by paths of inputs, and what was left out of folders.

    Raises:
        DataError: a folder has no inputs.
        ConfigError: two inputs have one output.
    """
    from waveflow.audio.io import find_files

    names: dict[str, str] = {}
    left_out: list[str] = []
    for source in sources:
        if source.is_dir():
            found, others = find_files(source, suffixes, without=out)
            left_out += others
            names |= {os.path.join(source, name): _renamed(name, out_suffix) for name in found}
        else:
            names[str(source)] = _renamed(source.name, out_suffix)
    makers: dict[str, str] = {}
    for name, target in names.items():
        if target in makers:
            raise ConfigError(f"{makers[target]} and {name} would both become {target}")
        makers[target] = name
    return names, left_out


def _renamed(name: str, suffix: str) -> str:
    return os.path.splitext(name)[0] + suffix


def _files_among(names: set[str], folder: str) -> set[str]:
    """The paths within a folder that are files; each folder is read once."""
    found = set()
    for inner in {os.path.dirname(name) for name in names}:
        path = os.path.join(folder, inner)
        if os.path.isdir(path):
            with os.scandir(path) as entries:
                paths = [os.path.join(inner, entry.name) for entry in entries if entry.is_file()]
            found |= names.intersection(paths)
    return found


def _check_apart(source: Path, out: Path) -> None:
    """Refuses an output that is the input, whatever their names are."""
    if out.exists() and out.samefile(source):
        raise _also_an_input(out)


def _check_folders_apart(names: dict[str, str], out: str, force: bool) -> None:
    """Refuses an output that is an input: both in one folder, or one is a link to the other."""
    real = cache(os.path.realpath)

    def place(path: str) -> tuple[str, str]:
        folder, name = os.path.split(path)
        return real(folder), name.casefold()  # some file systems ignore case

    targets = [os.path.join(out, target) for target in names.values()]
    outputs = {real(folder) for folder in {os.path.dirname(path) for path in targets}}
    read = {place(name) for name in names if real(os.path.dirname(name)) in outputs}
    links: set[str] = set()
    if force:  # otherwise existing outputs stay
        read |= {place(os.path.realpath(name)) for name in names if os.path.islink(name)}
        links = {path for path in targets if os.path.islink(path)}
    if links:  # they would be written through
        read |= {place(name) for name in names}
    for path in targets if read else ():
        if place(path) in read or (path in links and place(os.path.realpath(path)) in read):
            raise _also_an_input(Path(path))


def _also_an_input(out: Path) -> ConfigError:
    return ConfigError(f"output {out} is also an input: name another output")
