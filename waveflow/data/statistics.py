"""Statistics of a training cache that a model carries with it."""

import math

import torch

from waveflow.audio.dequantise import STEP_16_BIT
from waveflow.audio.mel import MelConfig, MelSpectrogram
from waveflow.data.cache import TrainingCache


def mel_range(
    cache: TrainingCache, config: MelConfig
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Lowest and highest value of each band over (at most 200) training clips.

    Of the mels that the cache was given, if it was.
    """
    clips = cache.clips("train")
    mel = MelSpectrogram(config)
    lows = torch.full((config.n_mels,), math.inf)
    highs = torch.full((config.n_mels,), -math.inf)
    for clip in clips[:: max(1, len(clips) // 200)]:
        given = cache.mel(clip)
        if given is None:
            frames = mel(torch.from_numpy(cache.audio(clip) * STEP_16_BIT).float())
        else:
            frames = torch.from_numpy(given.T.copy())
        lows = torch.minimum(lows, frames.amin(1))
        highs = torch.maximum(highs, frames.amax(1))
    return tuple(lows.tolist()), tuple(highs.tolist())
