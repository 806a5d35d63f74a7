"""From corpora of audio files to a training cache."""

import functools
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.lib import format as npy_format

from waveflow.audio.io import read_audio, to_int16
from waveflow.audio.mel import MelConfig
from waveflow.data.cache import (
    AUDIO_FILE,
    F0_FILE,
    MANIFEST_FILE,
    CachedClip,
    F0Settings,
    Manifest,
    file_sha256,
)
from waveflow.data.f0 import track_f0
from waveflow.data.ljspeech import Corpus, CorpusClip, read_corpus
from waveflow.errors import AudioError, DataError

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` wrote.

    Attributes:
        train_clips: number of clips for training.
        val_clips: number of clips kept out of training.
        train_hours: hours of audio for training.
        val_hours: hours of audio kept out of training.
        skipped: one line for each file that was left out, with the reason.
        notes: what reading did to files (mixed down, resampled), with the number of clips.
    """

    train_clips: int
    val_clips: int
    train_hours: float
    val_hours: float
    skipped: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _ReadClip:
    """A clip as the cache holds it: audio (T,) int16, f0 (T // hop_length,) float32."""

    audio: np.ndarray
    f0: np.ndarray
    notes: tuple[str, ...]


def prepare(
    corpora: Sequence[Path],
    out: Path,
    mel: MelConfig,
    progress: Progress | None = None,
    workers: int | None = None,
) -> PrepareReport:
    """Reads corpora, resamples them, tracks F0, and writes a training cache.

    The cache is built beside `out` and moved there when it is complete; a cache that is already
    there is replaced. Its contents do not depend on the number of workers.

    Args:
        corpora: folders that `read_corpus` understands.
        out: the cache's folder.
        mel: its sample rate and hop length decide the cache's.
        progress: called with (clips done, clips in all) after each clip.
        workers: number of processes; None for one per core, 1 for this process alone. As with any
            process pool, a script that uses more than one guards its main part by
            `if __name__ == "__main__"`.

    Raises:
        DataError: a corpus is wrong, no clip is usable, or `out` is something else than a cache or
            cannot be written.
        ConfigError: pyworld is not installed.
    """
    out = Path(out).resolve()
    _check_replaceable(out)
    folders = [Path(path).resolve() for path in corpora]
    if not folders:
        raise DataError("no corpus is given: name at least one folder")
    if len(set(folders)) < len(folders):
        raise DataError(f"a corpus is given twice: {', '.join(map(str, corpora))}")
    sources = [read_corpus(path) for path in folders]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            built = Path(scratch, "built")
            built.mkdir()
            report = _build(sources, built, mel, progress, workers or os.cpu_count() or 1)
            if out.exists():
                out.rename(Path(scratch, "old"))
            built.rename(out)
    except OSError as error:
        raise DataError(f"cannot write the cache {out}: {error.strerror or error}") from error
    return report


def _check_replaceable(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out} is a file: name a folder for the cache")
    names = {path.name for path in out.iterdir()}
    if names and (MANIFEST_FILE not in names or names - {AUDIO_FILE, F0_FILE, MANIFEST_FILE}):
        raise DataError(f"{out} holds something else than a training cache: name another folder")


def _build(
    corpora: list[Corpus], folder: Path, mel: MelConfig, progress: Progress | None, workers: int
) -> PrepareReport:
    sources = [(corpus.name, clip) for corpus in corpora for clip in corpus.clips]
    work = functools.partial(_read_clip, sample_rate=mel.sample_rate, hop_length=mel.hop_length)
    with closing(_ordered_map(work, [clip.path for _, clip in sources], workers)) as results:
        clips, skipped, notes = _write_arrays(sources, results, folder, progress)
    if not clips:
        raise DataError(f"none of {len(sources)} clips is usable, the first: {skipped[0]}")
    manifest = Manifest(
        sample_rate=mel.sample_rate,
        hop_length=mel.hop_length,
        f0=F0Settings(),
        mel=mel.model_dump(mode="json"),
        sha256={name: file_sha256(folder / name) for name in (AUDIO_FILE, F0_FILE)},
        clips=tuple(clips),
    )
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    return _report(manifest, skipped, notes)


def _write_arrays(
    sources: list[tuple[str, CorpusClip]],
    results: Iterable[_ReadClip | str],
    folder: Path,
    progress: Progress | None,
) -> tuple[list[CachedClip], list[str], Counter[str]]:
    """Writes clips as they come; returns where they lie, what was left out, and reading's notes."""
    clips: list[CachedClip] = []
    skipped: list[str] = []
    notes: Counter[str] = Counter()
    with (
        _GrowingArray(folder / AUDIO_FILE, np.dtype(np.int16)) as audio,
        _GrowingArray(folder / F0_FILE, np.dtype(np.float32)) as f0,
    ):
        for (corpus, source), result in zip(sources, results, strict=True):
            if isinstance(result, str):
                skipped.append(result)
            else:
                clips.append(
                    CachedClip(
                        id=source.id,
                        corpus=corpus,
                        split=source.split,
                        sample_offset=audio.length,
                        samples=len(result.audio),
                        frame_offset=f0.length,
                        frames=len(result.f0),
                    )
                )
                audio.append(result.audio)
                f0.append(result.f0)
                notes.update(result.notes)
            if progress:
                progress(len(clips) + len(skipped), len(sources))
    return clips, skipped, notes


def _report(manifest: Manifest, skipped: list[str], notes: Counter[str]) -> PrepareReport:
    samples = {"train": 0, "val": 0}
    for clip in manifest.clips:
        samples[clip.split] += clip.samples
    count = Counter(clip.split for clip in manifest.clips)
    return PrepareReport(
        train_clips=count["train"],
        val_clips=count["val"],
        train_hours=samples["train"] / manifest.sample_rate / 3600,
        val_hours=samples["val"] / manifest.sample_rate / 3600,
        skipped=tuple(skipped),
        notes=tuple(
            f"{note} ({number} of {len(manifest.clips)} clips)" for note, number in notes.items()
        ),
    )


def _read_clip(path: Path, sample_rate: int, hop_length: int) -> _ReadClip | str:
    """Reads a clip; a string says why it cannot be used."""
    try:
        audio, _, notes = read_audio(path, sample_rate)
    except AudioError as error:
        return str(error)
    if len(audio) < hop_length:
        return f"{path} is shorter than one hop: {len(audio)} of {hop_length} samples"
    f0 = track_f0(audio, sample_rate, hop_length)
    return _ReadClip(to_int16(audio), f0, tuple(notes))


def _ordered_map(
    work: Callable[[Path], _ReadClip | str], paths: list[Path], workers: int
) -> Generator[_ReadClip | str, None, None]:
    if workers == 1:
        yield from map(work, paths)
        return
    # A forked child of a process whose thread pools have run (torch's) can hang; spawn cannot.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, paths)


class _GrowingArray:
    """A one-dimensional `.npy` file that is written piece by piece."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.length = 0
        self._dtype = dtype
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._write_header()

    def append(self, piece: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(piece, dtype=self._dtype).data)
        self.length += len(piece)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            self._file.seek(0)
            self._write_header()

    def _write_header(self) -> None:
        # numpy pads the header so that the first axis can grow without moving the data.
        header = {
            "descr": npy_format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self.length,),
        }
        npy_format.write_array_header_1_0(self._file, header)
