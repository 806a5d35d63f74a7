"""Turns corpora of audio files into a training cache, in one process or in many.

Each recording becomes a part, a file in a folder beside the cache. When all parts are there, they
are joined. So an interrupted `prepare` goes on where it stopped. Processes on several machines
need a disk in common.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy_format
from pydantic import ValidationError

from waveflow.audio.mel_config import MelConfig
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
    read_array,
    read_result,
    refuse,
)
from waveflow.data.corpus import Corpus, CorpusClip, read_corpus, shown, val_ids
from waveflow.data.report import LeftOut, PrepareReport, make_report
from waveflow.door import read_plain
from waveflow.errors import ConfigError, DataError
from waveflow.files import atomic_path, lock, reason_of
from waveflow.limits import WEIGHTS_BYTES
from waveflow.processes import ALONE, Group

Progress = Callable[[int, int], None]
# Beyond an octave nobody speaks.
SPEED_RANGE = 0.5, 2.0


def prepare(
    corpora: Sequence[Path],
    out: Path,
    mel: MelConfig,
    progress: Progress | None = None,
    workers: int | None = None,
    force: bool = False,
    mels: Path | None = None,
    group: Group = ALONE,
    speeds: Sequence[float] = (),
) -> PrepareReport:
    """Reads corpora, resamples them, tracks F0, and writes a training cache.

    Recordings that cannot be used are left out and listed. The results of an earlier call, finished
    or interrupted, are kept for files that have not changed. The cache is replaced when the new one
    is complete. Its contents do not depend on the number of processes.

    Args:
        corpora: folders that `read_corpus` understands, or archives of such folders.
        out: the cache's folder.
        mel: settings whose sample rate and hop length the cache gets.
        progress: called with (clips done, clips in all) of this process after each clip.
        workers: number of worker processes; None for one per core, 1 for this process alone. As
            with any process pool, a script that uses more than one guards its main part by
            `if __name__ == "__main__"`.
        force: whether recordings that are done already are done again.
        mels: folder of the mels (n_mels, frames), natural logarithms, that an acoustic model
            wrote along the recordings of one corpus: ID.npy, ID.npz or ID.pt. Training then takes
            these. If a mel and its audio differ by up to `MOST_FRAMES_OFF` frames, the longer one
            is cut.
        group: processes that share the work; each calls this with the same arguments.
        speeds: for each of them the recordings for training are there once more, played at so many
            times their speed: voices with other pitch and formants (Ko et al. 2015, "Audio
            Augmentation for Speech Recognition").

    Returns:
        What was done, the same report in all processes.

    Raises:
        DataError: a corpus or `mels` is wrong, no clip is usable, or `out` is something else than a
            cache or cannot be written.
        ConfigError: pyworld is not installed, another process makes this cache, or a speed is out
            of range or goes with mels.
    """
    _check_speeds(speeds, mels)
    out = Path(out).resolve()
    with _lock(out, group):
        job = _open_job(corpora, out, mel, force, mels, group, speeds)
        with _writing(job.out):
            kept = group.gather("parts", job.make_parts(group, progress, workers))
            return group.main_first(
                "cache", lambda: read_report(job.out) if kept is None else _join(job, sum(kept))
            )


def _check_speeds(speeds: Sequence[float], mels: Path | None) -> None:
    low, high = SPEED_RANGE
    for speed in speeds:
        if not low <= speed <= high or speed == 1:
            raise ConfigError(
                f"speed {speed:g}: give a number from {low:g} to {high:g}, and not 1, which is "
                "there anyway"
            )
    if len(set(speeds)) < len(speeds):
        raise ConfigError(f"speed {max(speeds, key=list(speeds).count):g} is given twice")
    if speeds and mels is not None:
        raise ConfigError(f"speed {speeds[0]:g}: the mels {mels} have the speed of the recordings")


class _Source(NamedTuple):
    """A clip of a corpus at a speed; `key` names its result."""

    corpus: str
    clip: CorpusClip
    mel: GivenMel | None
    key: str
    speed: float


class _Earlier(NamedTuple):
    """A cache from before, and its clips by their keys."""

    cache: TrainingCache
    clips: dict[str, tuple[CachedClip, ClipFacts]]


@dataclass(frozen=True)
class _Job:
    """The recordings to read, and the results of an earlier call."""

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
        """Returns the keys whose results are there."""
        if self.force:
            return set()
        names = os.listdir(self.parts) if self.parts.is_dir() else []
        # Half-written files begin with a dot. They give the empty key, which no recording has.
        found = {name.partition(".")[0] for name in names}
        return found if self.earlier is None else found | self.earlier.clips.keys()

    def make_parts(self, group: Group, progress: Progress | None, workers: int | None) -> int:
        """Makes the missing results of this process's share; returns how many were there."""
        share = {source.key: source for source in group.share(self.sources)}
        done = share.keys() & self.done()
        rate, hop = self.mel.sample_rate, self.mel.hop_length
        todo = [
            ClipTask(source.clip.path, key, self.parts, rate, hop, source.mel, source.speed)
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
        """Returns the facts of a recording, or why it is left out."""
        if self.earlier is not None and key in self.earlier.clips:
            return self.earlier.clips[key][1]
        return read_result(self.parts, key)

    def array(self, key: str, file: str) -> np.ndarray:
        """Returns a recording's part of a file of the cache."""
        if self.earlier is None or key not in self.earlier.clips:
            return read_array(self.parts, key, file.removesuffix(".npy"))
        clip, cache = self.earlier.clips[key][0], self.earlier.cache
        array = {AUDIO_FILE: cache.audio, F0_FILE: cache.f0, MEL_FILE: cache.mel}[file](clip)
        assert array is not None, "a key says whether a mel was given"
        return array


def _open_job(
    corpora: Sequence[Path],
    out: Path,
    mel: MelConfig,
    force: bool,
    mels: Path | None,
    group: Group,
    speeds: Sequence[float],
) -> _Job:
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
    folders = group.main_first("unpack", lambda: _unpacked(paths, out.parent))
    read = [read_corpus(folder) for folder in folders]
    settings = F0Settings().model_dump()
    extra_frames = int(mel.padding == "center")
    sources, ignored = [], []
    names = _distinct_names(read, folders)
    for speed, (name, corpus) in product((1.0, *speeds), zip(names, read, strict=True)):
        for clip in corpus.clips:
            if speed != 1 and clip.split == "val":
                continue  # validation hears real voices alone
            given = None if mels is None else GivenMel(mels / clip.id, mel.n_mels, extra_frames)
            key = clip_key(clip.path, mel.sample_rate, mel.hop_length, settings, given, speed)
            played = name if speed == 1 else f"{name} x{speed:g}"
            sources.append(_Source(played, clip, given, key, speed))
    for name, corpus in zip(names, read, strict=True):
        ignored += [
            LeftOut(file=str(path), corpus=name, reason="ignored", detail=f"{path}: {why}")
            for path, why in corpus.ignored
        ]
    earlier = None if force else _earlier(out)
    return _Job(out, mel, mels is not None, sources, ignored, earlier, force)


def _unpacked(paths: Sequence[Path], beside: Path) -> list[Path]:
    return [unpack(path, beside) if path.is_file() else path for path in paths]


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
    """The corpora's names. Folders of one name get parts of their paths until they differ."""
    names = [corpus.name for corpus in corpora]
    for length in range(2, max(len(folder.parts) for folder in folders) + 1):
        count = Counter(names)
        names = [
            shown("/".join(folder.parts[-length:])) if count[name] > 1 else name
            for name, folder in zip(names, folders, strict=True)
        ]
    return names


def _earlier(out: Path) -> _Earlier | None:
    """The cache in `out`, if there is a whole one."""
    try:
        cache = TrainingCache(out)
        cache.verify()
        report = read_report(out)
    except (DataError, OSError, ValidationError):
        return None
    pairs = zip(cache.manifest.clips, report.clips, strict=False)
    return _Earlier(cache, {facts.key: (clip, facts) for clip, facts in pairs})


def read_report(cache: Path) -> PrepareReport:
    """Reads the report in a cache's folder."""
    data = read_plain(cache / REPORT_FILE, WEIGHTS_BYTES, DataError, cache)
    return PrepareReport.model_validate_json(data)


@contextmanager
def _lock(out: Path, group: Group) -> Generator[None, None, None]:
    """Keeps other jobs off a cache and its parts; rank 0 does so for its group."""
    if group.rank > 0:
        yield
        return
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with lock(out.parent / f".{out.name}.lock", f"the cache {out}"):
        yield


@contextmanager
def _writing(out: Path) -> Generator[None, None, None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write the cache {out}: {reason_of(error, out)}") from error


def _join(job: _Job, kept: int) -> PrepareReport:
    """Makes the cache from the parts, and removes the parts."""
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
    """The clips of the cache, in their order, and those that are left out."""
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
    return _with_validation(job.sources, chosen), left_out


def _with_validation(
    sources: list[_Source], chosen: list[tuple[_Source, ClipFacts]]
) -> list[tuple[_Source, ClipFacts]]:
    """The clips, with others for validation in a corpus of which all of those were left out."""
    lost = {source.corpus for source in sources if source.clip.split == "val"}
    lost -= {source.corpus for source, _ in chosen if source.clip.split == "val"}
    for corpus in lost:
        val = val_ids([source.clip.id for source, _ in chosen if source.corpus == corpus])
        for index, (source, facts) in enumerate(chosen):
            if source.corpus == corpus and source.clip.id in val:
                clip = replace(source.clip, split="val")
                chosen[index] = source._replace(clip=clip), facts
    return chosen


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
    """Whether the earlier cache has the same content as the new one would have."""
    keys = list(earlier.clips)
    return list(earlier.cache.manifest.clips) == clips and keys == [f.key for f in report.clips]


def _write_cache(job: _Job, clips: list[CachedClip], report: PrepareReport) -> None:
    built, replaced = job.parts / "built", job.parts / "replaced"
    for folder in (built, replaced):
        shutil.rmtree(folder, ignore_errors=True)
    built.mkdir()
    n_samples, n_frames = clips[-1].sample_offset + clips[-1].samples, clips[-1].frame_offset
    n_frames += clips[-1].frames
    formats: dict[str, tuple[type, tuple[int, ...]]] = {
        AUDIO_FILE: (np.int16, (n_samples,)),
        F0_FILE: (np.float32, (n_frames,)),
    }
    if job.with_mels:
        formats[MEL_FILE] = (np.float32, (n_frames, job.mel.n_mels))
    for name, (dtype, shape) in formats.items():
        pieces = (job.array(facts.key, name) for facts in report.clips)
        _write_array(built / name, np.dtype(dtype), shape, pieces)
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
    """Works on the tasks in worker processes; yields after each."""
    if workers == 1 or len(tasks) < 2:
        yield from map(work, tasks)
        return
    waiting, suspects = tasks[::-1], list[ClipTask]()
    while waiting or suspects:
        # A worker that is killed, by hand or for its memory, ends its pool. All that the pool had
        # are suspects, and go into the next pool one by one.
        alone = bool(suspects)
        source = suspects if alone else waiting
        n_workers = 1 if alone else min(workers, len(waiting))
        held: list[ClipTask] = []
        try:
            with _pool(n_workers) as pool:
                futures: dict[Future[None], ClipTask] = {}
                while source or futures:
                    while source and len(futures) < (1 if alone else 2 * n_workers):
                        held.append(source.pop())
                        futures[pool.submit(work, held[-1])] = held[-1]
                    for future in wait(futures, return_when=FIRST_COMPLETED).done:
                        future.result()
                        held.remove(futures.pop(future))
                        yield
        except BrokenProcessPool:
            if not alone:
                suspects = held
                continue
            for task in held:
                refuse(task, Refusal(reason="unreadable", detail=f"{task.path}: {_KILLED}"))
                yield


_KILLED = "the process that read it was killed, perhaps because memory ran out"


def _pool(workers: int) -> ProcessPoolExecutor:
    # Not fork: a child of a process whose thread pools have run (torch's) can hang.
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=end_with_parent)


def _write_array(
    path: Path, dtype: np.dtype, shape: tuple[int, ...], pieces: Iterable[np.ndarray]
) -> None:
    """Writes a `.npy` file from pieces that are its rows, one piece in memory at a time."""
    header = {
        "descr": npy_format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": shape,
    }
    # Not a memory map: on a full disk a write to one kills the process.
    with open(path, "wb") as file:
        npy_format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype=dtype).data)
