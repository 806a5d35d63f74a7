"""Windows and mel filters as numpy arrays. Nothing here imports torch."""

import math

import numpy as np
from numpy.typing import NDArray

from waveflow.audio.mel_config import MelConfig, Window


def hann_values(win_length: int, n_fft: int, window: Window = "periodic") -> NDArray[np.float64]:
    """Hann window of `win_length` in the middle of a frame of `n_fft` samples, float64.

    A periodic one has a period of win_length, a symmetric one of win_length - 1.
    """
    period = win_length if window == "periodic" else max(win_length - 1, 1)
    values = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(win_length) / period)
    left = (n_fft - win_length) // 2
    return np.pad(values, (left, n_fft - win_length - left))


def _hz_to_mel(hz: np.ndarray, scale: str) -> np.ndarray:
    if scale == "htk":
        return 2595.0 * np.log10(1.0 + hz / 700.0)
    # Slaney 1998: linear to 1 kHz (15 mel), then 27 steps for each factor of 6.4.
    above = 15.0 + np.log(np.maximum(hz, 1000.0) / 1000.0) * (27.0 / np.log(6.4))
    return np.where(hz < 1000.0, hz * (3.0 / 200.0), above)


def _mel_to_hz(mel: np.ndarray, scale: str) -> np.ndarray:
    if scale == "htk":
        return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
    above = 1000.0 * np.exp((mel - 15.0) * (np.log(6.4) / 27.0))
    return np.where(mel < 15.0, mel * (200.0 / 3.0), above)


def _band_edges_hz(config: MelConfig) -> np.ndarray:
    """(n_mels + 2,): band i rises from edge i to its centre i + 1 and falls to edge i + 2."""
    low, high = _hz_to_mel(np.array([config.f_min, config.f_max_hz]), config.mel_scale)
    return _mel_to_hz(np.linspace(low, high, config.n_mels + 2), config.mel_scale)


def mel_center_hz(config: MelConfig) -> np.ndarray:
    """Centre of each mel band in Hz, (n_mels,) float64."""
    return _band_edges_hz(config)[1:-1]


def band_interpolation(config: MelConfig, hertz: np.ndarray) -> np.ndarray:
    """(n_mels, n): linear interpolation from the bands' centres to n frequencies, in float64.

    Below the first centre and above the last one their values are held.
    """
    centres = mel_center_hz(config)
    return np.stack([np.interp(hertz, centres, band) for band in np.eye(config.n_mels)])


def mel_filterbank(config: MelConfig) -> np.ndarray:
    """Triangular mel filters, (n_mels, n_fft // 2 + 1) float64, as librosa.filters.mel gives.

    Reference: Slaney, Auditory Toolbox, 1998 (scale and area normalisation); HTK Book, section 5.4.
    """
    edges = _band_edges_hz(config)
    bins = np.linspace(0.0, config.sample_rate / 2, config.n_fft // 2 + 1)
    slopes = (bins - edges[:, None]) / np.diff(edges, append=np.inf)[:, None]
    rising, falling = slopes[:-2], 1.0 - slopes[1:-1]
    weights = np.maximum(0.0, np.minimum(rising, falling))
    if config.norm == "slaney":
        weights *= (2.0 / (edges[2:] - edges[:-2]))[:, None]
    return weights


def unit_of_log(config: MelConfig) -> float:
    """The natural logarithm's factor to the config's: 1 for "e", 20 / ln 10 for decibels."""
    match config.log:
        case "2":
            return 1 / math.log(2)
        case "10":
            return 1 / math.log(10)
        case "db":
            return 20 / config.power / math.log(10)
    return 1.0
