"""What a vocoder is compared with in `waveflow bench`: Vocos's network, and Griffin-Lim.

Both take a mel (B, M, F) of natural logarithms and give audio (B, F hop_length), like a decoder
that needs no noise. Vocos has random weights: its speed does not depend on them.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from waveflow.audio.mel import MelConfig
from waveflow.audio.stft import hann_window, istft
from waveflow.metrics.griffin_lim import griffin_lim
from waveflow.nn.frame import ConvNeXtBlock

MAX_MAGNITUDE = 100.0

Peer = Callable[[Tensor], Tensor]


class VocosBlock(ConvNeXtBlock):
    """A ConvNeXt block with GELU in the place of ReLU, (B, L, C) -> (B, L, C)."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.expand(self.norm(self.depthwise(x)))
        return torch.addcmul(x, self.contract(F.gelu(h)), self.gain)


class Vocos(nn.Module):
    """The generator of Vocos (Siuzdak 2023, section 3) with its inverse STFT head.

    In the fastest eager form that was measured, so that the comparison is fair: (B, L, C)
    throughout with channels-last depthwise convolutions, 1.03 to 1.04 times the published
    code's arrangement at equal output.

    Args:
        mel: its bands, FFT size and hop.
        channels: width of the blocks.
        n_layers: number of blocks.
        expansion: hidden width of a block, over `channels`.
    """

    def __init__(
        self, mel: MelConfig, channels: int = 512, n_layers: int = 8, expansion: int = 3
    ) -> None:
        super().__init__()
        self.mel = mel
        self.embed = nn.Conv1d(mel.n_mels, channels, 7, padding=3)
        self.norm = nn.LayerNorm(channels)
        self.blocks = nn.Sequential(
            *(VocosBlock(channels, expansion=expansion) for _ in range(n_layers))
        )
        self.final_norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, mel.n_fft + 2)

    def forward(self, mel: Tensor) -> Tensor:
        """mel (B, M, F) to audio (B, F hop_length)."""
        c = self.mel
        log_magnitude, phase = self.coefficients(mel).chunk(2, -1)
        magnitude = log_magnitude.exp().clamp_max(MAX_MAGNITUDE)
        # Quicker than torch.polar.
        spectrum = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())
        window = hann_window(c.win_length, c.n_fft, magnitude.dtype, magnitude.device)
        return istft(spectrum, c.n_fft, c.hop_length, window, "hop")

    def coefficients(self, mel: Tensor) -> Tensor:
        """mel (B, M, F) to log-magnitudes and phases, (B, F, n_fft + 2)."""
        x = self.norm(self.embed(mel).transpose(1, 2).contiguous())
        return self.head(self.final_norm(self.blocks(x)))

    def compiled(self) -> "Vocos":
        """A copy whose network is compiled; compilers gain nothing on complex numbers."""
        twin = copy.copy(self)
        twin.coefficients = torch.compile(twin.coefficients)  # type: ignore[method-assign]
        return twin


def griffin_lim_peer(mel_config: MelConfig) -> Peer:
    """Griffin-Lim of 60 iterations, the mel inverted smoothly; each item by itself, on the CPU."""
    return lambda mel: torch.stack([griffin_lim(item, mel_config) for item in mel])
