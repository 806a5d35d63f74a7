"""PitchHead: F0 and voicing read from the mel."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from waveflow.decoding import Kit
from waveflow.nn.frame import ConvNeXt

N_CLASSES = 160
CENTS_PER_CLASS = 25.0
LOWEST_HZ = 55.0


class PitchHead(nn.Module):
    """Classes of 25 cents from 55 to 546 Hz, and a voicing logit, for each mel frame.

    The mel (B, L, M) says where the pitch is, not where the phase is; from this F0 the
    harmonic source is made. Trained alone on a tracker's F0, then frozen.
    """

    def __init__(self, n_mels: int, channels: int = 128, n_layers: int = 4) -> None:
        super().__init__()
        self.enter = nn.Linear(n_mels, channels)
        self.body = ConvNeXt(channels, n_layers)
        self.norm = nn.LayerNorm(channels)
        self.leave = nn.Linear(channels, N_CLASSES + 1)
        self.context = self.body.context

    def forward(self, mel: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Class logits (B, L, 160) and voicing logit (B, L)."""
        out = self.leave(self.norm(self.body(self.enter(mel), mask)))
        return out[..., :N_CLASSES], out[..., N_CLASSES]

    def for_decoding(self, kit: Kit) -> nn.Module:
        """Itself, in every precision.

        The source's phase is integrated from its F0: another rounding would move the waveform by
        1e-4 after a second, 2e-3 after a minute.
        """
        return self

    @staticmethod
    def f0_hz(logits: Tensor) -> Tensor:
        """F0 in Hz, (B, L): the mean class within 100 cents of the peak, by softmax weight."""
        peak = logits.argmax(-1, keepdim=True)
        offsets = torch.arange(-4, 5, device=logits.device)
        near = (peak + offsets).clamp(0, N_CLASSES - 1)
        # A phase is integrated from it: in float64 it is the same however a mel is cut, while
        # float32's exponential rounds differently in the last places of a vector.
        weights = logits.gather(-1, near).double().softmax(-1)
        cents = (weights * near).sum(-1) * CENTS_PER_CLASS
        return (LOWEST_HZ * torch.exp2(cents / 1200)).to(logits.dtype)

    def loss(self, mel: Tensor, f0: Tensor, n_voiced: Tensor | None = None) -> Tensor:
        """Cross-entropy of class and voicing against a tracker's F0 (B, L), 0 = unvoiced.

        That of the class is a mean over voiced frames. Where a batch is spread over processes,
        `n_voiced` is the mean number of them in as many items of the whole batch; then these
        losses, weighted by items, add up to that of the batch.
        """
        logits, voicing = self(mel)
        voiced = (f0 > 0).to(mel.dtype)
        cents = 1200 * torch.log2(f0.clamp_min(LOWEST_HZ) / LOWEST_HZ)
        distance = cents[..., None] - CENTS_PER_CLASS * torch.arange(N_CLASSES, device=f0.device)
        target = torch.exp(-0.5 * (distance / CENTS_PER_CLASS).square())
        target = target / target.sum(-1, keepdim=True).clamp_min(1e-6)
        pitch = -(target * logits.log_softmax(-1)).sum(-1)
        n_voiced = voiced.sum() if n_voiced is None else n_voiced
        pitch = (pitch * voiced).sum() / n_voiced.clamp_min(1)
        return pitch + F.binary_cross_entropy_with_logits(voicing, voiced)
