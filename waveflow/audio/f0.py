"""F0 of recorded speech, by WORLD's dio and stonemask."""

import numpy as np
from numpy.typing import NDArray

F0_FLOOR_HZ = 60.0
F0_CEILING_HZ = 500.0


def dio_stonemask(
    audio: NDArray[np.floating], sample_rate: int, frame_period_ms: float
) -> NDArray[np.float64]:
    """F0 in Hz, between 60 and 500, every `frame_period_ms` from sample 0; 0 where unvoiced.

    The tracker is part of every figure (harvest finds far more voiced frames), so it is one.

    Args:
        audio: (T,) floats in [-1, 1].
        sample_rate: in Hz.
        frame_period_ms: between two values.

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
