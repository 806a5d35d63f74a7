"""Finds the recordings of a corpus on disk: LJSpeech's layout, or a folder of audio files."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from waveflow.errors import DataError

Split = Literal["train", "val"]

# If two files have one id, the earlier suffix in this list wins.
CORPUS_SUFFIXES = (".wav", ".flac", ".aiff", ".aif", ".ogg", ".opus", ".mp3")

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
    audio file), and optionally `val.txt`, the ids to keep out of training, one a line. A folder of
    audio files without `metadata.csv` is a corpus too; it may hold folders. Its ids are the files'
    paths in it without suffixes, in sorted order. Without `val.txt` about 2 % of the clips, chosen
    by a hash of their ids, are for validation.

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
    audio_folder = folder / "wavs" if (folder / "wavs").is_dir() else folder
    if not metadata.is_file():
        _check_no_corpora_in(folder)
    files, ignored = _audio_files(audio_folder)
    if not files:
        raise DataError(f"no audio in {audio_folder}: expected {', '.join(CORPUS_SUFFIXES)} files")
    ids = _metadata_ids(metadata, files) if metadata.is_file() else sorted(files)
    unlisted = [(files[i], "not in metadata.csv") for i in sorted(files.keys() - set(ids))]
    val = _listed_val_ids(listed, ids) if listed.is_file() else val_ids(ids)
    clips = tuple(CorpusClip(i, files[i], "val" if i in val else "train") for i in ids)
    return Corpus(folder.resolve().name, clips, (*ignored, *unlisted))


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
    try:
        ids = ids_file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{ids_file} cannot be read as a list of ids: {error}") from error
    by_id = {path.stem: path for path in files}
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
    """Audio files below a folder by id, and those whose id is taken; hidden ones are left out."""
    found = [
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix.lower() in CORPUS_SUFFIXES and path.is_file()
    ]
    files: dict[str, Path] = {}
    ignored = []
    for path in sorted(found, key=lambda p: (CORPUS_SUFFIXES.index(p.suffix.lower()), p)):
        if any(part.startswith(".") for part in path.parts):
            continue
        first = files.setdefault(path.with_suffix("").as_posix(), folder / path)
        if first != folder / path:
            ignored.append((folder / path, f"{first.name} has the same id"))
    return files, ignored


def _metadata_ids(metadata: Path, files: dict[str, Path]) -> list[str]:
    # Only the ids matter, so a text in another encoding may be read wrongly.
    lines = metadata.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    ids = list(dict.fromkeys(line.split("|")[0].strip() for line in lines if line.strip()))
    ids = [i.removesuffix(Path(i).suffix) if Path(i).suffix in CORPUS_SUFFIXES else i for i in ids]
    if not ids:
        raise DataError(f"{metadata} is empty: expected lines ID|text, or no such file")
    missing = [i for i in ids if i not in files]
    if missing:
        raise DataError(
            f"{metadata} names {len(missing)} of {len(ids)} clips that have no audio file,"
            f" the first is {missing[0]!r}: add the files or remove the lines"
        )
    return ids


def _listed_val_ids(path: Path, ids: list[str]) -> set[str]:
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    listed = [line.strip() for line in lines if line.strip()]
    known = set(ids)
    unknown = [i for i in listed if i not in known]
    # A misspelt id would silently put a validation clip into training.
    if unknown:
        raise DataError(
            f"{path} names {len(unknown)} ids that the corpus does not have,"
            f" the first is {unknown[0]!r}: correct or remove them"
        )
    return set(listed)
