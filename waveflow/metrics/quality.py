"""Perceptual metrics of other packages: PESQ-WB, STOI, DNSMOS.

Each function imports its own package (extra `eval`). If one is missing, that function raises
ImportError and the others work.
"""

import numpy as np
from numpy.typing import NDArray

from waveflow.audio.io import resample

FloatArray = NDArray[np.floating]

PESQ_RATE = 16000
DNSMOS_RATE = 16000
_NOT_MEASURED = 1e-5


def at_rate(audio: FloatArray, sample_rate: int, target_rate: int) -> FloatArray:
    """Resamples a waveform (T,) and clips it to [-1, 1], which a filter's ripple may exceed."""
    if sample_rate != target_rate:
        audio = resample(audio, sample_rate, target_rate)
    return np.clip(audio, -1.0, 1.0)


def pesq_wb(reference: FloatArray, audio: FloatArray, sample_rate: int) -> float:
    """Returns wideband PESQ (MOS-LQO, about 1.0 to 4.64) of `audio` against `reference`.

    Args:
        reference: (T,), a recording in [-1, 1].
        audio: (T,), its copy.
        sample_rate: rate of both, in Hz; they are resampled to 16 kHz.

    Raises:
        pesq.PesqError: if no utterance is found (silence) or the clip is too short.
        ImportError: without the package `pesq`.

    Reference: ITU-T P.862.2 (2007).
    """
    from pesq import pesq

    return float(
        pesq(
            PESQ_RATE,
            at_rate(reference, sample_rate, PESQ_RATE),
            at_rate(audio, sample_rate, PESQ_RATE),
            "wb",
        )
    )


def stoi(reference: FloatArray, audio: FloatArray, sample_rate: int) -> float:
    """Returns the short-time objective intelligibility (up to 1) of `audio` (T,).

    The reference is a recording (T,). Below 0.4 seconds of speech the result is NaN, because the
    package has nothing to average.

    Raises:
        ImportError: without the package `pystoi`, which resamples to its own 10 kHz.

    Reference: Taal et al. 2011.
    """
    from pystoi import stoi as pystoi_stoi

    value = float(pystoi_stoi(reference, audio, sample_rate))
    # Where it cannot measure, the package warns and returns 1e-5, which must not enter a mean.
    return float("nan") if value == _NOT_MEASURED else value


def dnsmos(audio: FloatArray, sample_rate: int) -> float:
    """Returns the overall DNSMOS P.835 (1 to 5, no reference) of `audio` (T,) in [-1, 1].

    Raises:
        ImportError: without `speechmos` or a package that it imports without declaring it.

    Reference: Reddy et al. 2022.
    """
    from speechmos import dnsmos as model

    return float(model.run(at_rate(audio, sample_rate, DNSMOS_RATE), DNSMOS_RATE)["ovrl_mos"])
