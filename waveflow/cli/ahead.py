"""Many files by batches: the next are read, and the last are written, beside the computation."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
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
        make: gives the number and the result, or the error, of each of some files that were read,
            in any order.
        write: a result to a file; in a thread of its own.
    """

    read: Callable[[Path], Read]
    make: Callable[[Sequence[Path], Sequence[Read]], Iterable[tuple[int, Made | Exception]]]
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
    files = ThreadPoolExecutor(_THREADS)
    try:
        windows = _windows(iter(names))
        reading = _reading(files, next(windows, []), steps)
        writing: dict[str, Future[object]] = {}
        while reading:
            upcoming = _reading(files, next(windows, []), steps)
            errors = {name: _error_of(read) for name, read in reading.items()}
            yield from ((name, error) for name, error in errors.items() if error is not None)
            ready = [name for name, error in errors.items() if error is None]
            values = [reading[name].result() for name in ready]
            for i, result in steps.make([Path(name) for name in ready], values):
                if isinstance(result, Exception):
                    yield ready[i], result
                else:
                    target = out / names[ready[i]]
                    writing[ready[i]] = files.submit(_written, target, result, steps)
                yield from _taken(writing, lambda written: written.done())
            reading = upcoming
        yield from _taken(writing, lambda written: True)
    finally:
        # What is being written is finished; what is only read is not waited for.
        files.shutdown(cancel_futures=True)


def _windows(names: Iterator[str]) -> Iterator[list[str]]:
    """Inputs that are read at once, within the bounds."""
    window: list[str] = []
    n_bytes = 0
    for name in names:
        size = 0  # a file that is not there is an error when it is read
        with suppress(OSError):
            size = os.stat(name).st_size
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


def _taken(
    writing: dict[str, Future[object]], wanted: Callable[[Future[object]], bool]
) -> Iterator[tuple[str, Exception | None]]:
    """Takes those of the writes out that are wanted, and waits for them."""
    for name in [name for name, written in writing.items() if wanted(written)]:
        yield name, _error_of(writing.pop(name))


def _error_of(future: Future[Any]) -> Exception | None:
    """What went wrong in a thread; an interruption goes on here."""
    error = future.exception()
    if error is None or isinstance(error, Exception):
        return error
    raise error
