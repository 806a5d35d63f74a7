"""Many files by batches: the next are read, and the last are written, beside the computation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

Read = TypeVar("Read")
Made = TypeVar("Made")

# Files that are read ahead, and their bytes in all.
_MOST_FILES, _MOST_BYTES = 64, 2**25
_THREADS = 4


class Steps(NamedTuple, Generic[Read, Made]):
    """How files are made of files.

    Attributes:
        read: a file; in a thread of its own.
        make: the results, or errors, of what was read of some files.
        write: a result to a file; in a thread of its own.
    """

    read: Callable[[Path], Read]
    make: Callable[[Sequence[Path], Sequence[Read]], Sequence[Made | Exception]]
    write: Callable[[Path, Made], object]


def work_ahead(
    names: Mapping[str, str], out: Path, steps: Steps[Read, Made]
) -> Iterator[tuple[str, Exception | None]]:
    """Makes outputs of inputs.

    Args:
        names: paths of outputs within `out` by paths of inputs.

    Returns:
        Each input that is done, with the error that kept it from being made.
    """
    with ThreadPoolExecutor(_THREADS) as files:
        windows = _windows(iter(names))
        reading = _reading(files, next(windows, []), steps)
        writing: dict[str, Future[object]] = {}
        while reading:
            upcoming = _reading(files, next(windows, []), steps)
            errors = {name: _error_of(read) for name, read in reading.items()}
            ready = [name for name, error in errors.items() if error is None]
            made = steps.make([Path(n) for n in ready], [reading[n].result() for n in ready])
            yield from _done(writing)
            writing = {}
            for name, result in zip(ready, made, strict=True):
                if isinstance(result, Exception):
                    errors[name] = result
                else:
                    writing[name] = files.submit(_written, out / names[name], result, steps)
            yield from ((name, error) for name, error in errors.items() if error is not None)
            reading = upcoming
        yield from _done(writing)


def _windows(names: Iterator[str]) -> Iterator[list[str]]:
    window: list[str] = []
    n_bytes = 0
    for name in names:
        size = Path(name).stat().st_size if Path(name).exists() else 0
        if window and (len(window) == _MOST_FILES or n_bytes + size > _MOST_BYTES):
            yield window
            window, n_bytes = [], 0
        window.append(name)
        n_bytes += size
    if window:
        yield window


def _reading(
    files: ThreadPoolExecutor, names: Sequence[str], steps: Steps[Read, Made]
) -> dict[str, Future[Read]]:
    return {name: files.submit(steps.read, Path(name)) for name in names}


def _written(target: Path, result: Made, steps: Steps[Read, Made]) -> object:
    target.parent.mkdir(parents=True, exist_ok=True)
    return steps.write(target, result)


def _done(writing: Mapping[str, Future[object]]) -> Iterator[tuple[str, Exception | None]]:
    for name, written in writing.items():
        yield name, _error_of(written)


def _error_of(future: Future[Any]) -> Exception | None:
    """What went wrong in a thread; an interruption goes on here."""
    error = future.exception()
    if error is None or isinstance(error, Exception):
        return error
    raise error
