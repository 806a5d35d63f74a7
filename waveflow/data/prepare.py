"""From corpora of audio files to a training cache, in one process or in many.

Each recording becomes a part, a file beside the cache that is there whole or not at all; when all
are there they are joined. So an interrupted `prepare` goes on where it stopped, and processes that
share the work need a common disk, and to tell when they are done.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.lib import format as npy_format
from pydantic import ValidationError

from waveflow.audio.io import atomic_path
from waveflow.audio.mel import MelConfig
from waveflow.data.archives import unpack
from waveflow.data.cache import (
    AUDIO_FILE,
    F0_FILE,
    MANIFEST_FILE,
    MEL_FILE,
    REPORT_FILE,
    CachedClip,
    F0Settings,
    Manifest,
    TrainingCache,
    file_sha256,
)
from waveflow.data.clips import (
    ClipFacts,
    ClipTask,
    GivenMel,
    Refusal,
    clip_key,
    end_with_parent,
    make_part,
    read_arrays,
    read_result,
)
from waveflow.data.corpus import Corpus, CorpusClip, read_corpus
from waveflow.data.report import LeftOut, PrepareReport, make_report
from waveflow.errors import DataError

Progress = Callable[[int, int], None]


def prepare(
    corpora: Sequence[Path],
    out: Path,
    mel: MelConfig,
    progress: Progress | None = None,
    workers: int | None = None,
    force: bool = False,
    n_shards: int = 1,
    wait: Callable[[], int] = lambda: 0,
    mels: Path | None = None,
) -> PrepareReport:
    """Reads corpora, resamples them, tracks F0, and writes a training cache.

    Recordings that cannot be used are left out and listed. What an earlier call has done, whether
    it was interrupted or not, is kept for files that have not changed. The cache is replaced when
    the new one is complete; its contents do not depend on who did the work.

    Args:
        corpora: folders that `read_corpus` understands, or archives of such.
        out: the cache's folder.
        mel: its sample rate and hop length decide the cache's.
        progress: called with (clips done, clips in all) after each clip.
        workers: number of processes; None for one per core, 1 for this process alone. As with any
            process pool, a script that uses more than one guards its main part by
            `if __name__ == "__main__"`.
        force: whether recordings that are done already are done again.
        n_shards: number of processes that share the work, each on all cores or on `workers`. This
            is number 0, which joins what the others (`prepare_shard`) have made.
        wait: called after this process's share; when the others are done too, it returns how many
            recordings these have kept from before.
        mels: folder of the mels (n_mels, frames), natural logarithms, that an acoustic model
            wrote along the recordings of one corpus, ID.npy, ID.npz or ID.pt. Training then takes
            these. What a mel or its audio has beyond the other, up to `MOST_FRAMES_OFF` frames,
            is cut off.

    Raises:
        DataError: a corpus or `mels` is wrong, no clip is usable, or `out` is something else than a
            cache or cannot be written.
        ConfigError: pyworld is not installed.
    """
    job = _open_job(corpora, out, mel, force, mels, is_first=True)
    with _writing(job.out):
        kept = job.make_parts(0, n_shards, progress, workers)
        return _join(job, kept + wait())


def prepare_shard(
    corpora: Sequence[Path],
    out: Path,
    mel: MelConfig,
    shard: tuple[int, int],
    workers: int | None = None,
    force: bool = False,
    mels: Path | None = None,
) -> int:
    """Does the share (number from 1 on, number of shares) of a `prepare` with as many shards.

    Number 0 calls `prepare`, which joins them. Arguments and errors are as there.

    Returns:
        How many recordings of the share were done before.
    """
    job = _open_job(corpora, out, mel, force, mels, is_first=False)
    with _writing(job.out):
        return job.make_parts(*shard, None, workers)


class _Source(NamedTuple):
    """A clip of a corpus, and the name of what becomes of it."""

    corpus: str
    clip: CorpusClip
    mel: GivenMel | None
    key: str


class _Earlier(NamedTuple):
    """A cache that is there already, and its clips by their keys."""

    cache: TrainingCache
    clips: dict[str, tuple[CachedClip, ClipFacts]]


@dataclass(frozen=True)
class _Job:
    """What is to be read, and what of it is done."""

    out: Path
    mel: MelConfig
    with_mels: bool
    sources: list[_Source]
    ignored: list[LeftOut]
    earlier: _Earlier | None
    force: bool

    @property
    def parts(self) -> Path:
        return self.out.parent / f".{self.out.name}.parts"

    def done(self) -> set[str]:
        """Keys whose result is there."""
        if self.force:
            return set()
        names = os.listdir(self.parts) if self.parts.is_dir() else []
        # Those that begin with a dot are being written, or were when a process was killed.
        found = {name.partition(".")[0] for name in names}
        return found if self.earlier is None else found | self.earlier.clips.keys()

    def make_parts(
        self, index: int, n_shards: int, progress: Progress | None, workers: int | None
    ) -> int:
        """Does what is not done of the share `index` of `n_shards`; returns how much was done."""
        share = {source.key: source for source in self.sources[index::n_shards]}
        done = share.keys() & self.done()
        rate, hop = self.mel.sample_rate, self.mel.hop_length
        todo = [
            ClipTask(source.clip.path, key, self.parts, rate, hop, source.mel)
            for key, source in share.items()
            if key not in done
        ]
        self.parts.mkdir(parents=True, exist_ok=True)
        with closing(_map(make_part, todo, workers or os.cpu_count() or 1)) as results:
            for count, _ in enumerate(results, start=len(done) + 1):
                if progress:
                    progress(count, len(share))
        return len(done)

    def result(self, key: str) -> ClipFacts | Refusal:
        """What became of a recording."""
        if self.earlier is not None and key in self.earlier.clips:
            return self.earlier.clips[key][1]
        return read_result(self.parts, key)

    def arrays(self, key: str) -> dict[str, np.ndarray]:
        """The arrays of a recording that was taken, by the file of the cache they belong in."""
        if self.earlier is not None and key in self.earlier.clips:
            clip, cache = self.earlier.clips[key][0], self.earlier.cache
            arrays = {AUDIO_FILE: cache.audio(clip), F0_FILE: cache.f0(clip)}
            mel = cache.mel(clip)
            return arrays if mel is None else arrays | {MEL_FILE: mel}
        return {f"{name}.npy": array for name, array in read_arrays(self.parts, key).items()}


def _open_job(
    corpora: Sequence[Path],
    out: Path,
    mel: MelConfig,
    force: bool,
    mels: Path | None,
    is_first: bool,
) -> _Job:
    out = Path(out).resolve()
    _check_replaceable(out)
    paths = [Path(path).resolve() for path in corpora]
    if not paths:
        raise DataError("no corpus is given: name at least one folder")
    if len(set(paths)) < len(paths):
        raise DataError(f"a corpus is given twice: {', '.join(map(str, corpora))}")
    if mels is not None:
        mels = Path(mels).resolve()
        if not mels.is_dir():
            raise DataError(f"no such folder of mels: {mels}")
        if len(paths) > 1:
            raise DataError(f"mels go with one corpus, and {len(paths)} are given")
    folders = [unpack(path, out.parent, is_first) if path.is_file() else path for path in paths]
    read = [read_corpus(folder) for folder in folders]
    settings = F0Settings().model_dump()
    extra_frames = int(mel.padding == "center")
    sources, ignored = [], []
    for name, corpus in zip(_distinct_names(read, folders), read, strict=True):
        for clip in corpus.clips:
            given = None if mels is None else GivenMel(mels / clip.id, mel.n_mels, extra_frames)
            key = clip_key(clip.path, mel.sample_rate, mel.hop_length, settings, given)
            sources.append(_Source(name, clip, given, key))
        ignored += [
            LeftOut(file=str(path), corpus=name, reason="ignored", detail=f"{path}: {why}")
            for path, why in corpus.ignored
        ]
    earlier = None if force else _earlier(out)
    return _Job(out, mel, mels is not None, sources, ignored, earlier, force)


def _check_replaceable(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out} is a file: name a folder for the cache")
    names = {path.name for path in out.iterdir()}
    ours = {AUDIO_FILE, F0_FILE, MEL_FILE, MANIFEST_FILE, REPORT_FILE}
    if names and (MANIFEST_FILE not in names or names - ours):
        raise DataError(f"{out} holds something else than a training cache: name another folder")


def _distinct_names(corpora: list[Corpus], folders: list[Path]) -> list[str]:
    """The corpora's names; folders of one name get as much of their paths as tells them apart."""
    names = [corpus.name for corpus in corpora]
    for length in range(2, max(len(folder.parts) for folder in folders) + 1):
        count = Counter(names)
        names = [
            "/".join(folder.parts[-length:]) if count[name] > 1 else name
            for name, folder in zip(names, folders, strict=True)
        ]
    return names


def _earlier(out: Path) -> _Earlier | None:
    """The cache in `out`, if there is one and it is whole."""
    try:
        cache = TrainingCache(out)
        cache.verify()
        report = PrepareReport.model_validate_json((out / REPORT_FILE).read_bytes())
    except (DataError, OSError, ValidationError):
        return None
    pairs = zip(cache.manifest.clips, report.clips, strict=False)
    return _Earlier(cache, {facts.key: (clip, facts) for clip, facts in pairs})


@contextmanager
def _writing(out: Path) -> Generator[None, None, None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write the cache {out}: {error.strerror or error}") from error


def _join(job: _Job, kept: int) -> PrepareReport:
    """Makes the cache of the parts, and removes them."""
    chosen, left_out = _choose(job)
    if not chosen:
        shutil.rmtree(job.parts)
        first = left_out[0].detail
        raise DataError(f"none of {len(job.sources)} clips is usable, the first: {first}")
    clips = _lay_out(chosen)
    report = make_report(
        job.mel.sample_rate, clips, [facts for _, facts in chosen], [*left_out, *job.ignored], kept
    )
    if job.earlier is not None and _is_the_same(job.earlier, clips, report):
        with atomic_path(job.out / REPORT_FILE) as temporary:
            temporary.write_text(report.model_dump_json(indent=1), encoding="utf-8")
    else:
        _write_cache(job, clips, report)
    shutil.rmtree(job.parts, ignore_errors=True)
    return report


def _choose(job: _Job) -> tuple[list[tuple[_Source, ClipFacts]], list[LeftOut]]:
    """The clips that make the cache, in their order, and those that do not."""
    chosen: list[tuple[_Source, ClipFacts]] = []
    left_out = []
    first_of: dict[str, str] = {}
    for source in job.sources:
        result, file = job.result(source.key), str(source.clip.path)
        if isinstance(result, ClipFacts):
            first = first_of.get(result.sha256)
            if first is None:
                first_of[result.sha256] = file
                chosen.append((source, result))
                continue
            result = Refusal(reason="duplicate", detail=f"{file} has the same audio as {first}")
        left_out.append(
            LeftOut(file=file, corpus=source.corpus, reason=result.reason, detail=result.detail)
        )
    return chosen, left_out


def _lay_out(chosen: list[tuple[_Source, ClipFacts]]) -> list[CachedClip]:
    clips = []
    sample_offset = frame_offset = 0
    for source, facts in chosen:
        clips.append(
            CachedClip(
                id=source.clip.id,
                corpus=source.corpus,
                split=source.clip.split,
                sample_offset=sample_offset,
                samples=facts.samples,
                frame_offset=frame_offset,
                frames=facts.frames,
            )
        )
        sample_offset += facts.samples
        frame_offset += facts.frames
    return clips


def _is_the_same(earlier: _Earlier, clips: list[CachedClip], report: PrepareReport) -> bool:
    """Whether the cache that is there is the one that would be written."""
    keys = list(earlier.clips)
    return list(earlier.cache.manifest.clips) == clips and keys == [f.key for f in report.clips]


def _write_cache(job: _Job, clips: list[CachedClip], report: PrepareReport) -> None:
    built, replaced = job.parts / "built", job.parts / "replaced"
    for folder in (built, replaced):
        shutil.rmtree(folder, ignore_errors=True)
    built.mkdir()
    formats: dict[str, tuple[type, tuple[int, ...]]] = {
        AUDIO_FILE: (np.int16, ()),
        F0_FILE: (np.float32, ()),
    }
    if job.with_mels:
        formats[MEL_FILE] = (np.float32, (job.mel.n_mels,))
    with ExitStack() as stack:
        arrays = {
            name: stack.enter_context(_GrowingArray(built / name, np.dtype(dtype), row))
            for name, (dtype, row) in formats.items()
        }
        for facts in report.clips:
            for name, piece in job.arrays(facts.key).items():
                arrays[name].append(piece)
    manifest = Manifest(
        sample_rate=job.mel.sample_rate,
        hop_length=job.mel.hop_length,
        f0=F0Settings(),
        n_mels=job.mel.n_mels if job.with_mels else None,
        sha256={name: file_sha256(built / name) for name in formats},
        clips=tuple(clips),
    )
    for name, content in ((MANIFEST_FILE, manifest), (REPORT_FILE, report)):
        (built / name).write_text(content.model_dump_json(indent=1), encoding="utf-8")
    if job.out.exists():
        job.out.rename(replaced)
    built.rename(job.out)


def _map(
    work: Callable[[ClipTask], None], tasks: list[ClipTask], workers: int
) -> Generator[None, None, None]:
    if workers == 1 or len(tasks) < 2:
        yield from map(work, tasks)
        return
    # A forked child of a process whose thread pools have run (torch's) can hang; spawn cannot.
    n_workers, context = min(workers, len(tasks)), get_context("spawn")
    with ProcessPoolExecutor(n_workers, context, initializer=end_with_parent) as pool:
        yield from pool.map(work, tasks)


class _GrowingArray:
    """A `.npy` file that is written piece by piece, in rows of one shape (() for numbers)."""

    def __init__(self, path: Path, dtype: np.dtype, row: tuple[int, ...]) -> None:
        self.length = 0
        self._dtype = dtype
        self._row = row
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
            "shape": (self.length, *self._row),
        }
        npy_format.write_array_header_1_0(self._file, header)
