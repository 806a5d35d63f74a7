"""Conventions of mel spectrograms: telling a foreign one by its values."""

import numpy as np

# Share of the known range (log_floor to full voice) that log10 values of speech never sink below,
# and natural logarithms of speech, even four times louder than usual, do.
_DARKEST = 0.42
_FEWEST_FRAMES = 24


def describe_foreign_mel(mel: np.ndarray, low: np.ndarray, high: np.ndarray) -> str | None:
    """Names the convention of a mel whose values cannot be natural logarithms of magnitudes.

    Meant for a warning: it sees values, not history. A plausible mel may still be wrong (other band
    edges). A mel that is too short passes. A clip that drowns in noise may be named wrongly.
    Thresholds were checked on five voices, pieces of 3 frames to whole clips, gains 0.1 to 4.

    Args:
        mel: (n_mels, F), finite.
        low: (n_mels,), least value of each band in the model's training data.
        high: (n_mels,), greatest value.

    Returns:
        Words such as "log10 instead of the natural logarithm", or None if it is plausible.
    """
    least, most, mean = float(mel.min()), float(mel.max()), float(mel.mean())
    # Even a floor of 1e-10 is -23.03 as a natural logarithm.
    if least < -24.0:
        return "decibels instead of the natural logarithm"
    # All bands of all frames above magnitude 1 would be a full-scale roar.
    if least >= 0.0:
        # Linear magnitudes have a few high peaks, a compressed scale is spread over its range.
        if most <= 1.01 and mean > 0.12 * most:
            return "normalised to [0, 1]"
        return "linear magnitude (no logarithm)"
    # Speech, loud or quiet, has some dark spot (pauses, high bands of vowels) in the lower part of
    # the known range. A handful of frames need not show one.
    depth = np.quantile((mel - low[:, None]) / np.maximum(high - low, 1.0)[:, None], 0.005)
    if depth < _DARKEST or mel.shape[1] < _FEWEST_FRAMES:
        return None
    return _describe_shrunk(mel)


def _describe_shrunk(mel: np.ndarray) -> str:
    """Tells log10 from normalised scales, for values too high to be natural logarithms."""
    least, most, mean = float(mel.min()), float(mel.max()), float(mel.mean())
    unit_variance = "normalised to zero mean and unit variance"
    if least >= -1.01 and most <= 1.01:
        return "normalised to [-1, 1]"
    if abs(mean) < 0.05 and abs(float(mel.std()) - 1.0) < 0.05:
        return unit_variance
    # Normalised decibels are cut at -4 in quiet clips and go beyond 1.4 in loud ones, as log10 of
    # full-scale speech (e^3.2) never does. Scaled by a corpus' mean and variance, speech has its
    # floor, where many values lie, near -3, and log10's is at -5 or lower.
    floored = float((mel <= least + 1e-3).mean()) > 1e-3
    if -4.01 <= least < -3.3 and most <= 4.01 and (floored or most > 1.4):
        return "normalised to [-4, 4]"
    if least < -3.3 or (mean < -1.25 and not floored):
        return "log10 instead of the natural logarithm"
    return unit_variance
