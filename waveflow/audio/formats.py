"""Decodes files of audio and of mels, and believes no size that they state.

A header that asks for more than the file can justify, or than `waveflow.limits` allow, is refused
before memory is taken. Nothing in a file is executed.
"""

import io
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile

from waveflow.errors import AudioError, CheckpointError, MelMismatchError
from waveflow.limits import (
    EXPANSION,
    FREE_BYTES,
    FREE_SAMPLES,
    LEAST_SAMPLE_RATE,
    MEL_PICKLE_BYTES,
    MEL_VALUES,
    SAMPLES,
    SAMPLES_PER_BYTE,
)
from waveflow.torchfile.container import ITEM_SIZE, open_torch_file
from waveflow.torchfile.unpickle import Record, TensorRef

_DTYPES: dict[str, np.dtype[Any]] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
}


def decode_audio(path: Path) -> tuple[np.ndarray, int, list[str]]:
    """Decodes an audio file.

    A WAV whose header says 0 bytes, as a program leaves it that was stopped, is read to its end.

    Returns:
        Channels (T, C) float32, the rate in Hz, and notes.

    Raises:
        AudioError: larger than the limits, or of a rate that no recording has.
        Others: of soundfile, for what is no audio; OSError.
    """
    # As bytes, since soundfile takes only names that are UTF-8.
    name = os.fsencode(path) if os.name == "posix" else path
    with soundfile.SoundFile(name) as file:
        if file.frames:
            return _samples(file, path), file.samplerate, []
    mended = _closed_wav(path)
    with soundfile.SoundFile(name if mended is None else mended) as file:
        notes = [] if mended is None else ["its header says 0 bytes: read to the end of the file"]
        return _samples(file, path), file.samplerate, notes


def _samples(file: soundfile.SoundFile, path: Path) -> np.ndarray:
    n_samples, n_bytes = file.frames * file.channels, os.stat(path).st_size
    SAMPLES.check(f"{path} states", n_samples, AudioError)
    if n_samples > FREE_SAMPLES:
        SAMPLES_PER_BYTE.check(f"{path} states", n_samples // n_bytes, AudioError)
    if file.samplerate < LEAST_SAMPLE_RATE:
        raise AudioError(
            f"{path} states a rate of {file.samplerate} Hz, and speech needs {LEAST_SAMPLE_RATE} "
            "at least: correct its header"
        )
    return file.read(dtype="float32", always_2d=True)


def _closed_wav(path: Path) -> io.BytesIO | None:
    """A WAV of 0 samples as it would be if it had been closed; None for one without samples."""
    data = bytearray(path.read_bytes())
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return None
    place = 12
    while place + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, place)
        if name == b"data" and size == 0:
            break
        place += 8 + size + size % 2
    n_bytes = len(data) - place - 8
    if n_bytes <= 0 or _are_chunks(data, place + 8):
        return None
    struct.pack_into("<I", data, place + 4, min(n_bytes, 2**32 - 1))
    struct.pack_into("<I", data, 4, min(len(data) - 8, 2**32 - 1))
    return io.BytesIO(data)


def _are_chunks(data: bytearray, place: int) -> bool:
    """Whether whole chunks of RIFF, and not samples, go from here to the end."""
    while place + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, place)
        if not name.isalnum():
            return False
        place += 8 + size + size % 2
    return place == len(data)


def check_resampled(n_samples: int, from_rate: int, to_rate: int) -> None:
    """Raises AudioError if audio would be too long at another rate."""
    what = f"audio of {n_samples:,} samples at {from_rate} Hz, resampled to {to_rate} Hz, has"
    SAMPLES.check(what, math.ceil(n_samples * to_rate / from_rate), AudioError)


def load_numpy(path: Path) -> np.ndarray:
    """The array of a .npy file, or the only one or the one named `mel` of a .npz file.

    Raises:
        MelMismatchError: damaged, larger than the limits, or several arrays.
    """
    try:
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                return load_array(file, str(path), os.stat(path).st_size)
        with zipfile.ZipFile(path) as archive:
            members = {n.removesuffix(".npy"): n for n in archive.namelist()}
            member = members[only_or_mel(members, path)]
            with archive.open(member) as file:
                most = max(EXPANSION.value * os.stat(path).st_size, FREE_BYTES)
                return load_array(file, str(path), most)
    except MelMismatchError:
        raise
    except Exception as error:  # damaged files raise from numpy, zipfile, zlib and the parser
        raise MelMismatchError(
            f"{path} is damaged or not a NumPy file of plain numbers (pickled objects are refused)"
        ) from error


def load_array(file: Any, name: str, most: int | None = None) -> np.ndarray:
    """The next .npy array of a file or a stream, which need not be able to seek.

    Args:
        file: has `read`.
        name: for messages.
        most: bytes that the array can have, as far as is known.

    Raises:
        MelMismatchError: beyond the limits.
        Others: damaged.
    """
    readers: dict[tuple[int, int], Callable[..., Any]] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, in_columns, dtype = readers[np.lib.format.read_magic(file)](file)
    n_values = math.prod(shape)
    MEL_VALUES.check(f"{name} states", n_values, MelMismatchError)
    n_bytes = n_values * dtype.itemsize
    if dtype.hasobject or n_values < 0:
        raise ValueError("no plain numbers")
    if most is not None and n_bytes > most:
        raise MelMismatchError(
            f"{name} states an array of shape {shape}, which is more than its file can hold: "
            "save the mel again, without compression"
        )
    data = file.read(n_bytes)
    if len(data) < n_bytes:
        raise ValueError("cut off")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if in_columns else "C")


def load_tensor(path: Path) -> np.ndarray:
    """The tensor of a file of torch.save, or the only one or the one named `mel` of a dict.

    Its numbers have to be in the file one by one: no sparse or expanded tensor.

    Raises:
        MelMismatchError: damaged, larger than the limits, or no plain tensor.
    """
    try:
        with open(path, "rb") as file:
            torch_file = open_torch_file(file, MEL_PICKLE_BYTES)
            found = torch_file.root
            if isinstance(found, Record) and found.kind is None:
                found = found.items[only_or_mel(found.items, path)]
            if not isinstance(found, TensorRef):
                what = found.kind if isinstance(found, Record) else type(found).__name__
                raise MelMismatchError(
                    f"{path} is damaged or not a file with a plain tensor: it holds a {what}; "
                    "expected one plain tensor"
                )
            return _numbers(found, torch_file.locate(found.storage)[0], file, path)
    except MelMismatchError:
        raise
    except CheckpointError as error:
        raise MelMismatchError(
            f"{path} is damaged or not a file with a plain tensor: {error}"
        ) from error
    except Exception as error:  # a damaged file raises nearly anything
        raise MelMismatchError(f"{path} is damaged or not a file with a plain tensor") from error


def _numbers(tensor: TensorRef, place: int, file: BinaryIO, path: Path) -> np.ndarray:
    kind, n_values = tensor.storage.kind, math.prod(tensor.shape)
    MEL_VALUES.check(f"{path} states", max(n_values, tensor.storage.n_items), MelMismatchError)
    if n_values > tensor.storage.n_items:
        raise MelMismatchError(
            f"{path} holds a tensor of shape {tensor.shape} with only {tensor.storage.n_items} "
            "numbers: save it with .contiguous()"
        )
    dtype: np.dtype[Any] | None
    dtype = np.dtype("<u2") if kind == "BFloat16Storage" else _DTYPES.get(kind)
    if dtype is None:
        raise MelMismatchError(f"{path} holds a tensor of type {kind:.40}, not of real numbers")
    file.seek(place)
    data = file.read(tensor.storage.n_items * ITEM_SIZE[kind])
    if len(data) < tensor.storage.n_items * dtype.itemsize:
        raise ValueError("cut off")
    steps = zip(tensor.shape, tensor.strides, strict=True)
    last = tensor.offset + sum((n - 1) * step for n, step in steps)
    if n_values and last >= tensor.storage.n_items:
        raise ValueError("beyond its storage")
    storage = np.frombuffer(data, dtype)
    if kind == "BFloat16Storage":  # the upper half of a float32
        storage = (storage.astype("<u4") << 16).view("<f4")
    strides = [step * storage.itemsize for step in tensor.strides]
    numbers = storage[tensor.offset :] if n_values else storage[:0]
    return np.lib.stride_tricks.as_strided(numbers, tensor.shape, strides).copy()


def only_or_mel(names: Iterable[str], path: Path) -> str:
    """The name of the mel among those of a file.

    Raises:
        MelMismatchError: several, and none is `mel`; or none at all.
    """
    names = list(names)
    if "mel" in names or len(names) == 1:
        return "mel" if "mel" in names else names[0]
    shown = ", ".join(f"{name:.40}" for name in names[:5]) + (", ..." if len(names) > 5 else "")
    raise MelMismatchError(
        f"{path} holds the arrays {shown or '(none)'}; keep one array, or name the mel `mel`"
    )
