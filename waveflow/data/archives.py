"""Corpora that come as an archive or from the network, unpacked beside the cache."""

import bz2
import gzip
import importlib
import shutil
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Generator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from waveflow.errors import ConfigError, DataError

ARCHIVE_SUFFIXES = (".tar.bz2", ".tar.gz", ".tgz", ".tar", ".zip")

# Recordings shrink little; what unpacks to far more is no corpus but a bomb.
MOST_EXPANSION = 50
_STAMP_FILE = ".waveflow-archive"
_PIECE_BYTES = 1 << 20


class _Member(NamedTuple):
    """A file in an archive; `data` is None for what is no plain file."""

    name: str
    data: IO[bytes] | None


def unpack(archive: Path, beside: Path, is_first: bool = True) -> Path:
    """Unpacks a corpus to the folder `beside`/NAME, unless an earlier call has.

    Members are checked one by one as they are written: nothing lies outside the folder, nothing is
    a link or a device, and the whole fits the disk and is of a size that recordings can have.

    Args:
        archive: a .tar.bz2, .tar.gz, .tgz, .tar or .zip file.
        beside: where its folder is made; it is made too.
        is_first: whether this process does the work; the others of a job wait for it.

    Returns:
        The corpus: the archive's one folder, or all of it.

    Raises:
        DataError: no such archive, damaged, unsafe, too large, or the folder is something else.
    """
    name = archive.name
    for suffix in ARCHIVE_SUFFIXES:
        if name.lower().endswith(suffix):
            folder = beside / name[: -len(suffix)]
            break
    else:
        raise DataError(f"{archive} is neither a folder nor one of {', '.join(ARCHIVE_SUFFIXES)}")
    status = archive.stat()
    stamp = f"{name} {status.st_size} {status.st_mtime_ns}"

    def make(scratch: Path) -> Path:
        _write_members(archive, scratch)
        inside = [path for path in scratch.iterdir() if path.name != "__MACOSX"]
        root = inside[0] if len(inside) == 1 and inside[0].is_dir() else scratch
        (root / _STAMP_FILE).write_text(stamp)
        return root

    _make_once(folder, is_first, make)
    if not (folder / _STAMP_FILE).is_file() or (folder / _STAMP_FILE).read_text() != stamp:
        raise DataError(
            f"{archive} would be unpacked to {folder}, which is there already and not from it: "
            "give that folder as the corpus, or remove it"
        )
    return folder


def download_ljspeech(beside: Path, is_first: bool = True) -> Path:
    """Downloads LJSpeech-1.1 to `beside`/LJSpeech-1.1 by torchaudio, unless it is there.

    Args:
        beside: where the folder is made; 7 GB are needed.
        is_first: whether this process does the work; the others of a job wait for it.

    Raises:
        ConfigError: torchaudio is missing or does not fit torch, or the download failed.
    """

    def make(scratch: Path) -> Path:
        try:
            # By its name, because it is no dependency: nothing but this download needs it.
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

    return _make_once(beside / "LJSpeech-1.1", is_first, make)


def _make_once(folder: Path, is_first: bool, make: Callable[[Path], Path]) -> Path:
    """Moves what `make` makes in a scratch folder to `folder`: it is there whole or not at all."""
    while not is_first and not folder.exists():
        time.sleep(0.5)
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True
        ) as scratch:
            inner = Path(scratch, "corpus")
            inner.mkdir()
            make(inner).rename(folder)
    except OSError as error:
        raise DataError(f"cannot make {folder}: {error.strerror or error}") from error
    return folder


def _write_members(archive: Path, folder: Path) -> None:
    most = min(
        max(MOST_EXPANSION * archive.stat().st_size, _PIECE_BYTES), shutil.disk_usage(folder).free
    )
    written = 0
    members = _zip_members if archive.suffix.lower() == ".zip" else _tar_members
    try:
        for member in members(archive):
            if member.data is None:
                raise DataError(f"{archive}: {member.name!r} is no plain file: not unpacked")
            target = folder / _safe_name(archive, member.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            with member.data as source, open(target, "xb") as file:
                while piece := source.read(_PIECE_BYTES):
                    written += len(piece)
                    if written > most:
                        raise DataError(
                            f"{archive} holds more than {most} bytes, which is more than a corpus "
                            "of its size or than the disk can hold: unpack it yourself"
                        )
                    file.write(piece)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise DataError(f"{archive} is damaged or no such archive: {error}") from error
    except RuntimeError as error:  # an encrypted member, or a compression that Python lacks
        raise DataError(f"{archive} cannot be unpacked ({error}): unpack it yourself") from error
    except OSError as error:
        if error.errno is None:  # not the system's, but the decompressor's
            raise DataError(f"{archive} is damaged: {error}") from error
        raise


def _safe_name(archive: Path, name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.parts:
        raise DataError(f"{archive}: {name!r} would lie outside its folder: not unpacked")
    return path


def _tar_members(archive: Path) -> Generator[_Member, None, None]:
    openers: dict[str, Callable[..., Any]] = {".bz2": bz2.open, ".tar": open}
    opener = openers.get(archive.suffix.lower(), gzip.open)
    # As a stream: a list of the members first would decompress all of it twice.
    with opener(archive, "rb") as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        for info in tar:
            if not info.isdir():
                yield _Member(info.name, tar.extractfile(info) if info.isreg() else None)
        # The checksum is behind the end of the tar.
        while stream.read(_PIECE_BYTES):
            pass


def _zip_members(archive: Path) -> Generator[_Member, None, None]:
    with zipfile.ZipFile(archive) as files:
        for info in files.infolist():
            # The upper half are Unix's file type and mode, where the archive is from Unix.
            kind = (info.external_attr >> 16) & 0o170000
            if not info.is_dir():
                plain = kind in (0, 0o100000)
                yield _Member(info.filename, files.open(info) if plain else None)
