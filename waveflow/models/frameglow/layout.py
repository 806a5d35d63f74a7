"""What the conditioner and the couplings' networks share: features, bins and bands."""

import itertools

import numpy as np
import torch
from torch import Tensor, nn

from waveflow.audio.filters import band_interpolation, mel_center_hz
from waveflow.audio.mel import MelConfig
from waveflow.models.frameglow.config import FrameGlowConfig

PARTS = ("h", "source", "quadrature", "shift", "level", "mel", "voicing")


class FeatureLayout:
    """Where the parts of the condition's features lie.

    h of the encoder; source and quadrature, its harmonic source in each bin; shift and level of the
    base; the mel itself; how likely a frame is voiced.
    """

    def __init__(self, config: FrameGlowConfig, mel: MelConfig) -> None:
        self.bins = mel.hop_length
        self.encoder_channels = config.encoder_channels
        self.n_mels = mel.n_mels
        sizes = [self.encoder_channels, *4 * [self.bins], self.n_mels, 1]
        ends = list(itertools.accumulate(sizes))
        starts = [0, *ends[:-1]]
        self.slices = dict(zip(PARTS, map(slice, starts, ends), strict=True))

    def read(self, features: Tensor, *names: str) -> list[Tensor]:
        """Parts (B, L, size) of features (B, M, L)."""
        return [features[:, self.slices[name]].transpose(1, 2) for name in names]

    def raised(self, features: Tensor, level: Tensor, mel: Tensor) -> Tensor:
        """Features with (B, L, size) added to their level and mel."""
        # A frame's features stay side by side in memory, as networks read them.
        rows = features.transpose(1, 2)
        before = rows[..., : self.slices["level"].start]
        after = rows[..., self.slices["mel"].stop :]
        level = rows[..., self.slices["level"]] + level
        mel = rows[..., self.slices["mel"]] + mel
        return torch.cat([before, level, mel, after], -1).transpose(1, 2)


def zero_linear(n_in: int, n_out: int) -> nn.Linear:
    """A layer that starts at zero, so that the flow starts as its base."""
    linear = nn.Linear(n_in, n_out)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def interpolation(mel: MelConfig) -> Tensor:
    """(M, bins): linear interpolation in Hz from the bands' centres to the bins' centres."""
    return torch.from_numpy(band_interpolation(mel, _bin_hz(mel)).astype(np.float32))


def places(mel: MelConfig) -> np.ndarray:
    """Of the bins, then of the mel's bands, on the mel scale from 0 (lowest) to 1 (highest)."""
    centers = mel_center_hz(mel)
    bands = (np.arange(mel.n_mels) + 0.5) / mel.n_mels
    return np.concatenate([np.interp(_bin_hz(mel), centers, bands), bands])


def _bin_hz(mel: MelConfig) -> np.ndarray:
    """Centres of the lapped bins in Hz."""
    return (np.arange(mel.hop_length) + 0.5) / mel.hop_length * mel.sample_rate / 2
