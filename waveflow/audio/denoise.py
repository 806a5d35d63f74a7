"""Denoiser: subtracts a constant spectrum, the hum of a vocoder or the noise of a room."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from waveflow.audio.mel import MelConfig, MelSpectrogram
from waveflow.audio.samples import audio_tensor, check_range, check_shape
from waveflow.audio.stft import frame, hann_window, istft, stft
from waveflow.errors import AudioError, ConfigError

Bias = Literal["zeros", "normal", "silence"]

_BIAS_FRAMES = 88
# An hour of audio in blocks: its whole spectrum would take gigabytes.
_BLOCK_FRAMES = 1024
_FEWEST_BINS = 3


class Denoiser:
    """Spectral subtraction: max(|S| - strength * bias, 0) in each bin, the phase of S kept.

    S is the centred STFT in periodic Hann windows of n_fft samples, a quarter of that apart.

    Args:
        bias: (n_fft // 2 + 1,), magnitudes to subtract; they set n_fft.

    Raises:
        ConfigError: If `bias` has another shape, or values that are negative or not finite.

    Reference:
        Boll, Suppression of Acoustic Noise in Speech Using Spectral Subtraction, 1979 (mean
        magnitude of the noise, half-wave rectification); NVIDIA/waveglow, denoiser.py (n_fft 1024;
        the bias is the hum of a vocoder).

    Example:
        >>> denoiser = Denoiser.of_noise(0.01 * torch.randn(22050), n_fft=1024)
        >>> denoiser(torch.randn(2, 5000), strength=1.0).shape
        torch.Size([2, 5000])
    """

    def __init__(self, bias: Tensor) -> None:
        if bias.dim() != 1 or len(bias) < _FEWEST_BINS:
            raise ConfigError(
                f"a bias spectrum is (n_fft / 2 + 1,) magnitudes, not {tuple(bias.shape)}"
            )
        if not (torch.isfinite(bias) & (bias >= 0)).all():
            raise ConfigError("this bias spectrum holds negative, NaN or infinite magnitudes")
        self.bias = bias
        self.n_fft = 2 * (len(bias) - 1)
        self.hop_length = self.n_fft // 4

    @classmethod
    def of_model(
        cls, synthesise: Callable[[Tensor], Tensor], config: MelConfig, bias: Bias
    ) -> "Denoiser":
        """A denoiser for the hum of a vocoder, heard where the mel asks for silence.

        Args:
            synthesise: mel (1, M, F) to audio (1, F hop_length), without noise (sigma 0).
            config: of the mel; its n_fft is the denoiser's.
            bias: "zeros" or "normal" as NVIDIA: the first frame of the audio of a log-mel of zeros
                or of standard normal values, to which a WaveGlow answers with its hum. A model that
                follows such a mel, which is a loud one, needs "silence": the mean over the audio of
                the mel of digital silence.
        """
        audio = synthesise(_bias_mel(config, bias))
        if bias == "silence":
            return cls.of_noise(audio, config.n_fft)
        window = hann_window(config.n_fft, config.n_fft, audio.dtype, audio.device)
        spectrum = stft(audio[:1, : config.n_fft], config.n_fft, config.n_fft // 4, window)
        return cls(spectrum[0, 0].abs())

    @classmethod
    def of_noise(cls, noise: Tensor, n_fft: int) -> "Denoiser":
        """A denoiser for the mean magnitudes of noise (T,) or (B, T), such as a recorded pause.

        Args:
            n_fft: a multiple of 4; `n_fft_at` gives the usual one for a sample rate.

        Raises:
            AudioError: If the noise is shorter than n_fft, has another shape, or is not finite.
        """
        noise = _checked(noise)
        if noise.shape[1] < n_fft:
            raise AudioError(
                f"{noise.shape[1]} samples are too short for a noise: give {n_fft} or more"
            )
        window = hann_window(n_fft, n_fft, noise.dtype, noise.device)
        frames = frame(noise, n_fft, n_fft // 4)
        total = sum(
            torch.fft.rfft(part * window).abs().sum((0, 1))
            for part in frames.split(_BLOCK_FRAMES, dim=1)
        )
        return cls(total / (frames.shape[0] * frames.shape[1]))

    def __call__(self, audio: Tensor, strength: float) -> Tensor:
        """Audio with `strength` times the bias subtracted, as long as it was.

        Args:
            audio: (T,) or (B, T), of any length; half precision is computed in float32.
            strength: 0 to 10; 1 subtracts the bias once. NVIDIA takes 0.01 or 0.1 for WaveGlow.

        Returns:
            (T,) or (B, T), float32 or float64.

        Raises:
            AudioError: If the audio has another shape, is empty, not finite, or far beyond [-1, 1].
            ConfigError: If the strength is out of range.
        """
        if not 0 <= strength <= 10:
            raise ConfigError(f"strength {strength} is out of range: give a number from 0 to 10")
        batch = _checked(audio)
        threshold = strength * self.bias.to(batch)
        denoised = torch.empty_like(batch)
        # A sample lies in frames that begin and end less than n_fft from it. So a block with that
        # much of its neighbours gives the samples of the whole.
        reach = -(-self.n_fft // self.hop_length) * self.hop_length
        size = _BLOCK_FRAMES * self.hop_length
        for start in range(0, batch.shape[1], size):
            left = min(start, reach)
            block = self._subtract(batch[:, start - left : start + size + reach], threshold)
            denoised[:, start : start + size] = block[:, left : left + size]
        return denoised if audio.dim() == 2 else denoised[0]

    def _subtract(self, audio: Tensor, threshold: Tensor) -> Tensor:
        window = hann_window(self.n_fft, self.n_fft, audio.dtype, audio.device)
        spectrum = stft(audio, self.n_fft, self.hop_length, window)
        magnitude = spectrum.abs().clamp_min(torch.finfo(audio.dtype).tiny)
        gain = (1 - threshold / magnitude).clamp_min(0)
        return istft(spectrum * gain, self.n_fft, self.hop_length, window, length=audio.shape[1])


def n_fft_at(sample_rate: int) -> int:
    """The power of two that lasts about as long as 1024 samples at 22050 Hz, NVIDIA's window."""
    return 2 ** max(2, round(math.log2(1024 * sample_rate / 22050)))


def _bias_mel(config: MelConfig, bias: Bias) -> Tensor:
    """(1, M, F): the mel that a model is asked to voice for its bias."""
    shape = (1, config.n_mels, _BIAS_FRAMES)
    if bias == "zeros":
        return torch.zeros(shape)
    if bias == "normal":
        return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return MelSpectrogram(config)(torch.zeros(1, _BIAS_FRAMES * config.hop_length))


def _checked(audio: Tensor) -> Tensor:
    """Audio as (B, T), float32 or float64; integers are scaled by their type's range."""
    audio = audio_tensor(audio)
    check_shape(audio.shape)
    low, high = audio.aminmax()
    check_range(float(low), float(high))
    if audio.dtype in (torch.float16, torch.bfloat16):
        audio = audio.float()
    return torch.atleast_2d(audio)
