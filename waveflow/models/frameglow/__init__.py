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

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from waveflow.audio.mel import MelConfig, MelSpectrogram
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
from waveflow.errors import ConfigError
from waveflow.flow import Flow
from waveflow.models.frameglow.conditioner import FrameConditioner
from waveflow.models.frameglow.config import FrameGlowConfig
from waveflow.models.frameglow.layout import FeatureLayout
from waveflow.models.frameglow.networks import (
    BaseReader,
    FrameNetwork,
    LevelNetwork,
    MelLevelNetwork,
)
from waveflow.models.registry import register
from waveflow.objective import Batch, Loss, Phase

__all__ = ["FrameGlow", "FrameGlowConfig", "frameglow"]

# The sigma of the draws that the share of noise is learnt from. It serves all others.
QUIET = 0.2
# The weight of the noise head's loss. It is small because all gradients are clipped together, and
# Adam takes the same steps at any weight. One step of so many computes it: a draw takes time.
LOUDNESS_WEIGHT, LOUDNESS_EVERY = 0.01, 8


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
    conditioner: FrameConditioner

    def __init__(self, bijection: Bijection, conditioner: FrameConditioner, mel: MelConfig) -> None:
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
