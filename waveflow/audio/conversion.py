"""Conversion of mels from one convention to another.

Without loss: base, decibels, floor, gain, scale and offset, area normalisation. Framing and the
edges' padding (`padding`, `pad_mode`, `window`) change no value: a mel framed otherwise is spoken
half a hop early or late, which `delay_samples` tells. With loss: all else, by interpolation.

All is numpy, so that mels can be converted where there is no torch.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from waveflow.audio.filters import hann_values, mel_center_hz, mel_filterbank, unit_of_log
from waveflow.audio.mel_config import MelConfig, edge_padding
from waveflow.errors import MelMismatchError

# Fields whose difference loses something.
LOSSY = (
    "sample_rate", "n_fft", "hop_length", "win_length", "n_mels", "f_min", "f_max_hz", "mel_scale",
    "power", "preemphasis",
)  # fmt: skip

# ln E|X| - ln sqrt(E|X|^2) of noise, whose magnitudes are Rayleigh distributed: ln sqrt(pi / 4).
_MEAN_TO_ROOT = -0.1208

Mel = NDArray[np.floating]


class MelConversion:
    """Mels of one convention in another one.

    A lossy conversion takes each band as the mean level of its filter at the band's centre, and
    interpolates these levels linearly over frequency (on the source's mel scale) and over time. The
    level beyond the lowest and highest source band is theirs. Levels are corrected for window,
    power and pre-emphasis as of noise.

    Args:
        source: the convention of the mels.
        target: the convention wanted.
        lossy: convert what cannot be converted exactly by interpolation instead of refusing it.

    Raises:
        MelMismatchError: a difference that is lossy, with both values.

    Example:
        >>> natural = MelConfig(sample_rate=22050)
        >>> log10 = natural.model_copy(update={"log": "10"})
        >>> MelConversion(log10, natural)(np.full((80, 1), -2.0))[0].round(4)
        array([-4.6052])
    """

    def __init__(self, source: MelConfig, target: MelConfig, lossy: bool = False) -> None:
        self.source = source
        self.target = target
        differ = [name for name in LOSSY if getattr(source, name) != getattr(target, name)]
        if differ and not lossy:
            named = ", ".join(f"{n} {_of(source, n)}, not {_of(target, n)}" for n in differ)
            raise MelMismatchError(
                f"this mel cannot be converted without loss ({named.replace('_hz', '')}): compute "
                "it with the model's settings, or accept an interpolation with --lossy (lossy=True)"
            )
        self._interpolates = bool(differ)

    @property
    def changes_frames(self) -> bool:
        """Whether frames are interpolated over time: another rate or hop."""
        a, b = self.source, self.target
        return (a.sample_rate, a.hop_length) != (b.sample_rate, b.hop_length)

    @property
    def delay_samples(self) -> int:
        """Samples by which speech of the converted mel comes too early; negative: too late."""
        if self.changes_frames:
            return 0
        return round(_centre(self.source) - _centre(self.target))

    def __call__(self, mel: Mel) -> Mel:
        """The converted mel.

        Args:
            mel: (..., n_mels, F) of the source, float32 or float64, finite.

        Returns:
            (..., n_mels, F) of the target; F differs where `changes_frames`.
        """
        logs = _plain(mel, self.source)
        if self._interpolates:
            bands, shift = self._bands(logs)
            logs = bands @ logs + shift
            if self.changes_frames:
                logs = self._resampled(logs)
        return _in_convention(logs, self.target)

    def _bands(self, like: Mel) -> tuple[Mel, Mel]:
        """Matrix (M, M') and shift (M, 1) from the source's logarithms to the target's."""
        a, b = self.source, self.target
        to, at = mel_center_hz(b), mel_center_hz(a)
        at_source = np.interp(to, at, np.arange(a.n_mels))
        matrix = b.power / a.power * _interpolation(at_source, a.n_mels)
        shift = np.array(_level(b)) - matrix @ np.array(_level(a))
        return matrix.astype(like.dtype), shift[:, None].astype(like.dtype)

    def _resampled(self, logs: Mel) -> Mel:
        """(..., M, F) at the target's frames, (..., M, F')."""
        a, b = self.source, self.target
        n_frames = logs.shape[-1]
        n_hops = n_frames - 1 if a.padding == "center" else n_frames
        n_wanted = b.n_frames(max(1, round(n_hops * a.hop_length * b.sample_rate / a.sample_rate)))
        seconds = (np.arange(n_wanted) * b.hop_length + _centre(b)) / b.sample_rate
        places = ((seconds * a.sample_rate - _centre(a)) / a.hop_length).clip(0, n_frames - 1)
        left = np.minimum(places.astype(np.int64), max(n_frames - 2, 0))
        right = np.minimum(left + 1, n_frames - 1)
        share = (places - left).astype(logs.dtype)
        return logs[..., left] + share * (logs[..., right] - logs[..., left])


def spectral_density(mel: Mel, config: MelConfig) -> Mel:
    """ln of the amplitude density that noise with this mel has, of whatever convention it is.

    Args:
        mel: (..., n_mels, F) in the config's convention.

    Returns:
        As the mel. White noise of standard deviation 1 at a sample rate of 1 Hz has 0.
    """
    level = _per_band(_level(config), mel)
    return (_plain(mel, config) - level) / config.power


def _of(config: MelConfig, name: str) -> str:
    value = getattr(config, name)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _per_band(value: float | tuple[float, ...], like: Mel) -> Mel:
    """A scale or an offset for mels (..., n_mels, F) like this one."""
    values = np.asarray(value, like.dtype)
    return values[:, None] if values.ndim else values


def _centre(config: MelConfig) -> float:
    """The sample in the middle of frame 0."""
    edge = edge_padding(config.n_fft, config.hop_length, config.padding)
    return config.n_fft / 2 - edge


def _plain(mel: Mel, config: MelConfig) -> Mel:
    """Natural logarithms of the spectra, of area-normalised bands, without gain or floor."""
    # Far below every floor, and not so far that an interpolation beside it would be silence.
    least = 1e-10
    values = (mel - _per_band(config.offset, mel)) / _per_band(config.scale, mel)
    if config.clip is not None and config.log != "none":
        # A frame wholly at the lower end is silence; alone, a value there lay little below.
        silent = (mel <= config.clip[0]).all(-2, keepdims=True)
        silence = np.asarray(np.log(config.log_floor) * unit_of_log(config), mel.dtype)
        values = np.where(silent, silence, values)
    if config.log == "none":
        logs = np.log(np.maximum(values, least))
    else:
        logs = values / unit_of_log(config)
        if config.log_floor_mode == "add":
            logs = np.log(np.maximum(_exp(logs) - config.log_floor, least))
    return logs - _per_band(_band_gain(config), mel)


def _in_convention(logs: Mel, config: MelConfig) -> Mel:
    """The inverse of `_plain`, with the config's floor and clip."""
    logs = logs + _per_band(_band_gain(config), logs)
    if config.log == "none":
        mel = _exp(logs)
    else:
        floor = float(np.log(config.log_floor))
        added = config.log_floor_mode == "add"
        floored = np.log(_exp(logs) + config.log_floor) if added else np.maximum(logs, floor)
        mel = floored * unit_of_log(config)
    mel = mel * _per_band(config.scale, mel) + _per_band(config.offset, mel)
    return mel if config.clip is None else mel.clip(*config.clip)


def _exp(logs: Mel) -> Mel:
    with np.errstate(over="ignore"):  # of a mel that is no logarithm; it is refused as infinite
        return np.exp(logs)


@lru_cache(maxsize=128)
def _band_gain(config: MelConfig) -> tuple[float, ...]:
    """ln of each band's factor over an area-normalised band of gain 1."""
    weights = mel_filterbank(config).sum(1)
    area = mel_filterbank(config.model_copy(update={"norm": "slaney"})).sum(1)
    # A band between two bins has no weight, and no level in either.
    ratio = np.divide(weights, area, out=np.ones_like(area), where=area > 0)
    return tuple(np.log(config.gain * ratio).tolist())


@lru_cache(maxsize=128)
def _level(config: MelConfig) -> tuple[float, ...]:
    """ln of each area-normalised band, of white noise of density 1."""
    area = mel_filterbank(config.model_copy(update={"norm": "slaney"})).sum(1)
    window = hann_values(config.win_length, config.n_fft, config.window)
    radians = 2 * np.pi * mel_center_hz(config) / config.sample_rate
    tilt = np.abs(1 - config.preemphasis * np.exp(-1j * radians))
    root = np.sqrt(np.sum(window**2) * config.sample_rate) * tilt
    rayleigh = _MEAN_TO_ROOT if config.power == 1 else 0.0
    level = np.log(np.maximum(area, 1e-12)) + config.power * np.log(root) + rayleigh
    return tuple(level.tolist())


def _interpolation(places: np.ndarray, n: int) -> np.ndarray:
    """Matrix (len(places), n) of linear interpolation at places from 0 to n - 1."""
    return np.stack([np.interp(places, np.arange(n), row) for row in np.eye(n)], axis=1)
