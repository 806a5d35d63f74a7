"""The training cache: a corpus's audio and F0 in plain arrays that are memory-mapped.

A cache is a folder with these files:

- `audio.npy`: int16, all clips one after another.
- `f0.npy`: float32, Hz, one value for each whole hop, 0 where unvoiced, all clips in a row.
- `mel.npy`: only where an acoustic model's mels were given; float32, natural logarithms, a row for
  each hop.
- `manifest.json`: where each clip lies, and the hashes of the arrays.
- `report.json`: describes the recordings.

`waveflow.data.prepare` writes it. Reading it needs no audio library, and writing it no torch.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from waveflow.audio.f0 import F0_CEILING_HZ, F0_FLOOR_HZ
from waveflow.audio.mel_config import MelConfig
from waveflow.data.corpus import Split
from waveflow.door import check_plain, read_plain
from waveflow.errors import DataError
from waveflow.limits import WEIGHTS_BYTES

if TYPE_CHECKING:
    from torch import Tensor

AUDIO_FILE = "audio.npy"
F0_FILE = "f0.npy"
MEL_FILE = "mel.npy"
MANIFEST_FILE = "manifest.json"
REPORT_FILE = "report.json"

_FULL_SCALE = 32768


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CachedClip(_Frozen):
    """Where a clip lies in the cache, in samples and in frames (whole hops)."""

    id: str
    corpus: str
    split: Split
    sample_offset: NonNegativeInt
    samples: PositiveInt
    frame_offset: NonNegativeInt
    frames: PositiveInt


class F0Settings(_Frozen):
    """The settings of the F0 tracker."""

    method: str = "dio+stonemask"
    floor_hz: float = F0_FLOOR_HZ
    ceiling_hz: float = F0_CEILING_HZ


class Manifest(_Frozen):
    """The content of `manifest.json`.

    A run may compute any mel of this sample rate and hop from the audio. If mels were given,
    `n_mels` is the number of their bands, and runs train on those mels.
    """

    kind: Literal["waveflow training cache"] = "waveflow training cache"
    format: Literal[2] = 2
    sample_rate: PositiveInt
    hop_length: PositiveInt
    f0: F0Settings
    n_mels: PositiveInt | None = None
    sha256: dict[str, str]
    clips: tuple[CachedClip, ...]


class TrainingCache:
    """A cache that `prepare` wrote, memory-mapped.

    Args:
        folder: the cache's folder.

    Raises:
        DataError: the folder is not a cache, is damaged, or has another format.

    Example:
        >>> cache = TrainingCache(Path("data/lj"))  # doctest: +SKIP
        >>> f"{cache.hours('train'):.1f} hours"  # doctest: +SKIP
        '23.4 hours'
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        clips = self.manifest.clips
        frames, n_mels = sum(c.frames for c in clips), self.manifest.n_mels
        self._audio = self._map(AUDIO_FILE, np.int16, (sum(c.samples for c in clips),))
        self._f0 = self._map(F0_FILE, np.float32, (frames,))
        self._mel = None if n_mels is None else self._map(MEL_FILE, np.float32, (frames, n_mels))

    @property
    def sample_rate(self) -> int:
        """Sample rate in Hz."""
        return self.manifest.sample_rate

    @property
    def hop_length(self) -> int:
        """Samples for each value of F0."""
        return self.manifest.hop_length

    def clips(self, split: Split) -> list[CachedClip]:
        """Returns the clips of a split, in the cache's order."""
        return [clip for clip in self.manifest.clips if clip.split == split]

    def hours(self, split: Split) -> float:
        """Returns the hours of audio in a split."""
        return sum(clip.samples for clip in self.clips(split)) / self.sample_rate / 3600

    def audio(self, clip: CachedClip) -> np.ndarray:
        """Returns a clip's audio, (samples,) int16, a view of the file."""
        return self._audio[clip.sample_offset : clip.sample_offset + clip.samples]

    def f0(self, clip: CachedClip) -> np.ndarray:
        """Returns a clip's F0 in Hz, (frames,) float32, 0 where unvoiced, a view of the file."""
        return self._f0[clip.frame_offset : clip.frame_offset + clip.frames]

    def mel(self, clip: CachedClip) -> np.ndarray | None:
        """Returns the mel given for a clip, (frames, n_mels) float32, a view of the file.

        None if no mels were given.
        """
        if self._mel is None:
            return None
        return self._mel[clip.frame_offset : clip.frame_offset + clip.frames]

    def val_clips(self) -> "Iterator[tuple[CachedClip, Tensor, Tensor | None]]":
        """Yields each validation clip, its audio (samples,) in [-1, 1) and its given mel.

        The mel is (n_mels, frames), or None if no mels were given.
        """
        for clip in self.clips("val"):
            yield clip, *self._tensors(clip)

    def mel_range(self, config: MelConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns the lowest and highest value of each mel band in the training clips.

        It looks at 200 clips at most. A model carries this range in its config, to recognise mels
        of another convention.
        """
        import torch

        from waveflow.audio.mel import MelSpectrogram

        clips = self.clips("train")
        spectrogram = MelSpectrogram(config)
        lows = torch.full((config.n_mels,), math.inf)
        highs = torch.full((config.n_mels,), -math.inf)
        for clip in clips[:: max(1, len(clips) // 200)]:
            audio, given = self._tensors(clip)
            frames = given_or_computed(given, audio, spectrogram)
            lows = torch.minimum(lows, frames.amin(1))
            highs = torch.maximum(highs, frames.amax(1))
        return tuple(lows.tolist()), tuple(highs.tolist())

    def _tensors(self, clip: CachedClip) -> "tuple[Tensor, Tensor | None]":
        """A clip's audio (samples,) in [-1, 1) and the mel (n_mels, frames) that was given."""
        import torch

        audio = torch.from_numpy(self.audio(clip).astype(np.float32) / _FULL_SCALE)
        given = self.mel(clip)
        return audio, None if given is None else torch.from_numpy(given.T.copy())

    def verify(self) -> None:
        """Compares the arrays with the hashes in the manifest; this reads all of the cache.

        Raises:
            DataError: an array is not the one that `prepare` wrote.
        """
        for name, expected in self.manifest.sha256.items():
            if file_sha256(self.folder / name) != expected:
                raise DataError(f"{self.folder / name} is damaged: run waveflow prepare again")

    def _map(self, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        path = self.folder / name
        try:
            check_plain(path, self.folder)
            array: np.ndarray = np.lib.format.open_memmap(path, mode="r")
        except Exception as error:  # damaged headers raise from numpy and the parser
            raise DataError(f"cannot read {path} ({error}): run waveflow prepare again") from error
        if array.dtype != dtype or array.shape != shape:
            raise DataError(
                f"{path} holds {array.dtype} {array.shape}, its manifest says"
                f" {np.dtype(dtype)} {shape}: run waveflow prepare again"
            )
        return array


def given_or_computed(
    given: "Tensor | None", audio: "Tensor", spectrogram: "Callable[[Tensor], Tensor]"
) -> "Tensor":
    """The mel that a run trains on: the one given with the data, else the mel of the audio.

    Training, validation and the model's mel range all ask this function.
    """
    return spectrogram(audio) if given is None else given.to(audio.device)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    if not os.path.lexists(path):
        raise DataError(f"{folder} is no training cache (no {MANIFEST_FILE}): run waveflow prepare")
    try:
        manifest = Manifest.model_validate_json(read_plain(path, WEIGHTS_BYTES, DataError, folder))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
        raise DataError(f"cannot use {path} ({reason}): run waveflow prepare again") from error
    # Also, no other file is ever looked for.
    names = {AUDIO_FILE, F0_FILE} | (set() if manifest.n_mels is None else {MEL_FILE})
    if manifest.sha256.keys() != names:
        raise DataError(f"cannot use {path} (sha256: not of {', '.join(sorted(names))})")
    sample_offset = frame_offset = 0
    for clip in manifest.clips:
        if (clip.sample_offset, clip.frame_offset) != (sample_offset, frame_offset) or (
            clip.frames != clip.samples // manifest.hop_length
        ):
            raise DataError(f"{path}: clip {clip.id} is inconsistent: run waveflow prepare again")
        sample_offset += clip.samples
        frame_offset += clip.frames
    return manifest


def file_sha256(path: Path) -> str:
    """Returns a file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
