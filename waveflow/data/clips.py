"""One recording for the training cache: read, measured, refused or taken.

Workers of `prepare` import this module, so it does not import torch.
"""

import hashlib
import json
import os
import threading
import zipfile
from multiprocessing import parent_process
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveInt

from waveflow.audio.io import atomic_path, read_audio, resample, to_int16
from waveflow.data.f0 import track_f0
from waveflow.errors import AudioError, DataError

Reason = Literal["unreadable", "too short", "silent", "clipped", "duplicate", "ignored"]

# -60 dB below full scale: the noise of a quiet room lies there, no speech does.
SILENCE_RMS = 1e-3
# Of a clip's samples; loud recordings touch full scale now and then, distorted ones stay there.
MOST_CLIPPED = 0.01

# What reading a part that is cut short or overwritten can raise.
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)

# The greatest positive 16-bit sample, with room for rounding.
_FULL_SCALE = 32766.5 / 32768


class ClipFacts(BaseModel):
    """What a recording is, as the report tells.

    Attributes:
        file: where it was read from.
        key: hash of the file's path, size and time and of the cache's settings.
        sha256: of the cached audio, for duplicates.
        samples, frames: length in the cache.
        source_rate: of the file, in Hz.
        silence: share of its hops below -60 dB of full scale.
        clipped: share of the file's samples that stay at full scale, three in a row or more.
        notes: what reading did to it (mixed down, resampled).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    key: str
    sha256: str
    samples: PositiveInt
    frames: PositiveInt
    source_rate: PositiveInt
    silence: NonNegativeFloat
    clipped: NonNegativeFloat
    notes: tuple[str, ...]


class Clip(NamedTuple):
    """A clip as the cache holds it: audio (T,) int16, f0 (T // hop_length,) float32."""

    facts: ClipFacts
    audio: np.ndarray
    f0: np.ndarray


class Refusal(BaseModel):
    """Why a recording is left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reason: Reason
    detail: str


class ClipTask(NamedTuple):
    """A recording to be read, and where its result goes.

    Attributes:
        path: the recording.
        key: names the result in `parts`.
        parts: folder of results.
        sample_rate: of the cache, in Hz.
        hop_length: of the cache, in samples.
    """

    path: Path
    key: str
    parts: Path
    sample_rate: int
    hop_length: int


def clip_key(path: Path, sample_rate: int, hop_length: int, f0_settings: dict) -> str:
    """A name for what becomes of a file: another one once the file or a setting changes."""
    status = path.stat()
    parts = [str(path), status.st_size, status.st_mtime_ns, sample_rate, hop_length, f0_settings]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def end_with_parent() -> None:
    """Ends this worker when the process that started it is killed: a pool alone waits for ever."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make_part(task: ClipTask) -> None:
    """Reads a recording and writes what becomes of it, whole or not at all.

    Raises:
        ConfigError: pyworld is not installed.
    """
    result = read_clip(task)
    if isinstance(result, Refusal):
        with atomic_path(task.parts / f"{task.key}.json") as temporary:
            temporary.write_text(result.model_dump_json(), encoding="utf-8")
        return
    facts = np.frombuffer(result.facts.model_dump_json().encode(), np.uint8)
    with atomic_path(task.parts / f"{task.key}.npz") as temporary:
        np.savez(temporary, facts=facts, audio=result.audio, f0=result.f0)


def read_clip(task: ClipTask) -> Clip | Refusal:
    """Reads a recording, measures it, resamples it and tracks its F0."""
    path, hop = task.path, task.hop_length
    try:
        audio, source_rate, notes = read_audio(path)
    except AudioError as error:
        return Refusal(reason="unreadable", detail=str(error))
    clipped = clipped_share(audio)
    if clipped > MOST_CLIPPED:
        detail = f"{path} is clipped: {100 * clipped:.1f} % of its samples stay at full scale"
        return Refusal(reason="clipped", detail=detail)
    if source_rate != task.sample_rate:
        audio = resample(audio, source_rate, task.sample_rate)
        notes.append(f"resampled from {source_rate} Hz to {task.sample_rate} Hz")
    if len(audio) < hop:
        detail = f"{path} is shorter than one hop: {len(audio)} of {hop} samples"
        return Refusal(reason="too short", detail=detail)
    silence = silent_share(audio, hop)
    if silence == 1:
        return Refusal(reason="silent", detail=f"{path} is silent: nowhere above -60 dB")
    f0 = track_f0(audio, task.sample_rate, hop)
    samples = to_int16(audio)
    facts = ClipFacts(
        file=str(path),
        key=task.key,
        sha256=hashlib.sha256(samples.tobytes()).hexdigest(),
        samples=len(samples),
        frames=len(f0),
        source_rate=source_rate,
        silence=silence,
        clipped=clipped,
        notes=tuple(notes),
    )
    return Clip(facts, samples, f0)


def clipped_share(audio: np.ndarray) -> float:
    """Share of the samples of audio (T,) in runs of three or more at full scale."""
    full = np.abs(audio) >= _FULL_SCALE
    middle = full[:-2] & full[1:-1] & full[2:]
    in_run = np.zeros(len(audio), bool)
    for shift in range(3):
        in_run[shift : shift + len(middle)] |= middle
    return float(in_run.mean())


def silent_share(audio: np.ndarray, hop_length: int) -> float:
    """Share of the whole hops of audio (T,) below -60 dB of full scale."""
    hops = audio[: len(audio) // hop_length * hop_length].reshape(-1, hop_length)
    return float((np.square(hops, dtype=np.float64).mean(1) < SILENCE_RMS**2).mean())


def read_result(parts: Path, key: str) -> ClipFacts | Refusal:
    """What `make_part` found out, without its audio.

    Raises:
        DataError: the part is missing or damaged.
    """
    refusal = parts / f"{key}.json"
    try:
        if refusal.is_file():
            return Refusal.model_validate_json(refusal.read_bytes())
        with np.load(parts / f"{key}.npz", allow_pickle=False) as arrays:
            return ClipFacts.model_validate_json(arrays["facts"].tobytes())
    except _UNREADABLE as error:
        raise _damaged(parts, key) from error


def read_arrays(parts: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """The audio (T,) int16 and F0 (frames,) float32 that `make_part` wrote.

    Raises:
        DataError: the part is missing or damaged.
    """
    try:
        with np.load(parts / f"{key}.npz", allow_pickle=False) as arrays:
            return arrays["audio"], arrays["f0"]
    except _UNREADABLE as error:
        raise _damaged(parts, key) from error


def _damaged(parts: Path, key: str) -> DataError:
    return DataError(f"part {key} in {parts} is damaged: remove that folder, then prepare again")
