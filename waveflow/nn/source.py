"""HarmonicSource: a band-limited pulse train that follows an F0 contour."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HarmonicSource(nn.Module):
    """F0 (B, L) in Hz, at frame centres, to a pulse train (B, L hop) of unit power.

    The sum of all K cosines k phi below the Nyquist frequency has a closed form,

        sum_{k=1..K} cos(k phi) = sin((K + 1/2) phi) / (2 sin(phi / 2)) - 1/2,

    and power K / 2. The phase phi is integrated sample by sample in float64, because float32
    loses it within a minute. It runs on where the F0 stays defined, voiced or not.
    """

    def __init__(self, sample_rate: int, hop_length: int) -> None:
        super().__init__()
        self.sample_rate = sample_rate
        self.hop_length = hop_length

    def forward(self, f0: Tensor, start: Tensor | None = None) -> Tensor:
        """Args: f0 (B, L); start (B,) phase of the first sample in cycles, default 0."""
        per_sample = F.interpolate(f0[:, None], scale_factor=self.hop_length, mode="linear")[:, 0]
        per_sample = per_sample.double()
        cycles = torch.cumsum(per_sample / self.sample_rate, 1)
        if start is not None:
            cycles = cycles + start[:, None]
        cycles = cycles - cycles.floor()
        n_harmonics = (self.sample_rate / 2 / per_sample).floor()
        turns = (n_harmonics + 0.5) * cycles
        top = torch.sin(2 * math.pi * (turns - turns.floor()).to(f0.dtype))
        bottom = torch.sin(math.pi * cycles.to(f0.dtype))
        n_harmonics = n_harmonics.to(f0.dtype)
        # 0/0 at the pulse itself, where the sum is K: masked before the division.
        at_pulse = bottom.abs() < 1e-4
        ratio = top / (2 * torch.where(at_pulse, torch.ones_like(bottom), bottom)) - 0.5
        return torch.where(at_pulse, n_harmonics, ratio) * (2 / n_harmonics).sqrt()
