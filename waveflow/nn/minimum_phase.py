"""The phase that goes with a mel's envelope: that of a filter of minimum phase.

A vocal tract is nearly such a filter. Its phase follows from its magnitude: with the real cepstrum
c of the log-magnitude, phase(w) = -2 sum_{n > 0} c_n sin(w n) (Oppenheim and Schafer, Discrete-Time
Signal Processing, section 13.5). All of it is linear in the log-magnitude, which is interpolated
from the mel's bands. So one matrix takes a mel to phases.
"""

import numpy as np
import torch
from torch import Tensor

from waveflow.audio.filters import band_interpolation
from waveflow.audio.mel_config import MelConfig

# Seconds. The cepstrum fades to zero here: later parts hold the pitch, 330 Hz at 3 ms.
LONGEST = 0.003


def minimum_phase(config: MelConfig, n_bins: int) -> Tensor:
    """The matrix (n_mels, n_bins) from a mel to radians at the centres of equal bins, float32.

    What a mel adds to each band for good, such as the widths of bands without `norm`, turns each
    bin by a constant, which the gains of a source learn.
    """
    points = np.linspace(0.0, config.sample_rate / 2, 2 * n_bins + 1)
    log_magnitude = band_interpolation(config, points) / config.power
    cepstrum = np.fft.irfft(log_magnitude)[:, : 2 * n_bins]
    n = np.arange(2 * n_bins)
    # A turn of bins makes no filter that rings for longer than a block.
    longest = min(LONGEST * config.sample_rate, n_bins)
    fade = 1 + np.cos(np.pi * (n / longest).clip(0, 1))
    fade[0] = 0  # the mean level, which has no phase
    spectrum = np.fft.rfft(cepstrum * fade, 4 * n_bins)
    return torch.from_numpy(spectrum.imag[:, 1::2].astype(np.float32))


def turned(in_phase: Tensor, quadrature: Tensor, phase: Tensor) -> tuple[Tensor, Tensor]:
    """The lapped transform of a signal behind a filter that turns each bin by `phase`.

    It holds for filters that ring for less than a block.

    Args:
        in_phase: the signal's transform (B, L, bins).
        quadrature: the one in quadrature.
        phase: (B, L, bins), radians.
    """
    cos, sin = phase.cos(), phase.sin()
    return cos * in_phase + sin * quadrature, cos * quadrature - sin * in_phase
