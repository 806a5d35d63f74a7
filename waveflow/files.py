"""Files that are whole or not there, outputs that are links or pipes, and locks."""

import errno
import hashlib
import os
import re
import shutil
import socket
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from waveflow.errors import ConfigError, WaveflowError

try:
    import fcntl
except ImportError:  # Windows, where nobody is kept out
    fcntl = None  # type: ignore[assignment]

# Formats with a header that libsndfile reads. Of files with one name the earlier suffix counts.
AUDIO_SUFFIXES = (
    ".wav", ".wave", ".bwf", ".flac", ".aiff", ".aif", ".aifc", ".caf", ".w64", ".rf64", ".au",
    ".snd", ".voc", ".sph", ".nist", ".avr", ".paf", ".pvf", ".svx", ".8svx", ".ircam", ".sf",
    ".wve", ".htk", ".sds", ".xi", ".amb", ".ogg", ".oga", ".opus", ".mp3", ".mp2",
)  # fmt: skip
# Recordings all the same, which are named among what was left out.
UNREAD_SUFFIXES = (".m4a", ".mp4", ".aac", ".wma", ".webm", ".mka", ".amr", ".ape", ".wv")

# How files of the usual formats begin.
_AUDIO_BEGINS = (
    b"RIFF", b"RIFX", b"RF64", b"riff", b"FORM", b"fLaC", b"OggS", b"caff", b".snd", b"ID3",
    b"NIST_1A", b"Creative Voice",
)  # fmt: skip

# What the system says where there is no room: no space, a quota, a file too large.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_own_locks: set[Path] = set()  # that this process holds
_HOLDER = re.compile(r"process \d+ on [\w.-]+ since [\d-]+ [\d:]+")
# What the system says where a file system has no locks,
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
# and of a temporary name that is a link, a folder or somebody else's file.
_TAKEN = {errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EEXIST}


@contextmanager
def atomic_path(path: str | os.PathLike[str], suffix: str | None = None) -> Iterator[Path]:
    """Gives a temporary path beside `path` that replaces it on success and vanishes on failure.

    A reader of `path` sees the old file or the whole new one, never a part, even after a crash of
    the machine: the file is on the disk before it gets its name. What a killed writer of `path`
    has left is taken up by the next one.

    Args:
        path: of the file. A link is replaced, not followed (`output_path` follows it).
        suffix: of the temporary path, because libraries pick formats by it; None: that of `path`.

    Example:
        >>> with atomic_path("out.txt") as temporary:  # doctest: +SKIP
        ...     temporary.write_text("whole or not at all")
    """
    path = Path(path)
    suffix = path.suffix if suffix is None else suffix
    # Of one length, since `path` may have the longest name that there can be.
    stem = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]
    temporary, held = _temporary(path, stem, suffix)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        full = None if isinstance(error, WaveflowError) else _why_no_write(temporary, path)
        temporary.unlink(missing_ok=True)
        if full is not None:
            raise full from error
        raise
    finally:
        os.close(held)


def reason_of(error: OSError, path: str | os.PathLike[str]) -> str:
    """The system's words for a failed write to `path`; without room also which disk is full."""
    words = error.strerror or str(error)
    if error.errno != errno.ENOSPC:
        return words
    disk = Path(os.path.realpath(path))
    while not os.path.ismount(disk):
        disk = disk.parent
    return f"{words} (the disk at {disk} is full)"


@contextmanager
def output_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`atomic_path` for a file that a user has named, which need not be a plain one.

    A link stays, and its target is replaced. A FIFO or a character device gets the bytes when all
    of them are there; the block ends when a reader has taken them.

    Raises:
        OSError: also where `path` is a socket or a disk, or leads to itself.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind in (stat.S_IFREG, stat.S_IFDIR):
        with atomic_path(os.path.realpath(path), path.suffix) as temporary:
            yield temporary
    elif kind in (stat.S_IFIFO, stat.S_IFCHR):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, path.name)
            yield temporary
            with open(temporary, "rb") as source, open(path, "wb", buffering=0) as stream:
                shutil.copyfileobj(source, stream)
    else:
        raise OSError(errno.EINVAL, "it is neither a file nor a pipe", str(path))


def why_unread(path: str | os.PathLike[str]) -> str:
    """Why a recording is none of `AUDIO_SUFFIXES`; an empty text for all that is no recording."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in UNREAD_SUFFIXES:
        return f"{suffix} is not read: convert it to .flac or .wav"
    if suffix not in AUDIO_SUFFIXES and _looks_like_audio(path):
        return "it looks like audio: give it a suffix such as .wav"
    return ""


def _looks_like_audio(path: str | os.PathLike[str]) -> bool:
    """Whether a plain file begins as a recording does, whatever its name."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return file.read(16).startswith(_AUDIO_BEGINS)
    except OSError:
        return False


def kind_of(path: Path) -> int:
    """The kind of file (stat.S_IFREG, ...) behind a path and its links; S_IFREG if none is there.

    Raises:
        OSError: it leads to itself, or through a folder that may not be entered.
    """
    try:
        return stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError:
        return stat.S_IFREG


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Gives an empty folder beside `path`, to be renamed to it. It vanishes if it is not.

    What a killed maker of `path` has left is taken up by the next one.
    """
    temporary, held = _temporary(path, path.name, is_folder=True)
    try:
        for left in temporary.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield temporary
    finally:
        # Its name may be the next maker's by now.
        if _is_at(held, temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        os.close(held)


@contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Keeps other processes out for the time of the block, by a lock file that names this one.

    The system drops the lock when its holder ends, however it ends; a file that was left by a
    killed process locks nobody out. Where the file system has no locks, nobody is kept out.
    Within a lock of this process the same one does nothing.

    Args:
        path: of the lock file; its folder exists. It is removed at the end.
        what: is locked, in words.

    Raises:
        ConfigError: another process holds the lock, or the file cannot be written.
    """
    path = Path(os.path.realpath(path.parent), path.name)
    if path in _own_locks:
        yield
        return
    try:
        held = _locked(path)
    except OSError as error:
        raise ConfigError(f"cannot lock {what}: {path}: {reason_of(error, path)}") from error
    if held is None:
        raise ConfigError(f"{what} is in use by {_holder(path)}: wait until it ends, or stop it")
    _own_locks.add(path)
    try:
        try:
            os.ftruncate(held, 0)
            since = datetime.now().isoformat(" ", "seconds")
            place = f"process {os.getpid()} on {socket.gethostname()}"
            os.write(held, f"{place} since {since}".encode())
        except OSError as error:
            raise ConfigError(f"cannot lock {what}: {path}: {reason_of(error, path)}") from error
        yield
    finally:
        _own_locks.remove(path)
        path.unlink(missing_ok=True)
        os.close(held)


def _temporary(
    path: Path, stem: str, suffix: str = "", is_folder: bool = False
) -> tuple[Path, int]:
    """A hidden path beside `path`, made and locked, and the descriptor that holds the lock.

    It is the same one every time, so what a killed process left does not stay. Only where another
    process or thread is at the same work, the path has a random part.
    """
    own = path.with_name(f".{stem}.tmp{suffix}")
    try:
        held = _locked(own, is_folder)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        held = None
    if held is not None:
        return own, held
    other = path.with_name(f".{stem}.{uuid.uuid4().hex[:12]}.tmp{suffix}")
    held = _locked(other, is_folder)
    assert held is not None, "nobody else knows its name"
    return other, held


def _locked(path: Path, is_folder: bool = False) -> int | None:
    """Makes a file or folder unless it is there, and locks it; None if somebody else holds it.

    Raises:
        OSError: it cannot be made, or is a link.
    """
    if fcntl is None:
        path.mkdir(exist_ok=True) if is_folder else path.touch()
        return os.open(os.devnull, os.O_RDONLY)
    while True:
        if is_folder:
            with suppress(FileExistsError):
                path.mkdir()
        flags = os.O_RDONLY | os.O_DIRECTORY if is_folder else os.O_RDWR | os.O_CREAT
        held = os.open(path, flags | os.O_NOFOLLOW, 0o666)
        try:
            if not is_folder and not stat.S_ISREG(os.fstat(held).st_mode):
                raise OSError(errno.EEXIST, "it is no plain file", str(path))
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
        except BlockingIOError:
            os.close(held)
            return None
        except OSError:
            os.close(held)
            raise
        # Its last holder may have renamed or removed it between the two calls.
        if _is_at(held, path):
            return held
        os.close(held)


def _why_no_write(temporary: Path, path: Path) -> OSError | None:
    """The system's reason if nothing more can be written to a file; None if it can.

    Libraries for audio and arrays do not say it ("System error.", "0 of 10 written").
    """
    try:
        with open(temporary, "ab") as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno in FULL:
            return OSError(error.errno, reason_of(error, path), str(path))
    return None


def _is_at(descriptor: int, path: Path) -> bool:
    if fcntl is None:
        return path.exists()
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    """Who holds a lock, as the file says. It may be anybody's, so other words are not repeated."""
    with suppress(OSError), open(path, "rb") as file:
        words = file.read(200).decode(errors="replace")
        if _HOLDER.fullmatch(words):
            return words
    return "another process"
