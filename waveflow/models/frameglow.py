"""FrameGlow: WaveGlow moved to the mel-frame rate, with a harmonic source from the mel.

    x --LappedSqueeze(hop)--> y (B, hop bins, L frames)
    u = y exp(-envelope(mel)) + source(mel)                     the mel-informed base
    levels: odd bins by the energy of even ones, then the same among the even ones
    K times: affine coupling on even / odd bins, invertible 1x1 convolution
    z ~ N(0, 1)

WaveGlow (Prenger et al. 2018) runs its networks 2,756 times a second on aliased polyphase
channels; here every channel is a frequency band and the networks run 86 times a second. The
mel tells each band's level, so the flow starts close to right. It tells the pitch too but not
the phase: a head reads F0 from the mel, a pulse train follows it, and its lapped transform E
(with the one in quadrature: amplitude and phase in each bin) enters every coupling, as a
shift and as "demodulated" inputs, the passive bins times E, which are the phase of the signal
relative to the source. E is a function of the mel, so the likelihood stays exact.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from waveflow.audio.filters import mel_center_hz
from waveflow.audio.mel import MelConfig
from waveflow.bijections import (
    Affine,
    AllActive,
    Bijection,
    Chain,
    Condition,
    Coupling,
    EvenOdd,
    InvertibleConv1x1,
    LappedSqueeze,
    OnChannels,
)
from waveflow.bijections.base import full_precision
from waveflow.context import Context, context_of, total_context
from waveflow.decoding import IntegerKit
from waveflow.errors import ConfigError
from waveflow.flow import Conditioner, Flow, State
from waveflow.models.registry import FlowConfig, register
from waveflow.nn.frame import ConvNeXt, GatedStack
from waveflow.nn.pitch import PitchHead
from waveflow.nn.source import HarmonicSource
from waveflow.objective import Batch, Loss, Phase
from waveflow.padding import zero_padding

# Rows of a block in integers: a second at 22,050 Hz and the rows that the networks lag behind.
_INTEGER_ROWS = 96


class FrameGlowConfig(FlowConfig):
    """Sizes of a FrameGlow; bins = the mel's hop length."""

    type: Literal["frameglow"] = "frameglow"
    n_levels: int = Field(default=4, ge=0, le=6)
    n_flows: int = Field(default=4, ge=0)
    network: Literal["wavenet", "convnext"] = "wavenet"
    hidden_channels: int = Field(default=96, gt=0)
    dilations: tuple[Annotated[int, Field(gt=0, le=4096)], ...] = Field(
        default=(1, 2, 4), max_length=64
    )
    encoder_channels: int = Field(default=128, gt=0)
    encoder_layers: int = Field(default=4, ge=0)
    log_scale_bound: float = Field(default=3.0, gt=0, allow_inf_nan=False)


@register(FrameGlowConfig)
def frameglow(config: FrameGlowConfig, mel: MelConfig) -> Flow:
    """The Flow of a config, for mels of the given settings.

    Raises:
        ConfigError: the bins cannot be halved as often as the levels need.
    """
    bins = mel.hop_length
    halved = 2 ** max(1, config.n_levels)
    if bins % halved:
        raise ConfigError(
            f"hop_length {bins} is not a multiple of {halved}, which n_levels {config.n_levels} "
            "needs: give fewer levels or another hop"
        )
    layout = FeatureLayout(config.encoder_channels, bins)
    steps: list[Bijection] = [
        LappedSqueeze(bins),
        Coupling(BaseNetwork(layout), Affine(), AllActive()),
    ]
    for k in range(config.n_levels):
        levels = Coupling(LevelNetwork(layout, bins // 2 ** (k + 1)), Affine(), EvenOdd())
        steps.append(OnChannels(slice(0, None, 2**k), levels))
    for k in range(config.n_flows):
        network = FrameNetwork(layout, config, odd_is_active=k % 2 == 0)
        affine = Affine(bound=config.log_scale_bound)
        steps += [
            Coupling(network, affine, EvenOdd(swap=k % 2 == 1)),
            InvertibleConv1x1(bins, start="identity"),
        ]
    return FrameGlow(Chain(*steps), FrameConditioner(layout, config, mel), bins, bins)


class FrameGlow(Flow):
    """A Flow whose training begins with its pitch head, which is frozen afterwards."""

    phase_settings = ("pitch_steps",)
    conditioner: "FrameConditioner"

    def phases(self, settings: Any, teacher: Flow | None = None) -> list[Phase]:
        if not settings.pitch_steps:
            return []
        return [Phase("pitch head", settings.pitch_steps, self._pitch_loss)]

    def _pitch_loss(self, batch: Batch) -> Loss:
        # The mean over voiced frames is that of the whole step.
        n_voiced = batch.step_mean("voiced frames", lambda b: (b.f0 > 0).sum() / len(b.f0))
        loss = self.conditioner.pitch_loss(batch.mel, batch.f0, n_voiced * len(batch.f0))
        return Loss(loss, {"pitch_loss": loss})


class FeatureLayout:
    """Where the parts of the condition's features lie: h, source, quadrature, envelope."""

    def __init__(self, encoder_channels: int, bins: int) -> None:
        self.bins = bins
        self.encoder_channels = encoder_channels
        self.sizes = [encoder_channels, bins, bins, bins]

    def split(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, M, L) -> h (B, L, H), source, quadrature and envelope (B, L, bins)."""
        h, source, quadrature, envelope = features.transpose(1, 2).split(self.sizes, -1)
        return h, source, quadrature, envelope


class FrameConditioner(Conditioner):
    """mel (B, M, F) -> features: encoder, harmonic source and the envelope of the bins."""

    band_to_bin: Tensor

    def __init__(self, layout: FeatureLayout, config: FrameGlowConfig, mel: MelConfig) -> None:
        super().__init__()
        width = config.encoder_channels
        self.pitch = PitchHead(mel.n_mels)
        self.source = HarmonicSource(mel.sample_rate, mel.hop_length)
        self.in_phase = LappedSqueeze(layout.bins)
        self.in_quadrature = LappedSqueeze(layout.bins, quadrature=True)
        self.enter = nn.Linear(mel.n_mels + 1, width)
        self.encoder = ConvNeXt(width, config.encoder_layers)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("band_to_bin", _interpolation(mel), persistent=False)
        source = total_context(self.pitch, self.source)
        # In a window that is cut out of an utterance, the F0 of the first frames is not yet right.
        # This is the first frame whose samples all follow an F0 that the cut leaves alone.
        self.anchor = int(source.left)
        # The encoder sees the voicing; the source is lapped, one block on each side.
        encoded = total_context(self.pitch, self.encoder)
        lapped = source + Context(1, 1)
        self.context = Context(*map(max, zip(encoded, lapped, strict=True)))

    def forward(self, mel: Tensor, mask: Tensor | None = None, state: State = None) -> Condition:
        """The condition; `state` is the source's phase (B,), float64, in cycles, at `anchor`."""
        x = self.normalise(mel)
        mask_l1 = None if mask is None else mask.transpose(1, 2)
        # Envelope, pitch and phase under autocast would be heard.
        with full_precision(mel):
            envelope = mel.transpose(1, 2) @ self.band_to_bin
            with torch.no_grad():
                logits, voicing = self.pitch(x, mask_l1)
                f0 = _hold_last(self.pitch.f0_hz(logits), mask)
                if state is None and self.training:
                    state = self.random_state(len(f0), f0.device)
                anchor = 0 if state is None else min(self.anchor, f0.shape[1] - 1)
                pulses = self.source(f0, state, anchor)[:, None]
            edges = Condition(mel, mask)
            source = self.in_phase(pulses, edges)[0].transpose(1, 2)
            quadrature = self.in_quadrature(pulses, edges)[0].transpose(1, 2)
        h = self.enter(torch.cat([x, voicing.sigmoid()[..., None]], -1))
        h = self.norm(self.encoder(h, mask_l1))
        features = torch.cat([h, source, quadrature, envelope], -1)
        return Condition(features.transpose(1, 2), mask)

    @torch.no_grad()
    def carry(self, mel: Tensor, mask: Tensor | None, state: State, n_frames: int) -> State:
        """The source's phase at the `anchor` of a window that begins `n_frames` later."""
        end = n_frames + self.anchor
        mel = mel[..., : end + self.anchor]
        mask = None if mask is None else mask[..., : mel.shape[2]]
        with full_precision(mel):
            mask_l1 = None if mask is None else mask.transpose(1, 2)
            logits, _ = self.pitch(self.normalise(mel), mask_l1)
            cycles = self.source.cycles(_hold_last(self.pitch.f0_hz(logits), mask))
        if state is None:
            return cycles[:, :end].sum(1).frac()
        return (state + cycles[:, self.anchor : end].sum(1)).frac()

    def random_state(self, n_items: int, device: torch.device) -> State:
        """Any phase, because no phase of the source's start is to be learnt."""
        return torch.rand(n_items, device=device).double()

    def pitch_loss(self, mel: Tensor, f0: Tensor, n_voiced: Tensor | None = None) -> Tensor:
        """`PitchHead.loss` for mels (B, M, F) and a tracker's F0 (B, F)."""
        return self.pitch.loss(self.normalise(mel), f0, n_voiced)

    @staticmethod
    def normalise(mel: Tensor) -> Tensor:
        """mel (B, M, F), -11.5 .. 2 in speech, -> the networks' input (B, F, M), of order one."""
        return (mel.transpose(1, 2) + 5) / 3


class BaseNetwork(nn.Module):
    """Level and harmonic shift of every bin from the condition alone."""

    context = Context()

    def __init__(self, layout: FeatureLayout) -> None:
        super().__init__()
        self.layout = layout
        # A Slaney mel of white noise lies 0.2 below the log level of a lapped bin.
        self.level_bias = nn.Parameter(torch.full((layout.bins,), 0.2))
        self.level = _zero_linear(layout.encoder_channels, layout.bins)
        self.gains = _zero_linear(layout.encoder_channels, 2 * layout.bins)

    def forward(self, passive: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        h, source, quadrature, envelope = self.layout.split(features)
        level = envelope + self.level_bias + self.level(h)
        gain, quadrature_gain = self.gains(h).chunk(2, -1)
        shift = gain * source + quadrature_gain * quadrature
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
        self.slope_and_offset = _zero_linear(layout.encoder_channels, 2 * n_active)

    def forward(self, passive: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        h, *_ = self.layout.split(features)
        energy = zero_padding(passive.square(), mask)
        # Slices that are added: average pooling takes six times as long on a CPU.
        around = F.pad(energy.transpose(1, 2), (1, 2, 1, 1))
        energy = around[:, :-2] + around[:, 1:-1] + around[:, 2:]
        energy = (energy[..., :-3] + energy[..., 1:-2] + energy[..., 2:-1] + energy[..., 3:]) / 12
        slope, offset = self.slope_and_offset(h).chunk(2, -1)
        log_scale = offset + slope * (energy + 0.01).log()
        return torch.cat([torch.zeros_like(log_scale), log_scale], -1).transpose(1, 2)


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
        self.leave = _zero_linear(width, 4 * half)
        self.context = context_of(self.body)

    def forward(self, passive: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        h, source, quadrature, _ = self.layout.split(features)
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


def _zero_linear(n_in: int, n_out: int) -> nn.Linear:
    """A layer that starts at zero, so that the flow starts as its base."""
    linear = nn.Linear(n_in, n_out)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _interpolation(mel: MelConfig) -> Tensor:
    """(M, bins): linear interpolation in Hz from the bands' centres to the bins' centres."""
    bands = torch.as_tensor(mel_center_hz(mel), dtype=torch.float64)
    bins = (torch.arange(mel.hop_length, dtype=torch.float64) + 0.5) / mel.hop_length
    bins = (bins * mel.sample_rate / 2).clamp(bands[0], bands[-1])
    upper = torch.searchsorted(bands, bins).clamp(1, len(bands) - 1)
    weight = (bins - bands[upper - 1]) / (bands[upper] - bands[upper - 1])
    matrix = torch.zeros(len(bands), len(bins), dtype=torch.float64)
    columns = torch.arange(len(bins))
    matrix[upper, columns] = weight
    matrix[upper - 1, columns] = 1 - weight
    return matrix.float()


def _hold_last(f0: Tensor, mask: Tensor | None) -> Tensor:
    """F0 (B, L) with each item's last valid value held through its padding."""
    if mask is None:
        return f0
    last = mask.sum((1, 2)).long().clamp_min(1) - 1
    positions = torch.arange(f0.shape[1], device=f0.device)
    return f0.gather(1, torch.minimum(positions[None], last[:, None]))
