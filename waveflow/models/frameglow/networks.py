"""The networks of a FrameGlow's couplings."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from waveflow.audio.mel import MelConfig, MelSpectrogram
from waveflow.audio.mel_config import edge_padding
from waveflow.audio.stft import frame
from waveflow.bijections import Condition, LappedSqueeze
from waveflow.bijections.base import full_precision
from waveflow.context import Context, context_of
from waveflow.decoding import IntegerKit
from waveflow.models.frameglow.config import FrameGlowConfig
from waveflow.models.frameglow.layout import FeatureLayout, interpolation, zero_linear
from waveflow.nn.frame import ConvNeXt, GatedStack
from waveflow.padding import zero_padding

# Rows of a block in integers: a second at 22,050 Hz and the rows that the networks lag behind.
_INTEGER_ROWS = 96
# exp(-this) is the largest share of a band's energy that even bins are believed to have, because
# its logarithm has no bound; and half the logarithm of 2, so that a missing half counts as 0.
LEAST_MISSING = 0.03
HALF_MISSING = 0.5 * math.log(2)


class BaseReader(nn.Module):
    """Shift and level of every bin, which the conditioner has made."""

    context = Context()

    def __init__(self, layout: FeatureLayout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, passive: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        shift, level = self.layout.read(features, "shift", "level")
        return torch.cat([shift, -level], -1).transpose(1, 2)


class LevelNetwork(nn.Module):
    """Levels of the odd bins from the energy of the even ones around them.

    The mel gives the level of a band, and none above f_max. Most that the signal itself can add
    is how loud a bin is beside its neighbours: a log-scale a(h) + b(h) log energy, the energy of
    four passive bins in three frames.
    """

    context = Context(1, 1)

    def __init__(self, layout: FeatureLayout, n_active: int) -> None:
        super().__init__()
        self.layout = layout
        self.slope_and_offset = zero_linear(layout.encoder_channels, 2 * n_active)

    def forward(self, passive: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        [h] = self.layout.read(features, "h")
        energy = zero_padding(passive.square(), mask)
        # Slices that are added: average pooling takes six times as long on a CPU.
        around = F.pad(energy.transpose(1, 2), (1, 2, 1, 1))
        energy = around[:, :-2] + around[:, 1:-1] + around[:, 2:]
        energy = (energy[..., :-3] + energy[..., 1:-2] + energy[..., 2:-1] + energy[..., 3:]) / 12
        slope, offset = self.slope_and_offset(h).chunk(2, -1)
        log_scale = offset + slope * (energy + 0.01).log()
        return torch.cat([torch.zeros_like(log_scale), log_scale], -1).transpose(1, 2)


class MelLevelNetwork(LevelNetwork):
    """A `LevelNetwork` that also hears how much of the mel the even bins leave to the odd ones.

    The even bins alone, without the odd ones, are made into a signal, and its mel is compared with
    the wanted one: log-scale + sum over three frames of c_i(h) r_i, with r half the logarithm of
    the share of the energy that is missing, in the band of the bin. In a draw, it makes odd bins
    louder where the even ones came out too quiet.
    """

    band_to_bin: Tensor

    def __init__(self, layout: FeatureLayout, mel: MelConfig, odd_is_active: bool) -> None:
        super().__init__(layout, layout.bins // 2)
        self.active = slice(1, None, 2) if odd_is_active else slice(0, None, 2)
        self.passive = slice(0, None, 2) if odd_is_active else slice(1, None, 2)
        self.slopes = zero_linear(layout.encoder_channels, 3 * (layout.bins // 2))
        self.in_time = LappedSqueeze(layout.bins)
        self.spectrogram = MelSpectrogram(mel)
        self.register_buffer("band_to_bin", interpolation(mel)[:, self.active], persistent=False)
        # Samples of a lapped block reach into the next one; frames of the mel's STFT further.
        edge = edge_padding(mel.n_fft, mel.hop_length, mel.padding)
        before, after = edge, mel.n_fft - edge - mel.hop_length
        reach = [2 + -(-max(side, 0) // mel.hop_length) for side in (before, after)]
        self.context = Context(*reach)

    def forward(self, passive: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        shift, log_scale = super().forward(passive, features, mask).transpose(1, 2).chunk(2, -1)
        with full_precision(passive):
            missing = self._missing(passive, features, mask)
        [h] = self.layout.read(features, "h")
        around = F.pad(missing, (0, 0, 1, 1))
        for i, slope in enumerate(self.slopes(h).chunk(3, -1)):
            log_scale = log_scale + slope * around[:, i : i + h.shape[1]]
        return torch.cat([shift, log_scale], -1).transpose(1, 2)

    def _missing(self, passive: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        """Half the logarithm of the missing share of energy at odd bins, (B, L, bins / 2)."""
        features = features.to(passive.dtype)
        shift, level, mel = self.layout.read(features, "shift", "level", "mel")
        passive = passive.transpose(1, 2) - shift[..., self.passive]
        y = torch.zeros_like(level)
        y[..., self.passive] = passive * level[..., self.passive].exp()
        y = zero_padding(y.transpose(1, 2), mask)
        audio = self.in_time.inverse(y, Condition(features, mask))[0][:, 0]
        config = self.spectrogram.config
        edge = edge_padding(config.n_fft, config.hop_length, config.padding)
        # Zeros beyond the ends, as in the padding of a batch.
        padded = F.pad(audio, (edge, config.n_fft - config.hop_length))
        window = self.spectrogram.exact("window", audio)
        spectrum = torch.fft.rfft(frame(padded, config.n_fft, config.hop_length) * window)
        there = self.spectrogram.of_spectrum(spectrum[:, : mel.shape[1]])
        log_share = (2 / config.power) * (there.clamp_min(1e-10).log() - mel)
        missing = -torch.expm1(log_share.clamp_max(-LEAST_MISSING))
        missing = 0.5 * missing.log() + HALF_MISSING
        return zero_padding(missing.transpose(1, 2), mask).transpose(1, 2) @ self.band_to_bin


class FrameNetwork(nn.Module):
    """The network of a coupling: passive bins (B, bins / 2, L) to shift and log-scale."""

    def __init__(self, layout: FeatureLayout, config: FrameGlowConfig, odd_is_active: bool) -> None:
        super().__init__()
        half, width = layout.bins // 2, config.hidden_channels
        self.layout = layout
        self.active = slice(1, None, 2) if odd_is_active else slice(0, None, 2)
        self.passive = slice(0, None, 2) if odd_is_active else slice(1, None, 2)
        self.enter = nn.Linear(3 * half + config.encoder_channels, width)
        self.body: nn.Module
        if config.network == "wavenet":
            self.body = GatedStack(width, config.dilations)
        else:
            self.body = ConvNeXt(width, len(config.dilations))
        self.norm = nn.LayerNorm(width)
        self.leave = zero_linear(width, 4 * half)
        self.context = context_of(self.body)

    def forward(self, passive: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        h, source, quadrature = self.layout.read(features, "h", "source", "quadrature")
        p = passive.transpose(1, 2)
        demodulated = [p * source[..., self.passive], p * quadrature[..., self.passive]]
        x = self.enter(torch.cat([p, *demodulated, h], -1))
        x = self.body(x, None if mask is None else mask.transpose(1, 2))
        shift, log_scale, gain, quadrature_gain = self.leave(self.norm(x)).chunk(4, -1)
        shift = shift + gain * source[..., self.active]
        shift = shift + quadrature_gain * quadrature[..., self.active]
        return torch.cat([shift, log_scale], -1).transpose(1, 2)

    def for_integers(self, kit: IntegerKit) -> nn.Module:
        """A copy whose layers, from `enter` to `leave`, are one graph."""
        graph = kit.graph(_INTEGER_ROWS, self.context, channel_axis=2)
        x = graph.input(self.enter.in_features)
        for layer in (self.enter, self.body, self.norm, self.leave):
            x = graph.apply(layer, x)
        body, same = _InIntegers(graph.compiled(x)), nn.Identity()
        return kit.replaced(self, enter=same, body=body, norm=same, leave=same)


class _InIntegers(nn.Module):
    """Layers as a compiled graph, for one item (1, L, C) without padding."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self._run = run

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._run(x[0])[None]
