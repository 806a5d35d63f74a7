"""Turns one file into one file, or files and folders into a folder: for verbs that do both.

Under torchrun each process makes its share of a folder's files, and rank 0 reports for all.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import typer

from waveflow.cli.console import counting, note
from waveflow.cli.options import check_writable
from waveflow.errors import AudioError, ConfigError, DataError, MelMismatchError, WaveflowError
from waveflow.processes import ALONE, Group, check_alone, join_group

logger = logging.getLogger(__name__)


class Jobs(NamedTuple):
    """The outputs that this process has to make.

    Attributes:
        out: the output, a file or a folder.
        pairs: this process's share: outputs, within `out`, by inputs. There may be millions, so
            they are plain strings. Of one file the output is empty.
        one: whether one file becomes one file.
        n_kept: outputs of the share that are there already and stay.
        left_out: files of the folder that are no inputs, in words.
        group: the processes that share the work.
    """

    out: Path
    pairs: dict[str, str]
    one: bool = False
    n_kept: int = 0
    left_out: tuple[str, ...] = ()
    group: Group = ALONE


def plan_jobs(
    sources: Sequence[Path], out: Path, suffixes: Sequence[str], out_suffix: str, force: bool
) -> Jobs:
    """Pairs inputs and outputs, before anything is loaded or written.

    Args:
        sources: files and folders; of a folder and its sub-folders, the files with one of the
            suffixes are inputs.
        out: the output file of one input file; otherwise the folder of the outputs, which is made,
            with the sub-folders of the inputs.
        out_suffix: suffix of the outputs in a folder.
        force: whether to make outputs in a folder again that are there already.

    Raises:
        DataError: a source is missing, or is a folder without inputs.
        ConfigError: an output is also an input, two inputs have one output, `out` cannot be
            written, or several processes would make one file.
    """
    from waveflow.audio.io import list_files

    for source in sources:
        if not source.exists():
            raise DataError(f"{source} does not exist")
    if len(sources) == 1 and not sources[0].is_dir() and not names_folder(out):
        check_alone(f"the file {sources[0]}")
        if out.exists() and out.samefile(sources[0]):
            raise _also_an_input(out)
        check_writable(out)
        return Jobs(out, {str(sources[0]): ""}, one=True)
    pairs: dict[str, str] = {}
    left_out: list[str] = []
    for source in sources:
        if source.is_dir():
            found = list_files(source, suffixes, skip=out)
            for name in found.names:
                pairs[os.path.join(source, name)] = _renamed(name, out_suffix)
            left_out.extend(found.left_out)
        else:
            pairs[str(source)] = _renamed(source.name, out_suffix)
    _check_one_to_one(pairs)
    _make_folder(out)
    _check_apart(pairs, out)
    group = join_group()
    share = {path: pairs[path] for path in group.share(list(pairs))}
    made = set() if force else {target for target in share.values() if _is_file(out, target)}
    todo = {path: target for path, target in share.items() if target not in made}
    return Jobs(out, todo, False, len(share) - len(todo), tuple(left_out), group)


def names_folder(out: Path) -> bool:
    """Whether an output is a folder: one that is there, or a name with a slash at its end."""
    return isinstance(out, FolderPath) or out.is_dir()


class FolderPath(type(Path())):  # type: ignore[misc]
    """A path that was written with a slash at its end, which `Path` forgets."""


def output(text: str) -> Path:
    """An output as the user wrote it."""
    return FolderPath(text) if text.endswith(("/", os.sep)) else Path(text)


def run_jobs(jobs: Jobs, work: Callable[[Path, Path], str]) -> None:
    """Calls `work(input, output)` for each pair; it returns the output's size in words.

    Of several files it goes on after one that fails, for whatever reason, and reports at the end.

    Raises:
        WaveflowError: the one file cannot be used.
        typer.Exit: some of several files failed, with status 2, or 1 if that is our fault.
    """
    if jobs.one:
        [source] = jobs.pairs
        note(f"{jobs.out}, {work(Path(source), jobs.out)}")
        return
    bad: list[str] = []
    faults: list[str] = []
    with counting("files", jobs.group) as progress:
        for done, (source, target) in enumerate(jobs.pairs.items(), start=1):
            try:
                path = jobs.out / target
                path.parent.mkdir(parents=True, exist_ok=True)
                work(Path(source), path)
            except WaveflowError as error:
                bad.append(str(error))
            except OSError as error:
                bad.append(f"{source}: {error.strerror or error}")
            except Exception as error:
                reason = (str(error).splitlines() or [""])[0]
                faults.append(f"{source}: internal error ({type(error).__name__}): {reason}")
                logger.debug("%s", source, exc_info=error)
            progress(done, len(jobs.pairs))
    n_written = len(jobs.pairs) - len(bad) - len(faults)
    shares = jobs.group.gather("jobs", (n_written, jobs.n_kept, bad, faults))
    if shares is not None:
        written, kept, *failures = zip(*shares, strict=True)
        _report(jobs, sum(written), sum(kept), *(list(chain(*part)) for part in failures))


def _report(jobs: Jobs, n_written: int, n_kept: int, bad: list[str], faults: list[str]) -> None:
    n_processes, n_failed = jobs.group.world_size, len(bad) + len(faults)
    by = f" by {n_processes} processes" if n_processes > 1 else ""
    kept = f", {n_kept} kept (--force makes them again)" if n_kept else ""
    failed = f", {n_failed} failed:" if n_failed else ""
    note(f"{n_written} written to {jobs.out}{by}{kept}{failed}")
    for message in (*bad, *faults):
        note(message)
    if jobs.left_out:
        note(f"left out: {', '.join(jobs.left_out)}")
    if n_failed:
        raise typer.Exit(1 if faults else 2)


@contextmanager
def errors_of(source: Path | str) -> Iterator[None]:
    """Puts the source's name before errors about its content."""
    try:
        yield
    except (AudioError, MelMismatchError) as error:
        raise type(error)(f"{source}: {error}") from error


def seconds(n_samples: int, sample_rate: int) -> str:
    """The length of audio in words."""
    return f"{n_samples / sample_rate:.1f} s"


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


def _is_file(out: Path, target: str) -> bool:
    return os.path.isfile(os.path.join(out, target))


def _check_one_to_one(pairs: dict[str, str]) -> None:
    """Refuses two inputs whose outputs would have one name."""
    makers: dict[str, str] = {}
    for path, target in pairs.items():
        if target in makers:
            raise ConfigError(f"{makers[target]} and {path} would both become {target}")
        makers[target] = path


def _check_apart(pairs: dict[str, str], out: Path) -> None:
    """Refuses an output that is an input: both in one folder, or one is a link to the other."""
    # Some file systems ignore case.
    read = {os.path.realpath(path).casefold() for path in pairs}
    for target in pairs.values():
        path = os.path.join(out, target)
        if os.path.realpath(path).casefold() in read:
            raise _also_an_input(Path(path))


def _also_an_input(out: Path) -> ConfigError:
    return ConfigError(f"output {out} is also an input: name another output")
