"""Random segments of a training cache, drawn so that a step can be repeated exactly."""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from waveflow.audio.dequantise import STEP_16_BIT
from waveflow.audio.mel import MelConfig
from waveflow.data.cache import TrainingCache, given_or_computed
from waveflow.errors import ConfigError, DataError

Item = TypeVar("Item")


class Segments(NamedTuple):
    """Segments of a training step, or the items of it that one process has.

    Attributes:
        audio: (B, (segment_frames + 2 * margin_frames) * hop_length) float32 in [-1, 1]. The
            margins let the mel of a segment be computed without edge effects.
        f0: (B, segment_frames) float32, Hz at the centre of each hop of the segment, 0 where
            unvoiced.
        mel: (B, n_mels, segment_frames) float32 natural logarithms if the cache was given mels,
            else None.
        margin_frames: hops on either side of a segment.
    """

    audio: Tensor
    f0: Tensor
    mel: Tensor | None
    margin_frames: int

    def cut(self, spectrogram: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The segments without margins: audio (B, T), mel (B, M, F) and F0 (B, F)."""
        n_frames, margin = self.f0.shape[1], self.margin_frames
        hop = self.audio.shape[1] // (n_frames + 2 * margin)

        def computed(audio: Tensor) -> Tensor:
            return spectrogram(audio)[:, :, margin : margin + n_frames]

        mel = given_or_computed(self.mel, self.audio, computed)
        return self.audio[:, margin * hop : (margin + n_frames) * hop], mel, self.f0

    def to(self, device: torch.device) -> "Segments":
        """The same on a device."""
        mel = None if self.mel is None else self.mel.to(device)
        return Segments(self.audio.to(device), self.f0.to(device), mel, self.margin_frames)


class SegmentSampler:
    """Draws batches of segments of the training clips, uniformly over their audio.

    A batch depends only on the cache, the sampler's arguments and the number of the step. So a
    training that resumes at a step draws the batches that it would have drawn without a stop.

    Each segment starts at a multiple of the hop, and has `mel_config.margin_frames` hops of its
    surroundings on either side. Beyond a clip's ends there is digital silence. Uniform noise, one
    16-bit step wide, dequantises every sample, and a random gain multiplies the result. A mel that
    the cache was given gets the same gain; beyond a clip's ends it is at the logarithm's floor.

    Args:
        cache: holds the clips.
        segment_frames: length of a segment in hops.
        batch_size: number of segments in a batch.
        mel_config: must have the cache's sample rate and hop length, and as many bands as the
            mels that the cache was given.
        seed: makes one sequence of batches differ from another.
        gain_range: lowest and highest gain, drawn log-uniformly. An item whose peak would pass 1
            gets the gain that takes its peak to 1.
        items: the items of the batch that this process wants; other processes take the others.

    Raises:
        DataError: the cache has no training clips, or another sample rate, hop length or number
            of bands.
        ConfigError: a size is not positive, or the gain range is not positive or not in order.

    Example:
        >>> sampler = SegmentSampler(cache, 64, 16, mel_config, seed=0)  # doctest: +SKIP
        >>> sampler.batch(step=0).f0.shape  # doctest: +SKIP
        torch.Size([16, 64])
    """

    def __init__(
        self,
        cache: TrainingCache,
        segment_frames: int,
        batch_size: int,
        mel_config: MelConfig,
        seed: int,
        gain_range: tuple[float, float] = (1.0, 1.0),
        items: slice = slice(None),
    ) -> None:
        if segment_frames < 1 or batch_size < 1:
            raise ConfigError(
                f"segment_frames and batch_size must be at least 1: {segment_frames}, {batch_size}"
            )
        if not 0 < gain_range[0] <= gain_range[1]:
            raise ConfigError(f"gain_range must be (low, high) with 0 < low <= high: {gain_range}")
        expected = (mel_config.sample_rate, mel_config.hop_length)
        if (cache.sample_rate, cache.hop_length) != expected:
            raise DataError(
                f"{cache.folder} has sample rate {cache.sample_rate} and hop {cache.hop_length},"
                f" the mel has {expected[0]} and {expected[1]}: run waveflow prepare again"
            )
        if cache.manifest.n_mels not in (None, mel_config.n_mels):
            raise DataError(
                f"{cache.folder} was given mels of {cache.manifest.n_mels} bands, the recipe's"
                f" mel has {mel_config.n_mels}: run waveflow prepare again"
            )
        self._clips = cache.clips("train")
        if not self._clips:
            raise DataError(f"{cache.folder} has no training clips: all are kept for validation")
        self._cache = cache
        self._segment_frames = segment_frames
        self._batch_size = batch_size
        self._mel_config = mel_config
        self._seed = seed
        self._items = items
        self._log_gain_range = (math.log(gain_range[0]), math.log(gain_range[1]))
        self._end_frames = np.cumsum([clip.frames for clip in self._clips])

    def batch(self, step: int) -> Segments:
        """Draws the segments of a step, the same ones on every call.

        Args:
            step: number of the step, from 0 on.
        """
        rng = np.random.Generator(np.random.SFC64([self._seed, step]))
        # A frame that is drawn from all frames falls into a clip in proportion to its length.
        frames = rng.integers(self._end_frames[-1], size=self._batch_size)
        clips = np.searchsorted(self._end_frames, frames, side="right")
        positions = rng.random(self._batch_size)
        gains = np.exp(rng.uniform(*self._log_gain_range, size=self._batch_size))

        hop = self._cache.hop_length
        margin_frames = self._mel_config.margin_frames
        length = (self._segment_frames + 2 * margin_frames) * hop
        first_item, stop, _ = self._items.indices(self._batch_size)
        clips, positions, gains = clips[self._items], positions[self._items], gains[self._items]
        # A generator cannot skip the noise of the items before the first one.
        audio = rng.random((stop, length), dtype=np.float32)[first_item:]
        audio -= 0.5
        f0 = np.zeros((len(audio), self._segment_frames), np.float32)
        mels = []
        for item, (index, position) in enumerate(zip(clips, positions, strict=True)):
            clip = self._clips[index]
            start = int(position * (max(clip.frames - self._segment_frames, 0) + 1))
            first = (start - margin_frames) * hop
            _add_overlap(audio[item], self._cache.audio(clip), first)
            _add_overlap(f0[item], self._cache.f0(clip), start)
            given = self._cache.mel(clip)
            if given is not None:
                mels.append(given[start : start + self._segment_frames])
        audio *= STEP_16_BIT
        peaks = np.maximum(audio.max(axis=1), -audio.min(axis=1))
        gains = np.minimum(gains, 1 / peaks).astype(np.float32)
        audio *= gains[:, None]
        mel = self._amplified(mels, gains) if mels else None
        return Segments(torch.from_numpy(audio), torch.from_numpy(f0), mel, margin_frames)

    def _amplified(self, mels: list[np.ndarray], gains: np.ndarray) -> Tensor:
        """The mels (frames, n_mels) that louder audio would have, (B, n_mels, segment_frames)."""
        config = self._mel_config
        floor = np.float32(math.log(config.log_floor))
        shape = len(mels), config.n_mels, self._segment_frames
        amplified = np.full(shape, floor, np.float32)
        for target, mel, gain in zip(amplified, mels, config.power * np.log(gains), strict=True):
            # A gain moves no value below the floor; values that were below it stay.
            target[:, : len(mel)] = np.maximum(mel + gain, np.minimum(mel, floor)).T
        return torch.from_numpy(amplified)


def _add_overlap(target: np.ndarray, source: np.ndarray, first: int) -> None:
    """Adds source[first : first + len(target)] to target, where source has such elements."""
    begin, end = max(first, 0), min(first + len(target), len(source))
    target[begin - first : end - first] += source[begin:end]


class Prefetch(Generic[Item]):
    """Draws the items of the next steps in background threads, while a step is computed.

    The item of a step is a function of the step alone (`SegmentSampler.batch`). So any step may be
    asked for at any time, and the order of the threads changes nothing. Threads are enough, because
    numpy and the reading of memory-mapped pages release the interpreter's lock.

    Args:
        draw: makes the item of a step; several threads call it.
        ahead: number of steps to draw ahead.
    """

    def __init__(self, draw: Callable[[int], Item], ahead: int = 3) -> None:
        self._draw = draw
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(2, "prefetch")
        self._drawn: dict[int, Future[Item]] = {}
        self._waited_seconds = 0.0
        self._since = time.perf_counter()

    def get(self, step: int) -> Item:
        """The item of a step. Begins those of the next `ahead` steps and drops all others."""
        begin = time.perf_counter()
        wanted = range(step, step + self._ahead + 1)
        self._drawn = {s: self._drawn.get(s) or self._pool.submit(self._draw, s) for s in wanted}
        item = self._drawn.pop(step).result()
        self._waited_seconds += time.perf_counter() - begin
        return item

    def waiting_share(self) -> float:
        """The share of the time since the last call that `get` kept its caller waiting."""
        now = time.perf_counter()
        share = self._waited_seconds / max(now - self._since, 1e-9)
        self._waited_seconds, self._since = 0.0, now
        return share
