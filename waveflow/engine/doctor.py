"""Which convention a mel is in: by its values, and by what a model makes of it."""

from typing import NamedTuple

import numpy as np

from waveflow.audio.conventions import FEWEST_TO_FIND, Reading, rank, readings_of
from waveflow.audio.mel_config import MEL_PRESETS, MelConfig
from waveflow.engine.evidence import VALUES, evidence, middle_of
from waveflow.engine.vocoder import Vocoder
from waveflow.errors import MelMismatchError

# Readings that the values leave open: so much behind the best (natural logarithm).
_OPEN = 4.0


class Diagnosis(NamedTuple):
    """A convention that a mel may be in.

    Attributes:
        names: of conventions with the same values, which differ in framing, floor or sample rate
            alone. The rate cannot be told: a voice at 16 kHz is a higher one at 22 kHz.
        behind: how much worse than the best one it explains the values (natural logarithm).
        evidence: what the model says (`waveflow.engine.evidence`); None where the values have
            excluded it.
    """

    names: tuple[str, ...]
    behind: float
    evidence: float | None


def turned(mel: np.ndarray, own: MelConfig) -> tuple[np.ndarray, str]:
    """A mel with its bands first, and its axes in words.

    Args:
        mel: (n_mels, F) or (F, n_mels).
        own: the model's convention, whose number of bands is looked for first.

    Raises:
        MelMismatchError: no axis has the bands of a convention.
    """
    for n_mels in dict.fromkeys([own.n_mels, *(c.n_mels for c in MEL_PRESETS.values())]):
        if n_mels == mel.shape[0]:
            return mel, f"{n_mels} bands, {mel.shape[1]} frames"
        if n_mels == mel.shape[1]:
            return mel.T, f"time-major, {n_mels} bands, {mel.shape[0]} frames"
    raise MelMismatchError(f"no convention here has the bands of a mel {mel.shape}")


def diagnose(vocoder: Vocoder, mel: np.ndarray) -> list[Diagnosis]:
    """Conventions that a mel of speech may be in, the likeliest first.

    Args:
        vocoder: a model of speech.
        mel: (n_mels, F), finite; at least 24 frames.

    Raises:
        MelMismatchError: it is too short, or no convention has so many bands.
    """
    own = vocoder.mel_config
    n_mels, n_frames = mel.shape
    if n_frames < FEWEST_TO_FIND:
        raise MelMismatchError(f"{n_frames} frames tell nothing: give {FEWEST_TO_FIND} or more")
    configs = {name: c for name, c in MEL_PRESETS.items() if c.n_mels == n_mels}
    if own.n_mels == n_mels:
        configs |= readings_of(own)
    if not configs:
        raise MelMismatchError(f"no convention here has {n_mels} bands")
    groups = _grouped(rank(mel, configs))
    best = groups[0][0].score
    if not np.isfinite(best):
        raise MelMismatchError("this mel is not like speech in any convention")
    middle = middle_of(np.array(mel, np.float32))
    found = []
    for group in groups:
        behind = best - group[0].score
        # Frames that are interpolated over time are smoother, and would fit better.
        rates = {reading.config.sample_rate: reading.config for reading in reversed(group)}
        config = rates.get(own.sample_rate, group[0].config)
        told = evidence(vocoder, middle, config) if behind <= _OPEN else None
        found.append(Diagnosis(tuple(reading.name for reading in group), behind, told))

    def order(diagnosis: Diagnosis) -> tuple[bool, float]:
        if diagnosis.evidence is None:
            return True, diagnosis.behind
        return False, VALUES * diagnosis.behind - diagnosis.evidence

    return sorted(found, key=order)


def _grouped(ranked: list[Reading]) -> list[list[Reading]]:
    """Conventions with the same values in one group; the order is that of their best."""
    groups: dict[MelConfig, list[Reading]] = {}
    for reading in ranked:
        framing = {"padding": "center", "pad_mode": "reflect", "window": "periodic"}
        floors = {
            "magnitude_floor": 0.0,
            "magnitude_floor_mode": "add",
            "log_floor": 1e-5,
            "log_floor_mode": "clamp",
        }
        hertz = {"f_max": reading.config.f_max_hz, "sample_rate": 0}
        key = reading.config.model_copy(update=framing | floors | hertz)
        groups.setdefault(key, []).append(reading)
    return list(groups.values())
