"""HarmonicSource: a band-limited pulse train that follows an F0 contour."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from waveflow.context import Context


class HarmonicSource(nn.Module):
    """F0 (B, L) in Hz, at frame centres, to a pulse train (B, L hop) of unit power.

    The sum of all K cosines k phi below the Nyquist frequency has a closed form,

        sum_{k=1..K} cos(k phi) = sin((K + 1/2) phi) / (2 sin(phi / 2)) - 1/2,

    and power K / 2. The phase phi is integrated sample by sample in float64, because float32
    loses it within a minute. It runs on where the F0 stays defined, voiced or not.
    """

    # A frame's samples are interpolated from the F0 of the frames beside it.
    context = Context(1, 1)

    def __init__(self, sample_rate: int, hop_length: int) -> None:
        super().__init__()
        self.sample_rate = sample_rate
        self.hop_length = hop_length

    def cycles(self, f0: Tensor) -> Tensor:
        """Cycles (B, L), float64, by which the phase advances in each frame of f0 (B, L)."""
        return self._per_sample(f0).sum(2) / self.sample_rate

    def turns(
        self,
        f0: Tensor,
        phase: Tensor | None = None,
        anchor: int = 0,
        path: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Phase of an F0 contour, -1/2 to 1/2 cycles, and F0 in Hz, both (B, L, hop) float64.

        Args:
            f0: (B, L).
            phase: (B,) float64, in cycles, where frame `anchor` begins; default 0.
            anchor: a frame, 0 to L - 1.
            path: (B, L), cycles to add at the centres of frames.
        """
        per_sample = self._per_sample(f0)
        turns = (per_sample / self.sample_rate).cumsum(2)
        # Frame by frame and then within frames: fewer sums, so that less is lost to rounding.
        cycles = turns[..., -1]
        begin = cycles.cumsum(1) - cycles
        begin = begin - begin[:, anchor, None]
        if phase is not None:
            begin += phase[:, None]
        turns += begin[..., None]
        if path is not None:
            turns += self._per_sample(path)
        # Nearest to 0, so that float32 resolves the pulses, where 1 / sin(phi / 2) is steep.
        turns -= turns.round()
        return turns, per_sample

    def forward(self, f0: Tensor, phase: Tensor | None = None, anchor: int = 0) -> Tensor:
        """Pulses of an F0 contour, (B, L hop); arguments as `turns`."""
        return self.pulses(*self.turns(f0, phase, anchor), f0.dtype)

    def pulses(self, turns: Tensor, per_sample: Tensor, dtype: torch.dtype) -> Tensor:
        """Pulses (B, L hop) of the given phase."""
        n_harmonics = (self.sample_rate / 2 / per_sample).floor_()
        above = (n_harmonics + 0.5).mul_(turns)
        above -= above.round()
        top = above.to(dtype).mul_(2 * math.pi).sin_()
        bottom = turns.to(dtype).mul_(math.pi).sin_()
        n_harmonics = n_harmonics.to(dtype)
        # 0/0 at the pulse itself, where the sum is K: masked before the division.
        at_pulse = bottom.abs() < 1e-4
        ratio = top.div_(bottom.masked_fill_(at_pulse, 1.0).mul_(2)).sub_(0.5)
        pulses = torch.where(at_pulse, n_harmonics, ratio) * (2 / n_harmonics).sqrt()
        return pulses.flatten(1)

    def _per_sample(self, f0: Tensor) -> Tensor:
        """F0 (B, L, hop) in Hz, float64, interpolated linearly and held at the two ends."""
        # Not by F.interpolate, which loses its place after 2^23 samples.
        centre = f0.double()[..., None]
        offset = torch.arange(self.hop_length, dtype=torch.float64, device=f0.device)
        offset = (offset + 0.5) / self.hop_length - 0.5
        slope = centre.diff(dim=1)
        before, after = F.pad(slope, (0, 0, 1, 0)), F.pad(slope, (0, 0, 0, 1))
        return centre + before * offset.clamp_max(0) + after * offset.clamp_min(0)
