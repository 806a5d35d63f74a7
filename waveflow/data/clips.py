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

from waveflow.audio.io import (
    MEL_SUFFIXES,
    atomic_path,
    read_audio,
    read_mel,
    resample,
    to_int16,
)
from waveflow.data.f0 import track_f0
from waveflow.errors import AudioError, DataError, MelMismatchError

Reason = Literal[
    "unreadable",
    "too short",
    "silent",
    "clipped",
    "duplicate",
    "ignored",
    "no mel",
    "bad mel",
    "mel length",
]

# -60 dB below full scale: the noise of a quiet room lies there, no speech does.
SILENCE_RMS = 1e-3
# Of a clip's samples; loud recordings touch full scale now and then, distorted ones stay there.
MOST_CLIPPED = 0.01

# Frames. Acoustic models under teacher forcing differ at a clip's end; more is another clip's mel.
MOST_FRAMES_OFF = 3

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
    """A clip as the cache holds it.

    Attributes:
        audio: (T,) int16.
        f0: (frames,) float32, with T // hop_length frames.
        mel: (frames, n_mels) float32, where one was given.
    """

    facts: ClipFacts
    audio: np.ndarray
    f0: np.ndarray
    mel: np.ndarray | None


class Refusal(BaseModel):
    """Why a recording is left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reason: Reason
    detail: str


class GivenMel(NamedTuple):
    """The mel that an acoustic model wrote for a recording, to train on in place of its own.

    Attributes:
        stem: the file without its suffix, the first of `MEL_SUFFIXES` that is there.
        n_mels: bands that it must have.
        extra_frames: frames that it has beyond the recording's whole hops: one if centred.
    """

    stem: Path
    n_mels: int
    extra_frames: int

    def path(self) -> Path | None:
        """The file, if there is one."""
        paths = [Path(f"{self.stem}{suffix}") for suffix in MEL_SUFFIXES]
        return next((path for path in paths if path.is_file()), None)


class ClipTask(NamedTuple):
    """A recording to be read, and where its result goes.

    Attributes:
        path: the recording.
        key: names the result in `parts`.
        parts: folder of results.
        sample_rate: of the cache, in Hz.
        hop_length: of the cache, in samples.
        mel: None to keep no mel.
    """

    path: Path
    key: str
    parts: Path
    sample_rate: int
    hop_length: int
    mel: GivenMel | None


def clip_key(
    path: Path, sample_rate: int, hop_length: int, f0_settings: dict, mel: GivenMel | None
) -> str:
    """A name for what becomes of a file: another one once it, its mel or a setting changes."""
    parts: list[object] = [*_version(path), sample_rate, hop_length, f0_settings]
    if mel is not None:
        mel_path = mel.path()
        parts += [mel.n_mels, mel.extra_frames, mel_path and _version(mel_path)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _version(path: Path) -> list[str | int]:
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


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
        arrays = {"audio": result.audio, "f0": result.f0}
        if result.mel is not None:
            arrays["mel"] = result.mel
        np.savez(temporary, allow_pickle=False, facts=facts, **arrays)


def read_clip(task: ClipTask) -> Clip | Refusal:
    """Reads a recording, measures it, resamples it and tracks its F0."""
    path, hop = task.path, task.hop_length
    mel = None if task.mel is None else _read_given(task.mel)
    if isinstance(mel, Refusal):
        return mel
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
    if task.mel is not None and mel is not None:
        n_frames, expected = len(mel), len(f0) + task.mel.extra_frames
        if abs(n_frames - expected) > MOST_FRAMES_OFF:
            detail = f"{task.mel.path()} has {n_frames} frames, {path} has {expected}"
            return Refusal(reason="mel length", detail=detail)
        if n_frames > expected:
            notes.append(f"mel cut to its audio by {n_frames - expected} frames")
        if n_frames < len(f0):
            notes.append(f"audio cut to its mel by {len(f0) - n_frames} frames")
            samples, f0 = samples[: n_frames * hop], f0[:n_frames]
        mel = mel[: len(f0)]
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
    return Clip(facts, samples, f0, mel)


def _read_given(mel: GivenMel) -> np.ndarray | Refusal:
    """The given mel, (frames, n_mels) float32."""
    path = mel.path()
    if path is None:
        detail = f"there is no mel {mel.stem} ({', '.join(MEL_SUFFIXES)})"
        return Refusal(reason="no mel", detail=detail)
    try:
        values = read_mel(path)
    except MelMismatchError as error:
        return Refusal(reason="bad mel", detail=str(error))
    if len(values) != mel.n_mels:
        detail = f"{path} has shape {values.shape}; ({mel.n_mels} bands, frames) is expected"
        return Refusal(reason="bad mel", detail=detail)
    return values.T


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


def read_arrays(parts: Path, key: str) -> dict[str, np.ndarray]:
    """The arrays of a `Clip` that `make_part` wrote, by name: audio, f0, and mel where given.

    Raises:
        DataError: the part is missing or damaged.
    """
    try:
        with np.load(parts / f"{key}.npz", allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files if name != "facts"}
    except _UNREADABLE as error:
        raise _damaged(parts, key) from error


def _damaged(parts: Path, key: str) -> DataError:
    return DataError(f"part {key} in {parts} is damaged: remove that folder, then prepare again")
