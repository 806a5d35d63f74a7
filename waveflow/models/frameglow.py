"""FrameGlow: WaveGlow moved to the mel-frame rate, with a harmonic source from the mel.

    x --LappedSqueeze(hop)--> y (B, hop bins, L frames)
    u = y exp(-level(mel)) + source(mel, path)                  the mel-informed base
    levels: even bins by the odd ones and the mel, odd ones by the even ones and the mel, then
            among the even ones
    K times: affine coupling on even / odd bins, invertible 1x1 convolution
    z ~ N(0, 1)

WaveGlow (Prenger et al. 2018) runs its networks 2,756 times a second on aliased polyphase
channels; here every channel is a frequency band and the networks run 86 times a second. The
mel tells each band's level, so the flow starts close to right. It tells the pitch too but not the
phase: a head reads F0 from the mel, a pulse train follows it, and its lapped transform E (with
the one in quadrature: amplitude and phase in each bin) enters the base and the K couplings, as a
shift and as "demodulated" inputs, the passive bins times E, which are the phase of the signal
relative to the source. With `minimum_phase` E is turned by the phase of the mel's envelope, as a
vocal tract turns it (`nn/minimum_phase.py`). For given speech the source's phase follows a path
that is found in the speech (`nn/phase_path.py`); the density given that path is exact, and with
the path's prior it is a lower bound. docs/frameglow.md explains all of it.
"""

import itertools
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from waveflow.audio.filters import band_interpolation, mel_center_hz
from waveflow.audio.mel import MelConfig, MelSpectrogram
from waveflow.audio.mel_config import edge_padding
from waveflow.audio.stft import frame
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
from waveflow.flow import Conditioner, Fitted, Flow, State
from waveflow.models.registry import FlowConfig, register
from waveflow.nn.frame import ConvNeXt, GatedStack
from waveflow.nn.minimum_phase import minimum_phase, turned
from waveflow.nn.noise_share import NoiseShare
from waveflow.nn.phase_path import Path, best_path, pulse_scores
from waveflow.nn.pitch import PitchHead
from waveflow.nn.source import HarmonicSource
from waveflow.objective import Batch, Loss, Phase
from waveflow.padding import hold_last, zero_padding

# Rows of a block in integers: a second at 22,050 Hz and the rows that the networks lag behind.
_INTEGER_ROWS = 96
# How much a path prefers pulses in phase with the speech, before the base has learnt gains.
IN_PHASE = 0.2
PARTS = ("h", "source", "quadrature", "shift", "level", "mel", "voicing")
# Of sigma, where a frame is unvoiced: at 0.2 noise is drawn at 0.7, and voiced speech at 0.2.
UNVOICED_POWER = 0.22
# The sigma of the draws that the share of noise is learnt from. It serves all others.
QUIET = 0.2
# The weight of the noise head's loss. It is small because all gradients are clipped together, and
# Adam takes the same steps at any weight. One step of so many computes it: a draw takes time.
LOUDNESS_WEIGHT, LOUDNESS_EVERY = 0.01, 8
# exp(-this) is the largest share of a band's energy that even bins are believed to have, because
# its logarithm has no bound; and half the logarithm of 2, so that a missing half counts as 0.
LEAST_MISSING = 0.03
HALF_MISSING = 0.5 * math.log(2)


class FrameGlowConfig(FlowConfig):
    """Sizes of a FrameGlow; bins = the mel's hop length.

    Attributes:
        minimum_phase: the source passes a filter with the mel's envelope. Without, as in files that
            do not say it, it is bare pulses.
        noise_share: a head learns how much of each band is noise, so that draws at a low sigma are
            as loud as their mel. Without, as in files that do not say it, they are quieter.
    """

    type: Literal["frameglow"] = "frameglow"
    n_levels: int = Field(default=4, ge=0, le=6)
    n_flows: int = Field(default=4, ge=0)
    network: Literal["wavenet", "convnext"] = "wavenet"
    hidden_channels: int = Field(default=96, gt=0)
    dilations: tuple[Annotated[int, Field(gt=0, le=4096)], ...] = Field(
        default=(1, 2, 4), max_length=64
    )
    pitch_channels: int = Field(default=128, gt=0)
    encoder_channels: int = Field(default=128, gt=0)
    encoder_layers: int = Field(default=4, ge=0)
    log_scale_bound: float = Field(default=3.0, gt=0, allow_inf_nan=False)
    phase_path: bool = True
    minimum_phase: bool = False
    noise_share: bool = False


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
    layout = FeatureLayout(config, mel)
    steps: list[Bijection] = [
        LappedSqueeze(bins),
        Coupling(BaseReader(layout), Affine(), AllActive()),
    ]
    if config.n_levels:
        for odd_is_active in (False, True):
            mel_levels = MelLevelNetwork(layout, mel, odd_is_active)
            steps.append(Coupling(mel_levels, Affine(), EvenOdd(swap=not odd_is_active)))
    for k in range(1, config.n_levels):
        levels = Coupling(LevelNetwork(layout, bins // 2 ** (k + 1)), Affine(), EvenOdd())
        steps.append(OnChannels(slice(0, None, 2**k), levels))
    for k in range(config.n_flows):
        affine = Affine(bound=config.log_scale_bound)
        network = FrameNetwork(layout, config, odd_is_active=k % 2 == 0)
        steps += [
            Coupling(network, affine, EvenOdd(swap=k % 2 == 1)),
            InvertibleConv1x1(bins, start="identity"),
        ]
    return FrameGlow(Chain(*steps), FrameConditioner(layout, config, mel), mel)


class FrameGlow(Flow):
    """A Flow whose training begins with its pitch head, which is frozen afterwards."""

    phase_settings = ("pitch_steps",)
    conditioner: "FrameConditioner"

    def __init__(
        self, bijection: Bijection, conditioner: "FrameConditioner", mel: MelConfig
    ) -> None:
        super().__init__(bijection, conditioner, mel.hop_length)
        self.is_bound = conditioner.has_path
        self.spectrogram = MelSpectrogram(mel)

    def phases(self, settings: Any, teacher: Flow | None = None) -> list[Phase]:
        if not settings.pitch_steps:
            return []
        return [Phase("pitch head", settings.pitch_steps, self._pitch_loss)]

    def _pitch_loss(self, batch: Batch) -> Loss:
        # The mean over voiced frames is that of the whole step.
        n_voiced = batch.step_mean("voiced frames", lambda b: (b.f0 > 0).sum() / len(b.f0))
        loss = self.conditioner.pitch_loss(batch.mel, batch.f0, n_voiced * len(batch.f0))
        return Loss(loss, {"pitch_loss": loss})

    def training_loss(self, batch: Batch, cond: Condition) -> dict[str, Tensor]:
        own = super().training_loss(batch, cond)
        is_due = (batch.step + 1) % LOUDNESS_EVERY == 0
        if self.conditioner.noise is not None and is_due:
            own["loudness"] = self._loudness_loss(batch, cond)
        return own

    def _loudness_loss(self, batch: Batch, cond: Condition) -> Tensor:
        """How far the noise head is from what a draw at a low sigma lacks."""
        shape = batch.share.total, self.channels, batch.mel.shape[2]
        z = batch.share.of(torch.randn(shape, device=batch.mel.device))
        # The head's loss does not train the encoder.
        cond = Condition(cond.features.detach(), cond.mask)
        scale = self.conditioner.noise_scale(cond, QUIET)
        with torch.no_grad():
            draw = self.bijection.inverse(z * scale, cond)[0][:, 0]
            # Not with `batch.mel`, which has seen what lies around the segment.
            wanted, found = self.spectrogram(torch.cat([batch.audio, draw])).chunk(2)
        _, louder = self.conditioner.louder(cond, scale)
        missing = (wanted - found)[..., : louder.shape[1]] / self.conditioner.mel_power
        # Outliers, such as a click that no noise makes, count less than by their squares.
        return LOUDNESS_WEIGHT * F.smooth_l1_loss(louder.transpose(1, 2), missing)


class FeatureLayout:
    """Where the parts of the condition's features lie.

    h of the encoder; source and quadrature, its harmonic source in each bin; shift and level of the
    base; the mel itself; how likely a frame is voiced.
    """

    def __init__(self, config: "FrameGlowConfig", mel: MelConfig) -> None:
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


class FrameConditioner(Conditioner):
    """mel (B, M, F) -> features: encoder, harmonic source, and the mel-informed base.

    The state is the source's phase (B,), float64, in cycles, at `anchor`, and its path in each
    frame (B, F), or None for a constant one.
    """

    band_to_bin: Tensor
    band_to_turn: Tensor | None

    def __init__(self, layout: FeatureLayout, config: FrameGlowConfig, mel: MelConfig) -> None:
        super().__init__()
        width, bins = config.encoder_channels, layout.bins
        self.layout = layout
        self.mel_power = mel.power
        self.has_path = config.phase_path
        self.pitch = PitchHead(mel.n_mels, config.pitch_channels)
        self.source = HarmonicSource(mel.sample_rate, mel.hop_length)
        self.in_phase = LappedSqueeze(bins)
        self.in_quadrature = LappedSqueeze(bins, quadrature=True)
        self.enter = nn.Linear(mel.n_mels + 1, width)
        self.encoder = ConvNeXt(width, config.encoder_layers)
        self.norm = nn.LayerNorm(width)
        # A Slaney mel of white noise lies 0.2 below the log level of a lapped bin.
        self.level_bias = nn.Parameter(torch.full((bins,), 0.2))
        self.level = _zero_linear(width, bins)
        self.gains = _zero_linear(width, 2 * bins)
        self.register_buffer("band_to_bin", _interpolation(mel), persistent=False)
        turn = minimum_phase(mel, bins) if config.minimum_phase else None
        self.register_buffer("band_to_turn", turn, persistent=False)
        self.noise = NoiseShare(width + 1, _places(mel)) if config.noise_share else None
        source = total_context(self.pitch, self.source)
        # In a window that is cut out of an utterance, the F0 of the first frames is not yet right.
        # This is the first frame whose samples all follow an F0 that the cut leaves alone.
        self.anchor = int(source.left)
        # The encoder sees the voicing; the source is lapped, one block on each side.
        encoded = total_context(self.pitch, self.encoder)
        lapped = source + Context(1, 1)
        self.context = Context(*map(max, zip(encoded, lapped, strict=True)))

    def forward(self, mel: Tensor, mask: Tensor | None = None, state: State = None) -> Condition:
        return self._condition(self._read(mel, mask), mel, mask, self._state(state, mel))

    def fitted(
        self, audio: Tensor, mel: Tensor, mask: Tensor | None = None, state: State = None
    ) -> Fitted:
        """The condition under the path that makes audio (B, F hop) likely, and the path's prior."""
        if not self.has_path:
            return super().fitted(audio, mel, mask, state)
        read = self._read(mel, mask)
        phase, _ = self._state(state, mel)
        with torch.no_grad(), full_precision(mel):
            path = self._path(audio, read, mask, phase)
        state = phase, path.cycles
        return Fitted(self._condition(read, mel, mask, state), state, path.log_prob)

    def _read(self, mel: Tensor, mask: Tensor | None) -> "_Read":
        """All of the features that the state leaves as they are."""
        x = self.normalise(mel)
        mask_l1 = None if mask is None else mask.transpose(1, 2)
        # Envelope and pitch under autocast would be heard.
        with full_precision(mel):
            bands = mel.transpose(1, 2)
            envelope = bands @ self.band_to_bin
            turn = None if self.band_to_turn is None else bands @ self.band_to_turn
            with torch.no_grad():
                logits, voicing = self.pitch(x, mask_l1)
                f0 = self._f0(logits, mask)
        voicing = voicing.sigmoid()[..., None]
        h = self.norm(self.encoder(self.enter(torch.cat([x, voicing], -1)), mask_l1))
        gain, quadrature_gain = self.gains(h).chunk(2, -1)
        level = envelope + self.level_bias + self.level(h)
        return _Read(h, f0, voicing, turn, level, gain, quadrature_gain)

    def _f0(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        """F0 in Hz (B, F), held in the padding of a batch."""
        return hold_last(self.pitch.f0_hz(logits), None if mask is None else mask[:, 0])

    def _state(self, state: State, mel: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Phase and path. In training the phase of the start is any, so that none is learnt."""
        if state is None and self.training:
            state = self.random_state(len(mel), mel.device)
        return (None, None) if state is None else state

    def _turns(
        self, read: "_Read", phase: Tensor | None, path: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Phase of the source in cycles and F0, (B, F, hop) float64."""
        n_frames = read.f0.shape[1]
        anchor = 0 if phase is None else min(self.anchor, n_frames - 1)
        path = None if path is None else path[:, :n_frames]
        return self.source.turns(read.f0, phase, anchor, path)

    def _condition(
        self,
        read: "_Read",
        mel: Tensor,
        mask: Tensor | None,
        state: tuple[Tensor | None, Tensor | None],
    ) -> Condition:
        edges = Condition(mel, mask)
        with full_precision(mel):
            turns, f0 = self._turns(read, *state)
            pulses = self.source.pulses(turns, f0, mel.dtype)[:, None]
            source = self.in_phase(pulses, edges)[0].transpose(1, 2)
            quadrature = self.in_quadrature(pulses, edges)[0].transpose(1, 2)
            if read.turn is not None:
                source, quadrature = turned(source, quadrature, read.turn)
        shift = read.gain * source + read.quadrature_gain * quadrature
        # In the order of PARTS.
        parts = [read.h, source, quadrature, shift, read.level, mel.transpose(1, 2), read.voicing]
        features = torch.cat(parts, -1)
        return Condition(features.transpose(1, 2), mask)

    def _path(
        self, audio: Tensor, read: "_Read", mask: Tensor | None, phase: Tensor | None
    ) -> Path:
        """The most likely path.

        In the base u = y exp(-level) is noise minus the shift g E + q E', so its log-density has
        the term -u (g E + q E'): the product of the pulses with the matched filter
        -(T^-1 g u + T'^-1 q u), with g u and q u turned back if E and E' are turned. A weak
        preference for pulses in phase breaks the tie at the start of a training, when g = q = 0.
        """
        turns, _ = self._turns(read, phase)
        edges = Condition(read.level.transpose(1, 2), mask)
        y = self.in_phase(audio[:, None], edges)[0].transpose(1, 2)
        u = (y * (-read.level).exp()).clamp(-8, 8)
        parts = (IN_PHASE - read.gain) * u, -read.quadrature_gain * u
        if read.turn is not None:
            parts = turned(*parts, -read.turn)
        matched = self.in_phase.inverse(parts[0].transpose(1, 2), edges)[0]
        matched = matched + self.in_quadrature.inverse(parts[1].transpose(1, 2), edges)[0]
        period = self.source.sample_rate / read.f0
        scores = pulse_scores(matched[:, 0].unflatten(1, turns.shape[1:]), turns, period)
        return best_path(scores * read.voicing, None if mask is None else mask[:, 0])

    @torch.no_grad()
    def carry(self, mel: Tensor, mask: Tensor | None, state: State, n_frames: int) -> State:
        """The source's phase at the `anchor` of a window that begins `n_frames` later."""
        end = n_frames + self.anchor
        mel = mel[..., : end + self.anchor]
        mask = None if mask is None else mask[..., : mel.shape[2]]
        with full_precision(mel):
            mask_l1 = None if mask is None else mask.transpose(1, 2)
            logits, _ = self.pitch(self.normalise(mel), mask_l1)
            cycles = self.source.cycles(self._f0(logits, mask))
        phase, path = (None, None) if state is None else state
        path = None if path is None else path[:, n_frames:]
        if phase is None:
            return cycles[:, :end].sum(1).frac(), path
        return (phase + cycles[:, self.anchor : end].sum(1)).frac(), path

    def random_state(self, n_items: int, device: torch.device) -> State:
        """Any phase, because no phase of the source's start is to be learnt."""
        return torch.rand(n_items, device=device).double(), None

    def tempered(
        self, z: Tensor, cond: Condition, sigma: float | Tensor
    ) -> tuple[Tensor, Condition]:
        """z sigma^power, power 1 in voiced frames and less in unvoiced ones; louder levels.

        Little noise makes voiced speech clean; as little of it would make fricatives too quiet.
        What noise loses in energy, the level of its bin makes up for. The mel is raised as much,
        so that the levels that hear it find no more missing than before.
        """
        scale = self.noise_scale(cond, sigma)
        if self.noise is None:
            return z * scale, cond
        level, mel = self.louder(cond, scale)
        features = self.layout.raised(cond.features, level, self.mel_power * mel)
        return z * scale, Condition(features, cond.mask)

    def noise_scale(self, cond: Condition, sigma: float | Tensor) -> Tensor:
        """Of the noise's amplitude, (B, 1, L)."""
        voicing = cond.features[:, self.layout.slices["voicing"]]
        return sigma ** (UNVOICED_POWER + (1 - UNVOICED_POWER) * voicing)

    def louder(self, cond: Condition, scale: Tensor) -> list[Tensor]:
        """What bins (B, L, bins) and mel bands (B, L, M) lack if noise is scaled, in nepers."""
        assert self.noise is not None
        heard = torch.cat(self.layout.read(cond.features, "h", "voicing"), -1)
        louder = self.noise(heard, scale.transpose(1, 2))
        return louder.split([self.layout.bins, self.layout.n_mels], -1)

    def pitch_loss(self, mel: Tensor, f0: Tensor, n_voiced: Tensor | None = None) -> Tensor:
        """`PitchHead.loss` for mels (B, M, F) and a tracker's F0 (B, F)."""
        return self.pitch.loss(self.normalise(mel), f0, n_voiced)

    @staticmethod
    def normalise(mel: Tensor) -> Tensor:
        """mel (B, M, F), -11.5 .. 2 in speech, -> the networks' input (B, F, M), of order one."""
        return (mel.transpose(1, 2) + 5) / 3


class _Read(NamedTuple):
    """What a mel says, frame by frame (B, F, ...), before the source has a phase."""

    h: Tensor
    f0: Tensor
    voicing: Tensor
    turn: Tensor | None
    level: Tensor
    gain: Tensor
    quadrature_gain: Tensor


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
        self.slope_and_offset = _zero_linear(layout.encoder_channels, 2 * n_active)

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
        self.slopes = _zero_linear(layout.encoder_channels, 3 * (layout.bins // 2))
        self.in_time = LappedSqueeze(layout.bins)
        self.spectrogram = MelSpectrogram(mel)
        self.register_buffer("band_to_bin", _interpolation(mel)[:, self.active], persistent=False)
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
        self.leave = _zero_linear(width, 4 * half)
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


def _zero_linear(n_in: int, n_out: int) -> nn.Linear:
    """A layer that starts at zero, so that the flow starts as its base."""
    linear = nn.Linear(n_in, n_out)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _interpolation(mel: MelConfig) -> Tensor:
    """(M, bins): linear interpolation in Hz from the bands' centres to the bins' centres."""
    return torch.from_numpy(band_interpolation(mel, _bin_hz(mel)).astype(np.float32))


def _places(mel: MelConfig) -> np.ndarray:
    """Of the bins, then of the mel's bands, on the mel scale from 0 (lowest) to 1 (highest)."""
    centers = mel_center_hz(mel)
    bands = (np.arange(mel.n_mels) + 0.5) / mel.n_mels
    return np.concatenate([np.interp(_bin_hz(mel), centers, bands), bands])


def _bin_hz(mel: MelConfig) -> np.ndarray:
    """Centres of the lapped bins in Hz."""
    return (np.arange(mel.hop_length) + 0.5) / mel.hop_length * mel.sample_rate / 2
