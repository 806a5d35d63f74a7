"""F0 of recorded speech, by dio and stonemask of WORLD."""

import numpy as np
from numpy.typing import NDArray

from waveflow.errors import ConfigError

F0_FLOOR_HZ = 60.0
F0_CEILING_HZ = 500.0


def dio_stonemask(
    audio: NDArray[np.floating], sample_rate: int, frame_period_ms: float
) -> NDArray[np.float64]:
    """F0 in Hz, between 60 and 500, every `frame_period_ms` from sample 0; 0 where unvoiced.

    Figures depend on the tracker (harvest finds far more voiced frames), so all use this one.

    Args:
        audio: (T,) floats in [-1, 1].
        sample_rate: in Hz.
        frame_period_ms: time between two values.

    Raises:
        ImportError: without the package `pyworld`.

    Reference: dio (Morise, Kawahara and Katayose 2009) refined by stonemask, of WORLD (Morise,
        Yokomori and Ozawa 2016).
    """
    import pyworld

    samples = np.ascontiguousarray(audio, dtype=np.float64)
    f0, times = pyworld.dio(
        samples,
        sample_rate,
        f0_floor=F0_FLOOR_HZ,
        f0_ceil=F0_CEILING_HZ,
        frame_period=frame_period_ms,
    )
    return pyworld.stonemask(samples, f0, times, sample_rate)


def track_f0(audio: NDArray[np.floating], sample_rate: int, hop_length: int) -> np.ndarray:
    """F0 at the centre of each block of `hop_length` samples: the target of the pitch head.

    Args:
        audio: (T,) floats in [-1, 1], at least one hop long.
        sample_rate: in Hz.
        hop_length: block length in samples; frame f is at sample hop_length * (f + 1/2).

    Returns:
        (T // hop_length,) float32, Hz between 60 and 500, 0 where unvoiced.

    Raises:
        ConfigError: pyworld is not installed.
    """
    # The tracker's frames start at sample 0. At half the hop every second one is a block's centre.
    half_hop_ms = 1000 * hop_length / 2 / sample_rate
    try:
        f0 = dio_stonemask(audio, sample_rate, half_hop_ms)
    except ImportError as error:
        raise ConfigError(
            f"tracking F0 needs the package pyworld ({error}): pip install 'waveflow[train]'"
        ) from error
    return f0[1::2][: len(audio) // hop_length].astype(np.float32)
