"""Other vocoders to compare with: Vocos's network and Griffin-Lim.

Both take a mel (B, M, F) of natural logarithms and give audio (B, F hop_length). Vocos has random
weights: its speed does not depend on them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from waveflow.audio.mel import MEL_PRESETS, MelConfig
from waveflow.audio.stft import istft
from waveflow.metrics.griffin_lim import griffin_lim
from waveflow.nn.frame import ConvNeXtBlock

MAX_MAGNITUDE = 100.0
MEL = MEL_PRESETS["hifigan"]


class VocosBlock(ConvNeXtBlock):
    """A ConvNeXt block with GELU in place of ReLU, (B, L, C) -> (B, L, C)."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.expand(self.norm(self.depthwise(x)))
        return torch.addcmul(x, self.contract(F.gelu(h)), self.gain)


class Vocos(nn.Module):
    """The generator of Vocos (Siuzdak 2023, section 3) with its inverse STFT head.

    This is the fastest eager form that was measured, so the comparison is fair: (B, L, C)
    throughout, with channels-last depthwise convolutions, 1.03 to 1.04 times as fast as the
    published code's arrangement at equal output.
    """

    window: Tensor

    def __init__(
        self, mel: MelConfig = MEL, channels: int = 512, n_layers: int = 8, expansion: int = 3
    ) -> None:
        super().__init__()
        self.mel_config = mel
        self.embed = nn.Conv1d(mel.n_mels, channels, 7, padding=3)
        self.norm = nn.LayerNorm(channels)
        self.blocks = nn.Sequential(
            *(VocosBlock(channels, expansion=expansion) for _ in range(n_layers))
        )
        self.final_norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, mel.n_fft + 2)
        self.register_buffer("window", torch.hann_window(mel.n_fft))

    def forward(self, mel: Tensor) -> Tensor:
        x = self.norm(self.embed(mel).transpose(1, 2).contiguous())
        log_magnitude, phase = self.head(self.final_norm(self.blocks(x))).chunk(2, -1)
        magnitude = log_magnitude.exp().clamp_max(MAX_MAGNITUDE)
        # Quicker than torch.polar.
        spectrum = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())
        return istft(
            spectrum, self.mel_config.n_fft, self.mel_config.hop_length, self.window, "hop"
        )


class GriffinLim:
    """Griffin-Lim of 60 iterations, the mel inverted smoothly; on the CPU, item by item."""

    mel_config = MEL

    def __call__(self, mel: Tensor) -> Tensor:
        return torch.stack([griffin_lim(item, self.mel_config) for item in mel])
