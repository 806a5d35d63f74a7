"""What a FrameGlow hears of its mel: encoder, harmonic source with its path, and the base."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from waveflow.audio.mel import MelConfig
from waveflow.bijections import Condition, LappedSqueeze
from waveflow.bijections.base import full_precision
from waveflow.context import Context, total_context
from waveflow.flow import Conditioner, Fitted, State
from waveflow.models.frameglow.config import FrameGlowConfig
from waveflow.models.frameglow.layout import FeatureLayout, interpolation, places, zero_linear
from waveflow.nn.frame import ConvNeXt
from waveflow.nn.minimum_phase import minimum_phase, turned
from waveflow.nn.noise_share import NoiseShare
from waveflow.nn.phase_path import Path, best_path, pulse_scores
from waveflow.nn.pitch import PitchHead
from waveflow.nn.source import HarmonicSource
from waveflow.padding import hold_last

# How much a path prefers pulses in phase with the speech, before the base has learnt gains.
IN_PHASE = 0.2
# Of sigma, where a frame is unvoiced: at 0.2 noise is drawn at 0.7, and voiced speech at 0.2.
UNVOICED_POWER = 0.22


class _Read(NamedTuple):
    """What a mel says, frame by frame (B, F, ...), before the source has a phase."""

    h: Tensor
    f0: Tensor
    voicing: Tensor
    turn: Tensor | None
    level: Tensor
    gain: Tensor
    quadrature_gain: Tensor


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
        self.level = zero_linear(width, bins)
        self.gains = zero_linear(width, 2 * bins)
        self.register_buffer("band_to_bin", interpolation(mel), persistent=False)
        turn = minimum_phase(mel, bins) if config.minimum_phase else None
        self.register_buffer("band_to_turn", turn, persistent=False)
        self.noise = NoiseShare(width + 1, places(mel)) if config.noise_share else None
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

    def _read(self, mel: Tensor, mask: Tensor | None) -> _Read:
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
        self, read: _Read, phase: Tensor | None, path: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Phase of the source in cycles and F0, (B, F, hop) float64."""
        n_frames = read.f0.shape[1]
        anchor = 0 if phase is None else min(self.anchor, n_frames - 1)
        path = None if path is None else path[:, :n_frames]
        return self.source.turns(read.f0, phase, anchor, path)

    def _condition(
        self,
        read: _Read,
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

    def _path(self, audio: Tensor, read: _Read, mask: Tensor | None, phase: Tensor | None) -> Path:
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
