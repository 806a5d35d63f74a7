"""The pitch of recorded speech, as the target of the F0 head."""

import numpy as np

from waveflow.errors import ConfigError

F0_FLOOR_HZ = 60.0
F0_CEILING_HZ = 500.0


def track_f0(audio: np.ndarray, sample_rate: int, hop_length: int) -> np.ndarray:
    """Tracks F0 at the centre of each block of `hop_length` samples.

    Args:
        audio: (T,) floats in [-1, 1], at least one hop long.
        sample_rate: in Hz.
        hop_length: block length in samples; frame f is at sample hop_length * (f + 1/2).

    Returns:
        (T // hop_length,) float32, Hz between 60 and 500, 0 where unvoiced.

    Raises:
        ConfigError: pyworld is not installed.

    Reference: dio (Morise, Kawahara and Katayose 2009) refined by stonemask, of WORLD (Morise,
        Yokomori and Ozawa 2016).
    """
    try:
        import pyworld
    except ImportError as error:
        raise ConfigError(
            f"tracking F0 needs the package pyworld ({error}): pip install 'waveflow[train]'"
        ) from error
    samples = np.ascontiguousarray(audio, dtype=np.float64)
    # dio's frames start at sample 0: at half the hop, the odd ones are the blocks' centres.
    half_hop_ms = 1000 * hop_length / 2 / sample_rate
    f0, times = pyworld.dio(
        samples,
        sample_rate,
        f0_floor=F0_FLOOR_HZ,
        f0_ceil=F0_CEILING_HZ,
        frame_period=half_hop_ms,
    )
    f0 = pyworld.stonemask(samples, f0, times, sample_rate)
    return f0[1::2][: len(samples) // hop_length].astype(np.float32)
