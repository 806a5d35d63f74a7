"""Unpacks corpora that come as an archive, and downloads LJSpeech, to folders beside the cache."""

import bz2
import gzip
import importlib
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast

from waveflow.errors import ConfigError, DataError
from waveflow.files import lock, reason_of, temporary_folder
from waveflow.limits import (
    BYTES_OF_A_MEMBER,
    EXPANSION,
    FREE_BYTES,
    FREE_MEMBERS,
    PATH_LENGTH,
    TAR_HEADER_BYTES,
    TRAILING_BYTES,
)

ARCHIVE_SUFFIXES = (".tar.bz2", ".tar.gz", ".tgz", ".tar", ".zip")

_BLOCK = 1 << 20
# Others are rare, and some take memory by a number in the file.
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)
_STAMP_FILE = ".waveflow-archive"

Member = TypeVar("Member", tarfile.TarInfo, zipfile.ZipInfo)


def unpack(archive: Path, beside: Path) -> Path:
    """Unpacks a corpus to the folder `beside`/NAME, unless an earlier call has done so.

    Refuses archives whose files would lie outside the folder, that hold links or devices, or that
    are larger than recordings can be.

    Args:
        archive: a .tar.bz2, .tar.gz, .tgz, .tar or .zip file.
        beside: the folder in which NAME is made; it is made too.

    Returns:
        The corpus: the archive's only folder, or all of the archive.

    Raises:
        DataError: no such archive, damaged, unsafe, too large, or NAME is something else.
    """
    name = archive.name
    suffix = next((s for s in ARCHIVE_SUFFIXES if name.lower().endswith(s)), None)
    if suffix is None:
        raise DataError(f"{archive} is neither a folder nor one of {', '.join(ARCHIVE_SUFFIXES)}")
    folder = beside / name[: -len(suffix)]
    status = archive.stat()
    stamp = f"{name} {status.st_size} {status.st_mtime_ns}"

    def make(scratch: Path) -> Path:
        _extract(archive, scratch)
        inside = [path for path in scratch.iterdir() if path.name != "__MACOSX"]
        root = inside[0] if len(inside) == 1 and inside[0].is_dir() else scratch
        (root / _STAMP_FILE).write_text(stamp)
        return root

    _make_once(folder, make)
    if not (folder / _STAMP_FILE).is_file() or (folder / _STAMP_FILE).read_text() != stamp:
        raise DataError(
            f"{archive} would be unpacked to {folder}, which is there already and not from it: "
            "give that folder as the corpus, or remove it"
        )
    return folder


def download_ljspeech(beside: Path) -> Path:
    """Downloads LJSpeech-1.1 with torchaudio to `beside`/LJSpeech-1.1, unless it is there.

    Args:
        beside: the folder in which it is made; it takes 7 GB.

    Raises:
        ConfigError: torchaudio is missing or does not fit torch, or the download failed.
    """

    def make(scratch: Path) -> Path:
        try:
            # Imported by name because it is no dependency: only this download needs it.
            datasets = importlib.import_module("torchaudio.datasets")
            datasets.LJSPEECH(str(scratch), download=True)
        except (ImportError, OSError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"cannot download LJSpeech-1.1 by torchaudio ({reason}): install the torchaudio of "
                "your torch's version, or fetch https://data.keithito.com/data/speech/"
                "LJSpeech-1.1.tar.bz2 yourself and give that file as the corpus"
            ) from error
        return scratch / "LJSpeech-1.1"

    return _make_once(beside / "LJSpeech-1.1", make)


def _make_once(folder: Path, make: Callable[[Path], Path]) -> Path:
    """Moves the folder that `make` returns, a scratch folder or one inside it, to `folder`."""
    guard = folder.with_name(f".{folder.name}.lock")
    # The lock file goes last. Where it is still beside a whole folder, its maker was killed, and
    # what that one has left is removed here.
    if folder.exists() and not guard.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock(guard, f"the corpus {folder}"), temporary_folder(folder) as scratch:
            if not folder.exists():
                make(scratch).rename(folder)
    except ConfigError:
        if not folder.exists():  # or its maker is alive and about to end
            raise
    except OSError as error:
        if not folder.exists():
            raise DataError(f"cannot make {folder}: {reason_of(error, folder)}") from error
    return folder


def _extract(archive: Path, folder: Path) -> None:
    """Writes the archive's files into the folder."""
    with _damage_named(archive):
        if archive.suffix.lower() == ".zip":
            with zipfile.ZipFile(archive) as files:
                files.extractall(folder, _checked(archive, files.infolist(), folder))
            return
        openers: dict[str, Callable[..., Any]] = {".bz2": bz2.open, ".tar": open}
        opener = openers.get(archive.suffix.lower(), gzip.open)
        # "r|" reads from start to end once. A list of the members would decompress all twice.
        with opener(archive, "rb") as file:
            stream = _Bounded(file, archive)
            with tarfile.open(fileobj=cast(Any, stream), mode="r|", tarinfo=_Member) as tar:
                # Not for safety, which `_checked` sees to, but for permissions as of new files.
                # Python before 3.11.4 has no filters.
                tar.extraction_filter = getattr(tarfile, "data_filter", None)
                tar.extractall(folder, _checked(archive, tar, folder))
            # The compressor's checksum follows the end of the tar.
            trailing = 0
            while block := stream.read(_BLOCK):
                trailing += len(block)
                if trailing > TRAILING_BYTES:
                    raise DataError(
                        f"{archive} goes on behind the end of its tar: unpack it yourself"
                    )


class _Bounded:
    """A decompressed stream that ends with an error where no corpus would be so large.

    Without it, headers and padding, which no member's size tells, could go on for hours.
    """

    def __init__(self, file: Any, archive: Path) -> None:
        self._file, self._archive = file, archive
        self._left = _most_bytes(archive)

    def read(self, n_bytes: int) -> bytes:
        data: bytes = self._file.read(n_bytes)
        self._left -= len(data)
        if self._left < 0:
            raise _too_large(self._archive)
        return data


class _Member(tarfile.TarInfo):
    """A member whose header is looked at before tarfile reads what it announces."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        info = super().frombuf(buf, encoding, errors)
        # Headers of long names and the like are read into memory as a whole.
        is_header = info.type in _HEADERS
        if info.size < 0 or (is_header and info.size > TAR_HEADER_BYTES):
            raise ValueError(f"a header of {info.size:,} bytes")
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise ValueError("a sparse file")
        return info


_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


def _most_bytes(archive: Path) -> int:
    """Bytes that an archive of recordings may unpack to."""
    return max(EXPANSION.value * archive.stat().st_size, FREE_BYTES)


def _too_large(archive: Path) -> DataError:
    return DataError(
        f"{archive} holds more than {_most_bytes(archive)} bytes, which is more than a corpus of "
        f"its size: unpack it yourself, or set {EXPANSION.name} in the environment"
    )


def _checked(archive: Path, members: Iterable[Member], folder: Path) -> Iterator[Member]:
    """Yields the members. Raises DataError at one that is unsafe or one too many."""
    free, most = shutil.disk_usage(folder).free, _most_bytes(archive)
    most_members = FREE_MEMBERS + archive.stat().st_size // BYTES_OF_A_MEMBER
    n_bytes = 0
    for count, member in enumerate(members, start=1):
        name, is_plain, size = _facts(member)
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise DataError(f"{archive}: {name!r:.200} would lie outside its folder: not unpacked")
        if len(name) > PATH_LENGTH:
            raise DataError(f"{archive}: {name!r:.60}... is too long a name: not unpacked")
        # No links at all: one inside the folder could lead a later member out of it.
        if not is_plain:
            raise DataError(f"{archive}: {name!r:.200} is no plain file: not unpacked")
        if count > most_members:
            raise DataError(
                f"{archive} holds more than {most_members} files, which is more than a corpus of "
                "its size: unpack it yourself"
            )
        n_bytes += size
        if n_bytes > most:
            raise _too_large(archive)
        if n_bytes > free:
            raise DataError(
                f"{archive} holds more than the {free} bytes free on the disk of {folder.parent}"
            )
        if isinstance(member, zipfile.ZipInfo) and member.compress_type not in _COMPRESSIONS:
            raise DataError(
                f"{archive}: {name!r:.200} is of a rare compression: unpack it yourself"
            )
        yield member


def _facts(member: tarfile.TarInfo | zipfile.ZipInfo) -> tuple[str, bool, int]:
    """Name, whether it is a plain file or a folder, and bytes."""
    if isinstance(member, tarfile.TarInfo):
        return member.name, member.isreg() or member.isdir(), member.size
    # The upper half is the type and mode of Unix, if the archive was made there.
    kind = (member.external_attr >> 16) & 0o170000
    return member.filename, member.is_dir() or kind in (0, 0o100000), member.file_size


@contextmanager
def _damage_named(archive: Path) -> Iterator[None]:
    """Turns errors of the readers into one line."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise DataError(f"{archive} is damaged or no such archive: {error}") from error
    except RuntimeError as error:  # an encrypted member, or a compression that Python lacks
        raise DataError(f"{archive} cannot be unpacked ({error}): unpack it yourself") from error
    except OSError as error:
        if error.errno is None:  # from the decompressor, not from the system
            raise DataError(f"{archive} is damaged: {error}") from error
        raise
