"""Reads and writes audio and mel files: the only place that touches their formats."""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import soundfile

from waveflow.audio.formats import (
    check_resampled,
    decode_audio,
    load_array,
    load_numpy,
    load_tensor,
)
from waveflow.audio.samples import check_range, mixed_down, without_offset
from waveflow.door import check_plain
from waveflow.errors import AudioError, DataError, MelMismatchError, WaveflowError
from waveflow.files import output_path

MEL_SUFFIXES = (".npy", ".npz", ".pt")

_FORMATS = {".wav": "WAV", ".flac": "FLAC"}


class Found(NamedTuple):
    """The files of a folder.

    Attributes:
        names: with their sub-folders, in order; strings, because there may be millions.
        left_out: other files in words: a number for each suffix, and the names of broken links.
    """

    names: list[str]
    left_out: list[str]


def list_files(
    folder: str | os.PathLike[str], suffixes: Sequence[str], skip: Path | None = None
) -> Found:
    """Files of a folder and its sub-folders with one of the suffixes; hidden ones do not count.

    Args:
        folder: to list. Links to files are followed, links to folders are not.
        suffixes: with their dots, in lower case; the case of a file's suffix is ignored.
        skip: a sub-folder that is not looked into, such as that of the outputs.

    Raises:
        DataError: there is no such folder, or no such file in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    names: list[str] = []
    others: Counter[str] = Counter()
    skipped = None if skip is None else os.path.realpath(skip)
    for parent, folders, files in os.walk(os.path.realpath(folder)):
        inner = os.path.relpath(parent, os.path.realpath(folder))
        for name in list(folders):
            path = os.path.join(parent, name)
            if os.path.islink(path):
                others["linked folders"] += 1
            if name.startswith(".") or path == skipped:
                folders.remove(name)
        for name in files:
            if name.startswith("."):
                continue
            suffix = os.path.splitext(name)[1].lower()
            if suffix not in suffixes:
                others[suffix or "without suffix"] += 1
            elif os.path.isfile(os.path.join(parent, name)):
                names.append(name if inner == os.curdir else os.path.join(inner, name))
            else:
                others[f"that are no files, such as {name}"] += 1
    left_out = [f"{n} {what}" for what, n in sorted(others.items())]
    if not names:
        there = f"; it holds {', '.join(left_out)}" if left_out else ""
        raise DataError(f"{folder} holds no {' or '.join(suffixes)} file{there}")
    return Found(sorted(names), left_out)


def read_audio(
    path: str | os.PathLike[str], sample_rate: int | None = None
) -> tuple[np.ndarray, int, list[str]]:
    """Reads an audio file as one channel without a DC offset.

    Args:
        path: Any file that libsndfile reads.
        sample_rate: Rate wanted in Hz, resampled to if the file's is another; None keeps it.

    Returns:
        Audio (T,) float32, in [-1, 1] unless the file holds floats beyond; its rate in Hz; and
        the changes on the way, in words ("2 channels mixed down to one").

    Raises:
        AudioError: If the file is missing, no audio, shorter than two samples, not finite, or
            holds floats far beyond [-1, 1].
    """
    audio, rate, notes = read_channel(path)
    n_read = audio.size
    audio, offset_notes = without_offset(audio, rate)
    notes += offset_notes
    if sample_rate is not None and rate != sample_rate:
        audio = resample(audio, rate, sample_rate)
        notes.append(f"resampled from {rate} Hz to {sample_rate} Hz")
        rate = sample_rate
    if audio.size < 2:
        raise _too_short(path, n_read)
    return np.ascontiguousarray(audio), rate, notes


def read_channel(path: str | os.PathLike[str]) -> tuple[np.ndarray, int, list[str]]:
    """`read_audio` at the file's own rate, with its DC offset."""
    path = _existing_file(path, AudioError)
    try:
        channels, rate, notes = decode_audio(path)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        # TypeError: formats without a header, which do not say their rate and type.
        reason = getattr(error, "error_string", error)
        raise AudioError(f"{path} is not an audio file that can be read: {reason}") from error
    if channels.shape[0] == 0:
        raise AudioError(f"{path} holds no audio: 0 samples")
    try:
        check_range(channels.min(), channels.max())
    except AudioError as error:
        raise AudioError(f"{path}: {error}") from error
    audio, mix_notes = mixed_down(channels)
    if audio.size < 2:
        raise _too_short(path, audio.size)
    return audio, rate, notes + mix_notes


def _too_short(path: str | os.PathLike[str], n_samples: int) -> AudioError:
    return AudioError(f"{path} is too short: {n_samples} sample(s) at its own rate")


def resample(audio: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Audio (T,) at another rate in Hz, by soxr's high-quality filter (20 bit)."""
    import soxr

    check_resampled(len(audio), from_rate, to_rate)
    return soxr.resample(audio, from_rate, to_rate, quality="HQ").astype(np.float32)


def to_int16(audio: np.ndarray) -> np.ndarray:
    """16-bit samples of audio in [-1, 1]; gives back the file's own where audio was read from one.

    Full scale is 32768, as libsndfile reads it, so +1.0 becomes 32767.
    """
    scaled = np.round(np.asarray(audio, dtype=np.float64) * 32768.0)
    return np.clip(scaled, -32768, 32767).astype(np.int16)


def write_audio(
    path: str | os.PathLike[str], audio: np.ndarray, sample_rate: int, float32: bool = False
) -> None:
    """Writes audio in [-1, 1]; 16-bit integers saturate, floats are written as they are.

    Args:
        path: A .wav or .flac file; replaced if it is there, and never half written.
        audio: (T,), finite.
        sample_rate: Hz.
        float32: 32-bit floats instead of 16-bit integers (.wav only).

    Raises:
        AudioError: If the suffix is another, the audio is not (T,) or not finite, or the folder is
            missing or cannot be written to.
    """
    with open_audio(path, sample_rate, float32) as write:
        write(audio)


@contextmanager
def open_audio(
    path: str | os.PathLike[str], sample_rate: int, float32: bool = False
) -> Iterator[Callable[[np.ndarray], None]]:
    """Gives a function that writes the next audio (T,); arguments and errors as `write_audio`.

    Example:
        >>> with open_audio("out.wav", 22050) as write:
        ...     for piece in np.zeros((3, 256)):
        ...         write(piece)
    """
    path = Path(path)
    check_audio_name(path, float32)
    subtype, format = "FLOAT" if float32 else "PCM_16", _FORMATS[path.suffix.lower()]

    def write(audio: np.ndarray) -> None:
        audio = np.asarray(audio)
        if audio.ndim != 1 or audio.size == 0:
            shape = audio.shape
            raise AudioError(f"cannot write {path}: audio of shape {shape}, expected (samples,)")
        if not np.isfinite(audio).all():
            raise AudioError(f"cannot write {path}: the audio holds NaN or infinite samples")
        file.write(audio.astype(np.float32) if float32 else to_int16(audio))

    with (
        _writing(path, AudioError) as temporary,
        soundfile.SoundFile(
            os.fsencode(temporary), "w", sample_rate, 1, subtype, format=format
        ) as file,
    ):
        yield write


def check_audio_name(path: Path, float32: bool = False) -> None:
    """Raises AudioError for a name that `write_audio` would refuse after the long work."""
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise AudioError(f"cannot write {path}: the name must end in .wav or .flac")
    if float32 and suffix != ".wav":
        raise AudioError(f"cannot write {path}: 32-bit floats need a name that ends in .wav")


def read_mel(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads a mel spectrogram; nothing in the file is executed.

    Args:
        path: .npy; .npz with one array, or one named `mel`; or .pt with a tensor.

    Returns:
        (n_mels, F) float32; a leading axis of 1 is dropped.

    Raises:
        MelMismatchError: If the file is missing, not such a file, or its array is not 2-D, empty,
            not of real numbers, or not finite.
    """
    path = _existing_file(path, MelMismatchError)
    suffix = path.suffix.lower()
    if suffix not in MEL_SUFFIXES:
        raise MelMismatchError(f"{path} is not a mel file: its name must end in .npy, .npz or .pt")
    return _as_mel(load_tensor(path) if suffix == ".pt" else load_numpy(path), str(path))


def read_mels(stream: BinaryIO) -> Iterator[np.ndarray]:
    """Reads mels that come one after another, as `np.save` writes them, from a pipe or a file.

    Each is given as soon as it is complete. Nothing in the stream is executed.

    Args:
        stream: open for reading bytes.

    Returns:
        (n_mels, F) float32 each, as `read_mel`.

    Raises:
        MelMismatchError: If an array is cut off, no plain .npy array, or no mel.
    """
    for count in itertools.count(1):
        first = stream.read(1)
        if not first:
            return
        where = f"array {count} of the stream"
        try:
            mel = load_array(_Unread(first, stream), where)
        except MelMismatchError:
            raise
        except Exception as error:  # damaged headers raise from numpy and the parser
            raise MelMismatchError(
                f"{where} is cut off, or is no .npy array of plain numbers"
            ) from error
        yield _as_mel(mel, where)


class _Unread:
    """A stream whose first bytes have been read. It has `read` alone, so that numpy never seeks."""

    def __init__(self, first: bytes, stream: BinaryIO) -> None:
        self._first = first
        self._stream = stream

    def read(self, n_bytes: int = -1, /) -> bytes:
        first, self._first = self._first, b""
        return first + self._stream.read(n_bytes - len(first))


def write_mel(path: str | os.PathLike[str], mel: np.ndarray) -> None:
    """Writes a mel (n_mels, F) as float32, never half written.

    Args:
        path: .npy; .npz, where the array's name is `mel`; or .pt, a tensor.

    Raises:
        MelMismatchError: If the suffix is another, the mel is not finite, or the folder is missing
            or cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in MEL_SUFFIXES:
        raise MelMismatchError(f"cannot write {path}: its name must end in .npy, .npz or .pt")
    with np.errstate(over="ignore"):  # values that overflow are refused as infinite
        mel = np.asarray(mel, dtype=np.float32)
    if not np.isfinite(mel).all():
        raise MelMismatchError(f"cannot write {path}: the mel holds NaN or infinite values")
    with _writing(path, MelMismatchError) as temporary:
        if suffix == ".pt":
            import torch

            torch.save(torch.from_numpy(mel), temporary)
            return
        with open(temporary, "wb") as file:  # or numpy would add its suffix to a name in capitals
            if suffix == ".npy":
                np.save(file, mel, allow_pickle=False)
            else:
                np.savez(file, mel=mel)


def _as_mel(mel: np.ndarray, name: str) -> np.ndarray:
    """(n_mels, F) float32 of an array that was read, or a MelMismatchError."""
    if mel.dtype.kind not in "fiu":
        raise MelMismatchError(f"{name} holds values of type {mel.dtype}, not real numbers")
    if mel.ndim == 3 and mel.shape[0] == 1:
        mel = mel[0]
    if mel.ndim != 2:
        raise MelMismatchError(f"{name} has shape {mel.shape}; a mel is (bands, frames)")
    if mel.size == 0:
        raise MelMismatchError(f"{name} is empty: shape {mel.shape}")
    mel = np.ascontiguousarray(mel, dtype=np.float32)
    if not np.isfinite(mel).all():
        raise MelMismatchError(f"{name} holds NaN or infinite values; compute the mel again")
    return mel


def _existing_file(path: str | os.PathLike[str], error: type[WaveflowError]) -> Path:
    path = Path(path)
    if path.is_dir():
        raise error(f"{path} is a folder, not a file")
    if not path.exists():
        raise error(f"{path} does not exist")
    try:
        check_plain(path)
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror}") from cause
    return path


@contextmanager
def _writing(path: Path, error: type[WaveflowError]) -> Iterator[Path]:
    """`output_path`, with its failures as one line for the user."""
    if path.is_dir():
        raise error(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise error(f"cannot write {path}: there is no folder {path.parent}")
    try:
        with output_path(path) as temporary:
            yield temporary
    except (OSError, soundfile.LibsndfileError) as cause:
        reason = getattr(cause, "strerror", None) or cause
        raise error(f"cannot write {path}: {reason}") from cause
