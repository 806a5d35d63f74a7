"""Reads and measures one recording for the training cache, and takes or refuses it.

Workers of `prepare` import this module, so it does not import torch.
"""

import hashlib
import json
import os
import threading
import unicodedata
import zipfile
from multiprocessing import parent_process
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveInt

from waveflow.audio.f0 import track_f0
from waveflow.audio.io import MEL_SUFFIXES, read_channel, read_mel, resample, to_int16
from waveflow.audio.samples import without_offset
from waveflow.data.corpus import StoredText
from waveflow.errors import AudioError, ConfigError, DataError, MelMismatchError, fault
from waveflow.files import atomic_path

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
    "internal error",
]
# The reason that is a fault of ours.
FAULT: Reason = "internal error"

# 60 dB below full scale: the level of noise in a quiet room, and of no speech.
SILENCE_RMS = 1e-3
# Share of a clip's samples. Loud recordings touch full scale briefly, distorted ones stay there.
MOST_CLIPPED = 0.01

# Frames. Acoustic models under teacher forcing miss a clip's end by a few; a mel that misses it by
# more belongs to another clip.
MOST_FRAMES_OFF = 3

# Changes when recordings are read in another way, so that results from before are made again.
_READING = "without DC offset"

# Errors of reading a part that is cut short or overwritten.
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)

# The greatest positive 16-bit sample, with room for rounding.
_FULL_SCALE = 32766.5 / 32768


class ClipFacts(BaseModel):
    """Facts about a recording, as the report has them.

    Attributes:
        file: path of the recording.
        key: hash of the file's path, size and time and of the cache's settings.
        sha256: hash of the cached audio, by which duplicates are found.
        samples, frames: length in the cache.
        source_rate: sample rate of the file, in Hz.
        silence: share of its hops below -60 dB of full scale.
        clipped: share of the file's samples that stay at full scale, three in a row or more.
        notes: changes on reading (mixed down, resampled).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: StoredText
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
        mel: (frames, n_mels) float32; None if no mels were given.
    """

    facts: ClipFacts
    audio: np.ndarray
    f0: np.ndarray
    mel: np.ndarray | None


class Refusal(BaseModel):
    """Why a recording is left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reason: Reason
    detail: StoredText


class GivenMel(NamedTuple):
    """The mel that an acoustic model wrote for a recording; training takes it instead of its own.

    Attributes:
        stem: path of the file without its suffix.
        n_mels: expected number of bands.
        extra_frames: frames beyond the recording's whole hops: 1 for a centred mel, else 0.
    """

    stem: Path
    n_mels: int
    extra_frames: int

    def path(self) -> Path | None:
        """Returns the file with the first of `MEL_SUFFIXES` that exists, or None."""
        # Ids are composed (NFC), and names of files may not be.
        stems = dict.fromkeys([str(self.stem), unicodedata.normalize("NFD", str(self.stem))])
        paths = [Path(f"{stem}{suffix}") for stem in stems for suffix in MEL_SUFFIXES]
        return next((path for path in paths if path.is_file()), None)


class ClipTask(NamedTuple):
    """A recording to read, and the place of its result.

    Attributes:
        path: the recording.
        key: name of the result in `parts`.
        parts: folder of the results.
        sample_rate: sample rate of the cache, in Hz.
        hop_length: hop of the cache, in samples.
        mel: the mel to keep with it; None for none.
        speed: at which it is played, which moves pitch and formants too.
    """

    path: Path
    key: str
    parts: Path
    sample_rate: int
    hop_length: int
    mel: GivenMel | None
    speed: float = 1.0


def clip_key(
    path: Path,
    sample_rate: int,
    hop_length: int,
    f0_settings: dict,
    mel: GivenMel | None,
    speed: float,
) -> str:
    """Returns a name for the result of a file, which changes with it, its mel or a setting."""
    parts: list[object] = [_READING, *_version(path), sample_rate, hop_length, f0_settings]
    if mel is not None:
        mel_path = mel.path()
        parts += [mel.n_mels, mel.extra_frames, mel_path and _version(mel_path)]
    if speed != 1:
        parts += ["speed", speed]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _version(path: Path) -> list[str | int]:
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def end_with_parent() -> None:
    """Ends this worker if its parent is killed, instead of letting it wait forever."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make_part(task: ClipTask) -> None:
    """Reads a recording and writes its clip or its refusal, as a whole file or not at all.

    Whatever goes wrong with a recording is its own fault or one of ours, and others go on.

    Raises:
        ConfigError: pyworld is not installed.
    """
    result: Clip | Refusal
    try:
        result = read_clip(task)
    except ConfigError:
        raise
    except AudioError as error:
        result = Refusal(reason="unreadable", detail=str(error))
    except MemoryError:
        detail = f"{task.path} takes more memory than there is"
        result = Refusal(reason="unreadable", detail=detail)
    except Exception as error:
        result = Refusal(reason=FAULT, detail=f"{task.path}: {fault(error)}")
    if isinstance(result, Refusal):
        refuse(task, result)
        return
    facts = np.frombuffer(result.facts.model_dump_json().encode(), np.uint8)
    with atomic_path(task.parts / f"{task.key}.npz") as temporary:
        arrays = {"audio": result.audio, "f0": result.f0}
        if result.mel is not None:
            arrays["mel"] = result.mel
        np.savez(temporary, allow_pickle=False, facts=facts, **arrays)


def refuse(task: ClipTask, refusal: Refusal) -> None:
    """Writes why a recording is left out."""
    with atomic_path(task.parts / f"{task.key}.json") as temporary:
        temporary.write_text(refusal.model_dump_json(), encoding="utf-8")


def read_clip(task: ClipTask) -> Clip | Refusal:
    """Reads a recording, measures it, resamples it and tracks its F0.

    Raises:
        AudioError: the recording cannot be read.
        ConfigError: pyworld is not installed.
    """
    path, hop = task.path, task.hop_length
    mel = None if task.mel is None else _read_given(task.mel)
    if isinstance(mel, Refusal):
        return mel
    audio, source_rate, notes = read_channel(path)
    clipped = clipped_share(audio)
    if clipped > MOST_CLIPPED:
        detail = f"{path} is clipped: {100 * clipped:.1f} % of its samples stay at full scale"
        return Refusal(reason="clipped", detail=detail)
    audio, offset_notes = without_offset(audio, source_rate)  # which moves what is clipped
    notes += offset_notes
    rate = round(source_rate * task.speed)
    if task.speed != 1:
        notes.append(f"played at {task.speed:g} times the speed")
    if rate != task.sample_rate:
        audio = resample(audio, rate, task.sample_rate)
    if source_rate != task.sample_rate:
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
    """Returns the share of samples of audio (T,) in runs of three or more at full scale."""
    full = np.abs(audio) >= _FULL_SCALE
    middle = full[:-2] & full[1:-1] & full[2:]
    in_run = np.zeros(len(audio), bool)
    for shift in range(3):
        in_run[shift : shift + len(middle)] |= middle
    return float(in_run.mean())


def silent_share(audio: np.ndarray, hop_length: int) -> float:
    """Returns the share of whole hops of audio (T,) below -60 dB of full scale."""
    hops = audio[: len(audio) // hop_length * hop_length].reshape(-1, hop_length)
    return float((np.square(hops, dtype=np.float64).mean(1) < SILENCE_RMS**2).mean())


def read_result(parts: Path, key: str) -> ClipFacts | Refusal:
    """Reads the facts or the refusal that `make_part` wrote, without the audio.

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


def read_array(parts: Path, key: str, name: str) -> np.ndarray:
    """Reads an array of a `Clip` that `make_part` wrote: audio, f0, or mel where one was given.

    Raises:
        DataError: the part is missing or damaged.
    """
    try:
        with np.load(parts / f"{key}.npz", allow_pickle=False) as arrays:
            return arrays[name]
    except _UNREADABLE as error:
        raise _damaged(parts, key) from error


def _damaged(parts: Path, key: str) -> DataError:
    return DataError(f"part {key} in {parts} is damaged: remove that folder, then prepare again")
