"""The pitch of recorded speech, as the target of the F0 head."""

import numpy as np

from waveflow.audio.f0 import dio_stonemask
from waveflow.errors import ConfigError


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
    """
    # The tracker's frames start at sample 0: at half the hop, the odd ones are the blocks' centres.
    half_hop_ms = 1000 * hop_length / 2 / sample_rate
    try:
        f0 = dio_stonemask(audio, sample_rate, half_hop_ms)
    except ImportError as error:
        raise ConfigError(
            f"tracking F0 needs the package pyworld ({error}): pip install 'waveflow[train]'"
        ) from error
    return f0[1::2][: len(audio) // hop_length].astype(np.float32)
