"""Random segments of a training cache, drawn so that a step can be repeated exactly."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from waveflow.audio.dequantise import STEP_16_BIT
from waveflow.audio.mel import MelConfig
from waveflow.data.cache import TrainingCache
from waveflow.errors import ConfigError, DataError


class Batch(NamedTuple):
    """A training batch, or the items of it that one process has.

    Attributes:
        audio: (B, (segment_frames + 2 * margin_frames) * hop_length) float32 in [-1, 1].
        f0: (B, segment_frames) float32, Hz at the centre of each hop of the segment, 0 where
            unvoiced.
        mel: (B, n_mels, segment_frames) float32 natural logarithms, where the cache was given mels.
    """

    audio: Tensor
    f0: Tensor
    mel: Tensor | None


class SegmentSampler:
    """Draws batches of segments of the training clips, uniformly over their audio.

    A batch depends on the cache, the sampler's arguments and the step's number alone, so a training
    that resumes at a step sees what it would have seen.

    Each item is a segment that starts at a multiple of the hop, with `mel_config.margin_frames`
    hops of its surroundings on either side so that the segment's mel can be computed without edge
    effects. Beyond a clip's ends there is digital silence. Every sample is dequantised by uniform
    noise one 16-bit step wide, and the whole is multiplied by a random gain. A mel that the cache
    was given gets the same gain, and is at the logarithm's floor beyond a clip's ends.

    Args:
        cache: where the clips are.
        segment_frames: length of a segment in hops.
        batch_size: number of segments in a batch.
        mel_config: must have the cache's sample rate and hop length, and as many bands as the
            mels that it was given.
        seed: makes one sequence of batches differ from another.
        gain_range: lowest and highest gain, drawn log-uniformly; an item whose peak would pass 1
            gets the gain that takes it to 1.
        items: those of the batch that are wanted, of several processes that draw it together.

    Raises:
        DataError: the cache has no training clips, or another sample rate, hop length or number
            of bands.
        ConfigError: a size or the gain range is not positive or not in order.

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

    def batch(self, step: int) -> Batch:
        """Draws the batch of a step, the same one on every call.

        Args:
            step: number of the step, from 0 on.
        """
        rng = np.random.Generator(np.random.SFC64([self._seed, step]))
        # A frame drawn from all of them falls into each clip in proportion to its length.
        frames = rng.integers(self._end_frames[-1], size=self._batch_size)
        clips = np.searchsorted(self._end_frames, frames, side="right")
        positions = rng.random(self._batch_size)
        gains = np.exp(rng.uniform(*self._log_gain_range, size=self._batch_size))

        hop = self._cache.hop_length
        margin_frames = self._mel_config.margin_frames
        length = (self._segment_frames + 2 * margin_frames) * hop
        first_item, stop, _ = self._items.indices(self._batch_size)
        clips, positions, gains = clips[self._items], positions[self._items], gains[self._items]
        # A generator cannot leave out the noise of the items before.
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
        return Batch(torch.from_numpy(audio), torch.from_numpy(f0), mel)

    def _amplified(self, mels: list[np.ndarray], gains: np.ndarray) -> Tensor:
        """The mels (frames, n_mels) of audio times its gain, (B, n_mels, segment_frames)."""
        config = self._mel_config
        floor = np.float32(math.log(config.log_floor))
        shape = len(mels), config.n_mels, self._segment_frames
        amplified = np.full(shape, floor, np.float32)
        for target, mel, gain in zip(amplified, mels, config.power * np.log(gains), strict=True):
            # A gain takes nothing below the floor; what an acoustic model put there stays.
            target[:, : len(mel)] = np.maximum(mel + gain, np.minimum(mel, floor)).T
        return torch.from_numpy(amplified)


def _add_overlap(target: np.ndarray, source: np.ndarray, first: int) -> None:
    """Adds source[first : first + len(target)] to target, where source has such elements."""
    begin, end = max(first, 0), min(first + len(target), len(source))
    target[begin - first : end - first] += source[begin:end]
