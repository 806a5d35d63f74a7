"""The door for the files of others: only plain files, in their own folder, of a limited size."""

import errno
import os
import stat
from pathlib import Path

from waveflow.errors import WaveflowError
from waveflow.limits import Limit


def check_plain(path: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None) -> None:
    """Refuses all but plain files, without opening them.

    A FIFO would block its reader, a device never ends, and a link could lead anywhere.

    Args:
        path: the file; it is found in the folder, if one is given.
        folder: a model's, a run's or a cache's folder. Its files must lie in it, not behind a link.
            The folder of a model in the Hub's cache has links to that cache's own files.

    Raises:
        OSError: no such file, no plain file, or a link out of the folder.
    """
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a NUL in the name
        raise FileNotFoundError(errno.ENOENT, "its name is not possible", str(path)) from error
    if not stat.S_ISREG(mode):
        kind = next((word for is_it, word in _KINDS if is_it(mode)), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a plain file", str(path))
    if folder is not None and not _belongs(path, folder):
        raise OSError(errno.EINVAL, "it is a link out of its folder", str(path))


def _belongs(path: Path, folder: str | os.PathLike[str]) -> bool:
    real, home = Path(os.path.realpath(path)).parent, Path(os.path.realpath(folder))
    if real == home:
        return True
    # The Hub's cache: models--ORG--NAME/snapshots/COMMIT/FILE leads to models--ORG--NAME/blobs/HASH
    # and that, for files that models share, to blobs/HH/HASH. None of these folders is a link.
    snapshots, model = home.parent, home.parent.parent
    is_cache = snapshots.name == "snapshots" and model.name.startswith("models--")
    return is_cache and (real == model / "blobs" or real.parent == model.parent / "blobs")


def is_plain_name(name: object) -> bool:
    """Whether a name that was read from a file names a file of the same folder."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and name not in (".", "..")
        and not set("/\\\0") & set(name)
    )


def read_plain(
    path: Path, most: Limit, error: type[WaveflowError], folder: Path | None = None
) -> bytes:
    """Reads a whole plain file (`check_plain`).

    Args:
        most: the number of bytes that it may have.
        error: class of the error for a larger one.

    Raises:
        OSError: as `check_plain`, or it cannot be read.
    """
    check_plain(path, folder)
    with open(path, "rb") as file:
        most.check(f"{path} has", os.fstat(file.fileno()).st_size, error)
        return file.read()


_KINDS = [
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
]
