"""Mel spectrograms: their computation. Their settings are in `mel_config`."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from waveflow.audio.filters import hann_values, mel_filterbank, unit_of_log
from waveflow.audio.mel_config import MEL_PRESETS as MEL_PRESETS
from waveflow.audio.mel_config import MelConfig as MelConfig
from waveflow.audio.samples import audio_tensor, check_shape
from waveflow.audio.stft import stft
from waveflow.buffers import ExactBuffers


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
