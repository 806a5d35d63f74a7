"""How well the voicing and F0 of two waveforms agree, by dio and stonemask of WORLD."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from waveflow.audio.f0 import dio_stonemask

FRAME_PERIOD_MS = 5.0


class Voicing(NamedTuple):
    """Agreement of a copy's pitch with its recording's.

    Attributes:
        f1: F1 of the voiced class, 0 to 1; NaN if neither has a voiced frame.
        f0_error_cents: mean absolute F0 error over frames voiced in both; NaN without one.
    """

    f1: float
    f0_error_cents: float


def compare_f0(reference_f0: NDArray[np.floating], f0: NDArray[np.floating]) -> Voicing:
    """Agreement of two F0 tracks (frames,) in Hz, 0 where unvoiced."""
    voiced_reference, voiced = reference_f0 > 0, f0 > 0
    both = voiced_reference & voiced
    n_voiced = voiced_reference.sum() + voiced.sum()
    f1 = 2 * both.sum() / n_voiced if n_voiced else np.nan
    cents = 1200 * np.abs(np.log2(f0[both] / reference_f0[both]))
    return Voicing(float(f1), float(cents.mean()) if cents.size else float("nan"))


def voicing(
    reference: NDArray[np.floating], audio: NDArray[np.floating], sample_rate: int
) -> Voicing:
    """Voiced/unvoiced F1 and F0 error in cents of `audio` against `reference`, both (T,).

    Raises:
        ImportError: without the package `pyworld`.
    """
    first, second = (dio_stonemask(x, sample_rate, FRAME_PERIOD_MS) for x in (reference, audio))
    return compare_f0(first, second)
