"""Telling the convention of a mel spectrogram by its values.

A mel of speech shows its convention in four ways. From frame to frame the noise in it moves by an
amount that depends on the bands alone, so its movement tells the logarithm's base, whatever the
level. Level and long-term spectrum of speech tell gain and area norm. A floor is one value, many
times over.
"""

import math
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from waveflow.audio.conversion import spectral_density
from waveflow.audio.filters import hann_values, mel_center_hz, mel_filterbank, unit_of_log
from waveflow.audio.mel_config import MelConfig
from waveflow.audio.mel_names import NATIVE, SCALES, convention_named
from waveflow.errors import MelMismatchError

# A mel that other conventions explain better is foreign only if it has this many frames, by this
# much, and if it is like speech at all. Own mels of 64 frames lost by 4.5 at most, of 24 by 14;
# speech explained scores -12 or more, sines and noise -14 or less.
FEWEST_FRAMES = 64
_CLEARLY = 6.0
_LIKE_SPEECH = -12.0
_SURELY_OWN = -7.0
# Natural logarithms of magnitudes of audio in [-1, 1] are between these.
_LEAST, _GREATEST = -24.0, 8.0
# No more frames are looked at.
_MOST_FRAMES = 300
FEWEST_TO_FIND = 24
# Of 30 clips of five voices: movement over that of noise; from the 5 % to the 99 % quantile of the
# level; the latter; and the mean spectrum of the louder half of the frames, over its mean. Levels
# are ln densities.
_MOVEMENT, _MOVEMENT_SPREAD = 1.29, 0.07
_RANGE, _RANGE_SPREAD = 7.8, 1.0
_LOUD, _LOUD_SPREAD = -5.9, 1.3
_SPECTRUM_HZ = (120, 200, 300, 450, 650, 900, 1200, 1600, 2100, 2800, 3600, 4500, 5500, 6600)
_SPECTRUM = (
    1.06, 1.59, 1.56, 1.30, 0.80, 0.14, -0.30, -0.32, -0.53, -0.35, -0.81, -0.70, -1.53, -1.93,
)  # fmt: skip
_SPECTRUM_SPREAD = 0.5
# Neighbouring bands tell nearly the same.
_FREE_BANDS = 5.0
_FLOOR_BONUS = 4.0
# Acoustic models make mels that are smoother than a recording's, of any convention.
_MOST_FOR_SMOOTH = 5.0
# No system's floor is lower than 1e-10.
_LEAST_LOGARITHM = -23.1

_Float = TypeVar("_Float", bound=np.floating)

# Scales by figures of their own, which a mel does not tell; with typical ones, to know them by.
_UNTOLD: dict[str, dict[str, object]] = {
    "zero mean and unit variance": {"scale": 1 / 2.1, "offset": 5.5 / 2.1},
    "[0, 1] by its own least and greatest value": {"scale": 1 / 13, "offset": 11 / 13},
    "[-1, 1] by its own least and greatest value": {"scale": 2 / 13, "offset": 9 / 13},
    "[-4, 4] by its own least and greatest value": {"scale": 8 / 13, "offset": 36 / 13},
}


class Reading(NamedTuple):
    """A convention that a mel may be in.

    Attributes:
        name: of a preset, or of scales joined by commas.
        config: its settings.
        score: ln of how well speech of that convention looks like the mel; only differences count.
    """

    name: str
    config: MelConfig
    score: float


def readings_of(own: MelConfig) -> dict[str, MelConfig]:
    """The model's own convention, and the scales that a mel of its bands may have, by name."""
    names = [NATIVE, *SCALES]
    for level in ("power", "no-norm", "int16"):
        names += [f"{level},{log}" for log in ("log10", "log2", "db", "linear")]
    return {name: convention_named(name, own) for name in names}


def find_convention(mel: NDArray[np.floating], own: MelConfig) -> Reading:
    """The convention that a mel of speech with a model's bands is in.

    Args:
        mel: (n_mels, F), finite.
        own: the model's convention.

    Raises:
        MelMismatchError: it is too short to tell, is no speech, or was normalised by figures that
            it does not tell.
    """
    n_frames = _speech(mel).shape[1]
    if n_frames < FEWEST_TO_FIND:
        raise MelMismatchError(
            f"{n_frames} frames do not tell their convention: give {FEWEST_TO_FIND} or more, "
            "or its name"
        )
    best = _ranked(mel, own)[0]
    if best.name in _UNTOLD:
        raise MelMismatchError(
            f"this mel looks normalised to {best.name}, and does not tell the figures: undo it, or "
            "give them as its convention, FILE.toml with scale and offset"
        )
    if best.score < _LIKE_SPEECH - _CLEARLY:
        raise MelMismatchError("this mel is not like speech in any convention: name its convention")
    return best


def foreign_words(mel: NDArray[np.floating], own: MelConfig) -> str:
    """Which other convention a mel is clearly in, with the remedy; empty if it may be a model's.

    It sees values, not history: a plausible mel may still be wrong (other band edges).

    Args:
        mel: (n_mels, F), finite.
        own: the model's convention.
    """
    speech = _speech(mel)
    if not speech.size:
        return ""
    low, high = float(speech.min()), float(speech.max())
    impossible = low < _LEAST or low >= 0 or high > _GREATEST
    best = None
    if speech.shape[1] >= (FEWEST_TO_FIND if impossible else FEWEST_FRAMES):
        native = rank(mel, {NATIVE: own})[0].score
        if native > _SURELY_OWN and not impossible:
            return ""  # no other could be clearly better: spares the time of asking
        best = _ranked(mel, own)[0]
        if best.score <= max(_LIKE_SPEECH, native + _CLEARLY):
            best = None
    if best is None:
        if not impossible:
            return ""
        return (
            f"this mel, {low:.3g} to {high:.3g}, cannot hold natural logarithms of magnitudes: "
            "name its convention (--convention)"
        )
    if best.name in _UNTOLD:
        return (
            f"this mel looks normalised to {best.name}, and models take natural logarithms: undo "
            f"it or give --convention FILE.toml with scale and offset, or {NATIVE} if it is right"
        )
    return (
        f"this mel looks like {best.name}, not like natural logarithms of magnitudes: give "
        f"--convention {best.name}, its system's name (waveflow doctor), or {NATIVE} if it is right"
    )


def _ranked(mel: NDArray[np.floating], own: MelConfig) -> list[Reading]:
    configs = readings_of(own)
    for name, changes in _UNTOLD.items():
        configs[name] = MelConfig.model_validate(own.model_dump() | changes)
    return rank(mel, configs)


def rank(mel: NDArray[np.floating], configs: dict[str, MelConfig]) -> list[Reading]:
    """Conventions by how well they explain a mel, the best one first.

    Args:
        mel: (n_mels, F), finite, F >= 3.
        configs: conventions to compare, with as many bands.
    """
    values = np.asarray(mel, np.float64)
    speech = _speech(values)[:, :_MOST_FRAMES]
    if speech.shape[1] < 3:
        speech = values
    found = [
        Reading(name, config, float(_score(speech, config) + _prior(name, values)))
        for name, config in configs.items()
    ]
    return sorted(found, key=lambda reading: -reading.score)


def _speech(mel: NDArray[_Float]) -> NDArray[_Float]:
    """The mel without frames of one value: silence, padding or a denoiser's question."""
    return mel[:, mel.min(0) < mel.max(0)]


def _prior(name: str, mel: NDArray[np.float64]) -> float:
    if name in _UNTOLD:
        low, high = float(mel.min()), float(mel.max())
        if name.startswith("["):
            ends = {"[0": (0.0, 1.0), "[-1": (-1.0, 1.0), "[-4": (-4.0, 4.0)}[name.split(",")[0]]
            # By its own ends: each is one value, where a clipped scale has many.
            once = max((mel == low).sum(), (mel == high).sum()) <= 2
            own_ends = once and np.allclose((low, high), ends, atol=1e-3)
            return 2 * _FLOOR_BONUS if own_ends else -math.inf
        if abs(mel.mean(1)).max() < 0.02 and abs(mel.std(1) - 1).max() < 0.02:
            return 5 * _FLOOR_BONUS  # band by band, which leaves no spectrum to look at
        normal = abs(mel.mean()) < 0.02 and abs(mel.std() - 1) < 0.02
        return _FLOOR_BONUS if normal else -3.0
    return 1.0 if name == NATIVE else -1.5 if "," in name else 0.0


def _score(mel: NDArray[np.float64], config: MelConfig) -> float:
    if not _within(mel, config):
        return -math.inf
    density = spectral_density(mel, config)
    free = (mel > mel.min() + 1e-6 * np.ptp(mel)) & (mel < mel.max())
    movement = _movement(density, free)
    if not movement > 0:
        return -math.inf
    n_frames = mel.shape[1]
    spread = math.sqrt(_MOVEMENT_SPREAD**2 + 0.7 / n_frames)
    moved = math.log(movement / (_MOVEMENT * _noise_movement(config.natural))) / spread
    penalty = 0.5 * moved**2 if moved > 0 else min(0.5 * moved**2, _MOST_FOR_SMOOTH)
    dark, loud = np.quantile(density, (0.05, 0.99))
    spread = math.sqrt(_RANGE_SPREAD**2 + 100 / n_frames)
    penalty += 0.5 * ((loud - dark - _RANGE) / spread) ** 2
    penalty += 0.5 * ((loud - _LOUD) / _LOUD_SPREAD) ** 2
    energy = density.mean(0)
    spectrum = density[:, energy >= np.median(energy)].mean(1)
    hz, usual = np.array(_SPECTRUM_HZ), np.array(_SPECTRUM)
    known = (hz >= config.f_min) & (hz <= config.f_max_hz)
    at = np.interp(hz, mel_center_hz(config), spectrum)[known]
    usual = usual[known]
    shape = (at - at.mean() - usual + usual.mean()) / _SPECTRUM_SPREAD
    penalty += 0.5 * _FREE_BANDS * float((shape**2).mean())
    return (_FLOOR_BONUS if _has_floor(mel, config) else 0.0) - penalty


def _within(mel: NDArray[np.float64], config: MelConfig) -> bool:
    """Whether the convention can have such values at all."""
    low, high = float(mel.min()), float(mel.max())
    if config.log == "none":
        return low >= 0.0 and high > 0.0
    if config.clip is None:
        return low >= _LEAST_LOGARITHM * unit_of_log(config)
    slack = 1e-3 * (config.clip[1] - config.clip[0])
    return config.clip[0] - slack <= low and high <= config.clip[1] + slack


def _movement(density: NDArray[np.floating], free: NDArray[np.bool_]) -> float:
    """Median of the second difference over time, where no value is at an end of the scale."""
    inner = free[:, 2:] & free[:, 1:-1] & free[:, :-2]
    changes = np.abs(np.diff(density, n=2, axis=1))[inner]
    return float(np.median(changes)) if changes.size else 0.0


@lru_cache(maxsize=64)
def _noise_movement(config: MelConfig) -> float:
    """`_movement` of noise, in a mel of natural logarithms."""
    noise = np.random.default_rng(0).standard_normal(120 * config.hop_length)
    noise[1:] -= config.preemphasis * noise[:-1]
    frames = np.lib.stride_tricks.sliding_window_view(noise, config.n_fft)[:: config.hop_length]
    window = hann_values(config.win_length, config.n_fft, config.window)
    magnitudes = np.abs(np.fft.rfft(frames * window)) ** config.power
    linear = config.gain * mel_filterbank(config) @ magnitudes.T
    density = spectral_density(np.log(np.maximum(linear, config.log_floor)), config)
    return _movement(density, np.ones(density.shape, bool))


def _has_floor(mel: NDArray[np.float64], config: MelConfig) -> bool:
    """Whether many values are the convention's least one."""
    if config.log == "none" or isinstance(config.scale, tuple) or isinstance(config.offset, tuple):
        return False
    floor = config.scale * unit_of_log(config) * math.log(config.log_floor) + config.offset
    least = floor if config.clip is None else max(floor, config.clip[0])
    at_floor = np.abs(mel - least) < 1e-4 * max(1.0, abs(least))
    return bool(at_floor.mean() > 2e-4 and np.isclose(mel.min(), least, atol=1e-3))
