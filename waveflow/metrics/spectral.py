"""Distances of waveforms that need no outside package."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FloatArray = NDArray[np.floating]


def log_mel_l1(reference: FloatArray, audio: FloatArray, mel: Callable[[Tensor], Tensor]) -> float:
    """Returns the mean absolute difference of two log-mels, in nats.

    Args:
        reference: (T,) in [-1, 1].
        audio: (T,).
        mel: function from (2, T) to (2, n_mels, F), natural logarithms, such as a MelSpectrogram.
    """
    both = torch.from_numpy(np.stack([reference, audio]).astype(np.float32))
    first, second = mel(both)
    return float((first - second).abs().mean())


def signal_to_noise_db(reference: Tensor, audio: Tensor) -> float:
    """Returns the signal-to-noise ratio of audio against a reference of the same shape, in dB.

    It is infinite if they are equal.
    """
    reference, audio = reference.double().cpu(), audio.double().cpu()
    noise = (audio - reference).square().sum()
    return (10 * torch.log10(reference.square().sum() / noise)).item()


def draw_correlation(first: FloatArray, second: FloatArray) -> float:
    """Returns the Pearson correlation of two waveforms (T,): 1 if a model ignores its noise.

    It is NaN if one of them is constant.
    """
    a = np.asarray(first, dtype=np.float64) - np.mean(first, dtype=np.float64)
    b = np.asarray(second, dtype=np.float64) - np.mean(second, dtype=np.float64)
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norm) if norm > 0 else float("nan")
