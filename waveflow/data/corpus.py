"""Finds the recordings of a corpus on disk: LJSpeech's layout, or a folder of audio files."""

import codecs
import hashlib
import os
import re
import unicodedata
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator

from waveflow.errors import DataError
from waveflow.files import AUDIO_SUFFIXES, why_unread

Split = Literal["train", "val"]

_AUDIO_FOLDERS = ("wavs", "wav")

VAL_FRACTION = 0.02


@dataclass(frozen=True)
class CorpusClip:
    """One recording of a corpus: its id, its file, and whether it trains or validates."""

    id: str
    path: Path
    split: Split


@dataclass(frozen=True)
class Corpus:
    """A corpus on disk.

    Attributes:
        name: name of its folder.
        clips: recordings in the corpus's own order.
        ignored: audio files that are not used, each with the reason.
    """

    name: str
    clips: tuple[CorpusClip, ...]
    ignored: tuple[tuple[Path, str], ...]


def read_corpus(folder: Path) -> Corpus:
    """Lists the clips of a corpus and splits them into training and validation.

    LJSpeech's layout is `metadata.csv` with lines `ID|text|...`, `wavs/ID.wav` (or another kind of
    audio file, or in `wav/`), and optionally `val.txt`, the ids to keep out of training, one a
    line, or lines `ID|text`. A folder of audio files without `metadata.csv` is a corpus too; it may
    hold folders. Its ids are the files' paths in it without suffixes, in sorted order. Without
    `val.txt` about 2 % of the clips, chosen by a hash of their ids, are for validation.

    Both lists may name a clip by its id, by its file (`ID.wav`), or by any path to it
    (`wavs/ID.wav`, `./ID`, `/data/LJSpeech-1.1/wavs/ID.wav`).

    Args:
        folder: the corpus's folder.

    Raises:
        DataError: there is no such folder, it holds no audio or other corpora, or `metadata.csv`
            or `val.txt` name clips that are not there.

    Example:
        >>> corpus = read_corpus(Path("LJSpeech-1.1"))  # doctest: +SKIP
        >>> len(corpus.clips)  # doctest: +SKIP
        13100
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder} (expected a corpus with metadata.csv and wavs/)")
    metadata, listed = folder / "metadata.csv", folder / "val.txt"
    inner = [folder / name for name in _AUDIO_FOLDERS if (folder / name).is_dir()]
    audio_folder = inner[0] if inner else folder
    if not metadata.is_file():
        _check_no_corpora_in(folder)
    files, ignored = _audio_files(audio_folder)
    if not files:
        raise DataError(f"no audio in {audio_folder}: expected {', '.join(AUDIO_SUFFIXES)} files")
    # Without folders among the ids, any path ends in an id.
    names = {folder.name, folder.resolve().name, *_AUDIO_FOLDERS} if _has_folders(files) else set()
    ids = _metadata_ids(metadata, files, names) if metadata.is_file() else sorted(files)
    unlisted = [(files[i], "not in metadata.csv") for i in sorted(files.keys() - set(ids))]
    val = _listed_val_ids(listed, ids, names) if listed.is_file() else val_ids(ids)
    clips = tuple(CorpusClip(i, files[i], "val" if i in val else "train") for i in ids)
    return Corpus(shown(folder.resolve().name), clips, (*ignored, *unlisted))


def val_ids(ids: list[str]) -> set[str]:
    """Chooses about 2 % of the ids for validation, the same ones every time.

    The hash of an id decides about this id alone, so clips that are added or removed do not move
    the others. At least one id is chosen if there are two, and never all.
    """
    position = {i: int(hashlib.sha256(i.encode()).hexdigest()[:8], 16) / 2**32 for i in ids}
    ranked = sorted(position, key=lambda i: (position[i], i))
    chosen = sum(position[i] < VAL_FRACTION for i in ranked)
    return set(ranked[: min(max(chosen, 1), len(ranked) - 1)])


def select_ids(files: Sequence[Path], ids_file: Path) -> list[Path]:
    """Returns the files whose names without suffix are in a list, one a line, such as val.txt.

    Raises:
        DataError: the list cannot be read, or names a file that is not there.
    """
    by_id = {_id(path.stem): path for path in files}
    ids = [_find(name, by_id, set()) or name for name in _first_fields(ids_file)]
    if absent := [name for name in ids if name not in by_id]:
        raise DataError(
            f"{ids_file} names {len(absent)} clips that are not there: {absent[0]}, ..."
        )
    return [by_id[name] for name in ids]


def _check_no_corpora_in(folder: Path) -> None:
    """Refuses a folder of corpora: read as one corpus, each val.txt in it would be ignored."""
    inner = sorted(path.parent.name for path in folder.glob("*/metadata.csv"))
    if inner:
        raise DataError(
            f"{folder} holds {len(inner)} corpora ({', '.join(inner[:3])}"
            f"{', ...' if len(inner) > 3 else ''}): name each of them instead"
        )


def _audio_files(folder: Path) -> tuple[dict[str, Path], list[tuple[Path, str]]]:
    """Audio files below a folder by id, and those that are not used; hidden ones are left out."""
    found, ignored = [], []
    for full in folder.rglob("*"):
        path, suffix = full.relative_to(folder), full.suffix.lower()
        if any(part.startswith(".") for part in path.parts) or full.is_dir():
            continue
        if reason := why_unread(full):
            ignored.append((full, reason))
        elif suffix in AUDIO_SUFFIXES and not full.is_file():
            ignored.append((full, "it is a dangling link, or no plain file"))
        elif suffix in AUDIO_SUFFIXES and not _is_utf8(str(path)):
            ignored.append((full, "its name is not UTF-8: rename it"))
        elif suffix in AUDIO_SUFFIXES:
            found.append(path)
    files: dict[str, Path] = {}
    for path in sorted(found, key=lambda p: (AUDIO_SUFFIXES.index(p.suffix.lower()), p)):
        first = files.setdefault(_id(path.with_suffix("").as_posix()), folder / path)
        if first != folder / path:
            ignored.append((folder / path, f"{first.name} has the same id"))
    return files, sorted(ignored)


def _has_folders(ids: Iterable[str]) -> bool:
    return any("/" in i for i in ids)


def shown(name: object) -> str:
    """A name, path or message as text that any file can hold, whatever bytes a name has."""
    return str(name).encode("utf-8", "backslashreplace").decode("utf-8")


# Text that is stored, and may hold the name of a file.
StoredText = Annotated[str, BeforeValidator(shown)]


def _is_utf8(name: str) -> bool:
    return shown(name) == name


def _id(name: str) -> str:
    # macOS writes accents of file names as characters of their own, and lists do not.
    return unicodedata.normalize("NFC", name)


def _first_fields(path: Path) -> list[str]:
    """What stands before the first bar of each line, each once, without empty ones.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    # Only the ids matter, so a text in another encoding may be read wrongly.
    text = data.decode("utf-16" if is_utf16 else "utf-8-sig", errors="replace")
    # Texts hold other characters that Python takes for ends of lines: U+2028, form feeds.
    fields = (line.split("|")[0].strip() for line in re.split(r"[\r\n]+", text))
    return list(dict.fromkeys(field for field in fields if field))


def _find(name: str, files: Container[str], folders: set[str]) -> str | None:
    """The id of the clip that a list names by its id, its file, or a path to it.

    Args:
        files: the ids that there are.
        folders: names of folders that hold the audio. Only what follows one of them is looked
            up, or the file's name if no id has folders: another folder's file of this name is
            another clip.
    """
    parts = [part for part in _id(name).replace("\\", "/").split("/") if part not in ("", ".")]
    for start in range(len(parts)):
        if start and folders and parts[start - 1] not in folders:
            continue
        whole = "/".join(parts[start:])
        stem, suffix = os.path.splitext(whole)
        if whole in files:
            return whole
        if suffix.lower() in AUDIO_SUFFIXES and stem in files:
            return stem
    return None


def _found(path: Path, ids: Container[str], folders: set[str]) -> tuple[list[str], list[str]]:
    """The ids of the clips that a list names, and the names that it has for none."""
    names = _first_fields(path)
    found = {name: _find(name, ids, folders) for name in names}
    known = list(dict.fromkeys(i for i in found.values() if i is not None))
    return known, [name for name, i in found.items() if i is None]


def _metadata_ids(metadata: Path, files: dict[str, Path], folders: set[str]) -> list[str]:
    ids, missing = _found(metadata, files, folders)
    if not ids and not missing:
        raise DataError(f"{metadata} is empty: expected lines ID|text, or no such file")
    if missing:
        raise DataError(
            f"{metadata} names {len(missing)} of {len(ids) + len(missing)} clips that have no audio"
            f" file, the first is {missing[0]!r}: add the files or remove the lines"
        )
    return ids


def _listed_val_ids(path: Path, ids: list[str], folders: set[str]) -> set[str]:
    listed, unknown = _found(path, set(ids), folders)
    # A misspelt id would silently put a validation clip into training.
    if unknown:
        raise DataError(
            f"{path} names {len(unknown)} ids that the corpus does not have,"
            f" the first is {unknown[0]!r}: correct or remove them"
        )
    return set(listed)
