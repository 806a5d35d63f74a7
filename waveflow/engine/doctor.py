"""Which convention a mel is in: by its values, and by what a model makes of it.

The values tell the scale. They hardly tell the bands: 80 bands up to 8000 Hz look like 80 bands up
to 11025 Hz. A model that knows speech tells them: under the wrong bands harmonics lie where no
voice has them. So the mel is converted as each convention would have it, and spoken; the right one
gives the likelier draw for its level, and audio whose mel comes closer to the one that was asked
for.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from waveflow.audio.conventions import Reading, rank, readings_of
from waveflow.audio.conversion import MelConversion
from waveflow.audio.mel import mel_center_hz
from waveflow.audio.mel_config import MEL_PRESETS, MelConfig
from waveflow.engine.options import SynthesisOptions
from waveflow.engine.vocoder import Vocoder
from waveflow.errors import MelMismatchError

# Readings that the values leave open: so much behind the best (natural logarithm).
_OPEN = 4.0
# What the model is asked about: the middle of the mel.
_FRAMES = 344
# Nats of likelihood for each unit of misfit (log-mel L1), and for each nat of what values tell.
_MISFIT, _VALUES = 5.0, 0.05
_FEWEST_FRAMES = 24


_NATIVE = SynthesisOptions(convention="native")


class Diagnosis(NamedTuple):
    """A convention that a mel may be in.

    Attributes:
        names: of conventions with the same values, which differ in framing or floor alone.
        behind: how much worse than the best one it explains the values (natural logarithm).
        evidence: nats per sample of the model's draw over a Gaussian of the same spectrum, minus
            the misfit of its speech; None where the values have excluded it.
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
    if n_frames < _FEWEST_FRAMES:
        raise MelMismatchError(f"{n_frames} frames tell nothing: give {_FEWEST_FRAMES} or more")
    configs = {name: c for name, c in MEL_PRESETS.items() if c.n_mels == n_mels}
    if own.n_mels == n_mels:
        configs |= readings_of(own)
    if not configs:
        raise MelMismatchError(f"no convention here has {n_mels} bands")
    groups = _grouped(rank(mel, configs))
    best = groups[0][0].score
    if not np.isfinite(best):
        raise MelMismatchError("this mel is not like speech in any convention")
    start = max(0, (n_frames - _FRAMES) // 2)
    middle = torch.from_numpy(np.asarray(mel[:, start : start + _FRAMES], np.float32))
    found = []
    for group in groups:
        behind = best - group[0].score
        evidence = _evidence(vocoder, middle, group[0].config) if behind <= _OPEN else None
        found.append(Diagnosis(tuple(reading.name for reading in group), behind, evidence))

    def order(diagnosis: Diagnosis) -> tuple[bool, float]:
        if diagnosis.evidence is None:
            return True, diagnosis.behind
        return False, _VALUES * diagnosis.behind - diagnosis.evidence

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
        hertz = {"f_max": reading.config.f_max_hz}
        key = reading.config.model_copy(update=framing | floors | hertz)
        groups.setdefault(key, []).append(reading)
    return list(groups.values())


@torch.no_grad()
def _evidence(vocoder: Vocoder, mel: Tensor, config: MelConfig) -> float:
    own = vocoder.mel_config
    converted = MelConversion(config, own, lossy=True)(mel).to(vocoder.device)
    if not float(converted.max()) < 8.0:
        return -float("inf")  # a full-scale roar
    draw = vocoder.draw(converted, _NATIVE)
    likelihood = float(vocoder.log_prob(draw, converted)[0])
    # Minus the log density of a Gaussian of this spectrum, but for a constant.
    hz = np.linspace(0, own.sample_rate / 2, 4 * own.n_mels)
    levels = np.interp(hz, mel_center_hz(own), converted.mean(1).cpu().numpy())
    again = vocoder.mel_spectrogram(vocoder.synthesise(converted, _NATIVE).audio)
    n_frames = min(again.shape[1], converted.shape[1])
    misfit = (again - converted)[:, :n_frames].abs().mean()
    return likelihood + float(levels.mean()) - _MISFIT * float(misfit)
