"""Griffin-Lim: speech from a mel without a network, the baseline that a vocoder has to beat.

There are two ways from a mel to magnitudes. `least_squares_magnitude` is the usual one (librosa's
NNLS gives the same figures). It leaves zeros and ripples between bands, which cost half a point of
PESQ. `smooth_magnitude` avoids them. `evaluate` prints both. As in the vocoder, F frames give F
hops.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from waveflow.audio.filters import mel_filterbank
from waveflow.audio.mel import MelConfig, MelSpectrogram, natural_log
from waveflow.audio.stft import istft

MOMENTUM = 0.99
SMOOTH_STEPS = 30

MelInversion = Callable[[Tensor, MelConfig], Tensor]


def least_squares_magnitude(mel: Tensor, config: MelConfig) -> Tensor:
    """Returns the magnitudes of least norm with this mel, negative ones set to zero.

    Args:
        mel: (n_mels, F), natural logarithm.
        config: the mel's settings.

    Returns:
        (F, n_fft // 2 + 1), float64.
    """
    inverse = torch.from_numpy(np.linalg.pinv(mel_filterbank(config)))
    return (mel.double().exp().T @ inverse.T).clamp_min(0.0).pow(1.0 / config.power)


def smooth_magnitude(mel: Tensor, config: MelConfig) -> Tensor:
    """Returns magnitudes with this mel that vary smoothly from bin to bin.

    It starts from a flat spectrum. As in mel refinement, each step multiplies a bin by the weighted
    geometric mean of (wanted / present) over the bands that cover it. The triangles of the bands
    make the result smooth. Bins outside every band are zero.

    Args and Returns: as `least_squares_magnitude`.
    """
    filterbank = torch.from_numpy(mel_filterbank(config))
    coverage = filterbank.sum(0)
    shares = filterbank / coverage.clamp_min(torch.finfo(torch.float64).tiny)
    covered = coverage > 0
    wanted = mel.double().T
    log_energy = torch.zeros(wanted.shape[0], len(covered), dtype=torch.float64)
    for _ in range(SMOOTH_STEPS):
        present = (log_energy.exp() * covered) @ filterbank.T
        log_energy += (wanted - natural_log(present, config)) @ shares
    return (log_energy.exp() * covered).pow(1.0 / config.power)


def griffin_lim(
    mel: Tensor,
    mel_config: MelConfig,
    n_iter: int = 60,
    seed: int = 0,
    inversion: MelInversion = smooth_magnitude,
) -> Tensor:
    """Makes the waveform of a mel by fast Griffin-Lim, from random phase.

    Args:
        mel: (n_mels, F), natural logarithm.
        mel_config: the mel's settings.
        n_iter: number of iterations, each an inverse STFT and an STFT.
        seed: seed of the first phase.
        inversion: function from mel to magnitudes.

    Returns:
        (F * hop_length,), float32; it may exceed [-1, 1].

    Reference: Griffin and Lim 1984; Perraudin, Balazs and Sondergaard 2013 (momentum), in the form
        that librosa.griffinlim has.
    """
    spectrogram = MelSpectrogram(mel_config)
    mel = mel.cpu()
    magnitude = inversion(mel, mel_config).float()
    n_frames = magnitude.shape[0]
    n_samples = n_frames * mel_config.hop_length
    window = spectrogram.exact("window", magnitude)

    def to_audio(phase: Tensor) -> Tensor:
        c = mel_config
        spectrum = (magnitude * phase)[None]
        return istft(spectrum, c.n_fft, c.hop_length, window, c.padding, length=n_samples)

    generator = torch.Generator().manual_seed(seed)
    angle = 2.0 * math.pi * torch.rand(magnitude.shape, generator=generator, dtype=torch.float32)
    phase = torch.polar(torch.ones_like(angle), angle)
    previous = torch.zeros_like(phase)
    for _ in range(n_iter):
        # A centred mel of F hops has one frame more, half beyond the end.
        rebuilt = spectrogram.spectrum(to_audio(phase))[0, :n_frames]
        ahead = rebuilt - MOMENTUM / (1.0 + MOMENTUM) * previous
        phase = ahead / ahead.abs().clamp_min(1e-16)
        previous = rebuilt
    return to_audio(phase)[0]
