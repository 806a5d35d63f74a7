"""Reads and writes audio and mel files: the only place that touches their formats."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

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
from waveflow.files import output_path, why_unread

MEL_SUFFIXES = (".npy", ".npz", ".pt")

_FORMATS = {".wav": "WAV", ".flac": "FLAC"}


def find_files(
    folder: str | os.PathLike[str], suffixes: Sequence[str], without: str | None = None
) -> tuple[list[str], list[str]]:
    """Finds the files with one of the suffixes in a folder and in the folders below it.

    Args:
        folder: Folder to search; hidden files and hidden folders are left out.
        suffixes: With their dots, in lower case; the case of a file's suffix is ignored.
        without: Path of a folder below, which is left out: where outputs go.

    Returns:
        The paths of the files within the folder, sorted. They are plain strings: there may be
        millions. And what was left out although it may be wanted, each with the reason, in words.

    Raises:
        DataError: If there is no such folder, or no such file in it.
    """
    if not os.path.isdir(folder):
        raise DataError(f"{folder} is not a folder")
    found: list[str] = []
    left_out: list[str] = []
    excluded = None if without is None else os.path.realpath(without)
    pending = [""]
    while pending:
        inner = pending.pop()
        try:
            with os.scandir(os.path.join(folder, inner)) as entries:  # a system call for many files
                visible = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            if not inner:
                raise
            left_out.append(f"{inner} ({error.strerror})")
            continue
        for entry in visible:
            path = os.path.join(inner, entry.name)
            if entry.is_dir(follow_symlinks=False):
                if os.path.realpath(entry.path) != excluded:
                    pending.append(path)
            elif reason := _reason_to_skip(entry, suffixes):
                left_out.append(f"{path} ({reason})")
            elif entry.name.lower().endswith(tuple(suffixes)):
                found.append(path)
    if not found:
        also = f"; {listed(left_out)}" if left_out else ""
        raise DataError(f"{folder} holds no {', '.join(suffixes)} file{also}")
    return sorted(found), sorted(left_out)


def _reason_to_skip(entry: os.DirEntry[str], suffixes: Sequence[str]) -> str:
    """Why a file is left out although it may be wanted; an empty text for all others."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if entry.is_symlink() and os.path.isdir(entry.path):
        return "a link to a folder is not followed"
    if suffix not in suffixes:
        return why_unread(entry.path) if ".wav" in suffixes else ""
    if entry.is_symlink():  # in a circle, too, where the entry's own method raises
        return "" if os.path.isfile(entry.path) else "a dangling link, or to no plain file"
    return "" if entry.is_file() else "no plain file"


def listed(left_out: Sequence[str]) -> str:
    """What was left out, counted and named, as one line that has an end."""
    most = 20
    more = f" and {len(left_out) - most:,} more" if len(left_out) > most else ""
    return f"{len(left_out):,} left out: {', '.join(left_out[:most])}{more}"


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
    subtype = "FLOAT" if float32 else "PCM_16"
    n_written = 0

    def write(audio: np.ndarray) -> None:
        nonlocal n_written
        audio = np.asarray(audio)
        if audio.ndim != 1 or audio.size == 0:
            shape = audio.shape
            raise AudioError(f"cannot write {path}: audio of shape {shape}, expected (samples,)")
        if not np.isfinite(audio).all():
            raise AudioError(f"cannot write {path}: the audio holds NaN or infinite samples")
        file.write(audio.astype(np.float32) if float32 else to_int16(audio))
        n_written += len(audio)

    with _writing(path, AudioError) as temporary:
        # As bytes, since soundfile takes only names that are UTF-8.
        name = os.fsencode(temporary) if os.name == "posix" else temporary
        kind = _FORMATS[path.suffix.lower()]
        with soundfile.SoundFile(name, "w", sample_rate, 1, subtype, format=kind) as file:
            yield write
        if n_written and not _ends_at(name, n_written):
            raise OSError("its end was not written")


def _ends_at(name: str | bytes | Path, n_samples: int) -> bool:
    """Whether a file holds its last sample. On a full disk libsndfile closes a FLAC in silence."""
    with suppress(soundfile.SoundFileError), soundfile.SoundFile(name) as file:
        if file.frames == n_samples:
            file.seek(n_samples - 1)
            return len(file.read(1)) == 1
    return False


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
        path: .npy, .npz (the array is named `mel`) or .pt (a tensor), as `read_mel` takes them.
        mel: (n_mels, F), finite.

    Raises:
        MelMismatchError: If the suffix is another, the mel is not finite, or the folder is missing
            or cannot be written.
    """
    path = Path(path)
    check_mel_name(path)
    with np.errstate(over="ignore"):  # values that overflow are refused as infinite
        mel = np.asarray(mel, dtype=np.float32)
    if not np.isfinite(mel).all():
        raise MelMismatchError(f"cannot write {path}: the mel holds NaN or infinite values")
    with _writing(path, MelMismatchError) as temporary, open(temporary, "wb") as file:
        match path.suffix.lower():
            case ".npy":
                np.save(file, mel, allow_pickle=False)
            case ".npz":
                np.savez(file, mel=mel)
            case _:
                import torch

                torch.save(torch.from_numpy(mel), file)


def check_mel_name(path: Path) -> None:
    """Raises MelMismatchError for a name that `write_mel` would refuse after the long work."""
    if path.suffix.lower() not in MEL_SUFFIXES:
        raise MelMismatchError(
            f"cannot write {path}: the name of a mel file must end in .npy, .npz or .pt"
        )


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
