"""Mel spectrograms: their computation. Their settings are in `mel_config`."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from waveflow.audio.mel_config import MEL_PRESETS as MEL_PRESETS
from waveflow.audio.mel_config import MelConfig as MelConfig
from waveflow.audio.samples import audio_tensor, check_shape
from waveflow.audio.stft import hann_values, stft
from waveflow.buffers import ExactBuffers


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


def natural_log(linear: Tensor, config: MelConfig) -> Tensor:
    """The natural logarithm of a linear mel, with the config's floor."""
    if config.log_floor_mode == "add":
        return (linear + config.log_floor).log()
    return linear.clamp_min(config.log_floor).log()


def per_band(value: float | tuple[float, ...], like: Tensor) -> Tensor:
    """A scale or an offset for mels (..., n_mels, F) like this one."""
    values = torch.tensor(value, dtype=like.dtype, device=like.device)
    return values[:, None] if values.dim() else values


class MelSpectrogram(ExactBuffers):
    """Mel spectrogram of a batch of audio, differentiable, on any device.

    It computes in the type of its input: float64 audio gives a true float64 mel; half precision
    is computed and returned in float32, also under autocast.

    Example:
        >>> MelSpectrogram(MEL_PRESETS["hifigan"])(torch.zeros(2, 2560)).shape
        torch.Size([2, 80, 10])
    """

    def __init__(self, config: MelConfig) -> None:
        super().__init__()
        self.config = config
        weights = mel_filterbank(config)
        used = np.flatnonzero(weights.any(axis=0))
        # The bins that any band covers.
        self.bins = slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 1)
        projection = config.gain * weights[:, self.bins].T
        self.register_exact("projection", np.ascontiguousarray(projection))
        self.register_exact("window", hann_values(config.win_length, config.n_fft, config.window))

    def forward(self, audio: Tensor) -> Tensor:
        """The mel in the config's convention: for models, natural logarithms.

        The values are not looked at, because training would wait for them: `Vocoder.mel` does.

        Args:
            audio: (B, T) or (T,) in [-1, 1] at the config's sample rate; integers are scaled by
                their type's range.

        Returns:
            (B, n_mels, F) or (n_mels, F) with F = config.n_frames(T).

        Raises:
            AudioError: another shape, such as (T, channels), or no real numbers.
        """
        c = self.config
        mel = self.linear(audio)
        if c.log != "none":
            mel = natural_log(mel, c)
        if c != c.natural:
            mel = mel * (per_band(c.scale, mel) * unit_of_log(c)) + per_band(c.offset, mel)
        return mel if c.clip is None else mel.clamp(*c.clip)

    def linear(self, audio: Tensor) -> Tensor:
        """The mel before its logarithm; shapes as in `forward`."""
        audio = audio_tensor(audio)
        check_shape(audio.shape)
        if audio.dtype in (torch.float16, torch.bfloat16):
            audio = audio.float()
        batched = torch.atleast_2d(audio)
        with torch.autocast(audio.device.type, enabled=False):
            mel = self.of_spectrum(self.spectrum(batched)).transpose(1, 2)
        return mel if audio.dim() == 2 else mel[0]

    def spectrum(self, audio: Tensor) -> Tensor:
        """Complex STFT (B, F, n_fft // 2 + 1) of (B, T) in this mel's framing."""
        c = self.config
        window = self.exact("window", audio)
        if c.preemphasis:
            audio = audio - c.preemphasis * functional.pad(audio, (1, 0))[:, :-1]
        if c.padding == "hop" and audio.shape[1] < c.hop_length:
            audio = functional.pad(audio, (0, c.hop_length - audio.shape[1]))
        return stft(audio, c.n_fft, c.hop_length, window, c.padding, c.pad_mode)

    def of_spectrum(self, spectrum: Tensor) -> Tensor:
        """Linear mel, time-major (B, F, n_mels), of a complex spectrum (B, F, bins)."""
        used = spectrum[..., self.bins]
        energy = used.real.square() + used.imag.square()
        if self.config.magnitude_floor_mode == "add":
            energy = energy + self.config.magnitude_floor
        else:
            energy = energy.clamp_min(self.config.magnitude_floor)
        projection = self.exact("projection", energy)
        if self.config.power == 2:
            return energy @ projection
        # The root's slope is infinite at 0 (digital silence): the clamp gives gradient 0 there.
        return energy.clamp_min(torch.finfo(energy.dtype).tiny).sqrt() @ projection
