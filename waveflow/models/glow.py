"""Glow (Kingma, Dhariwal 2018): activation norm, invertible 1x1 convolution, affine coupling."""

from typing import Literal

from pydantic import PositiveInt

from waveflow.audio.mel import MelConfig
from waveflow.bijections import (
    ActNorm,
    Affine,
    Bijection,
    Chain,
    Coupling,
    EveryNth,
    FactorOut,
    Halves,
    Inverse,
    InvertibleConv1x1PLU,
    MapCond,
    Squeeze,
)
from waveflow.conditioners import MelEncoder
from waveflow.flow import Flow
from waveflow.models.registry import FlowConfig, register
from waveflow.nn.convnet import ConvNet


class GlowConfig(FlowConfig):
    """Sizes of a Glow.

    Attributes:
        squeeze_factor: samples in a vector of the first level.
        n_levels: L, levels; half of the channels leave after each but the last.
        n_flows: K, steps of flow in a level.
        hidden_channels: of the couplings' networks (paper: 512).
        n_features: of the mel.
    """

    type: Literal["glow"] = "glow"
    squeeze_factor: PositiveInt = 16
    n_levels: PositiveInt = 2
    n_flows: PositiveInt = 6
    hidden_channels: PositiveInt = 96
    n_features: PositiveInt = 64


@register(GlowConfig)
def glow(config: GlowConfig, mel: MelConfig) -> Flow:
    """Figure 2: a level squeezes, takes K steps of flow and lets half of its channels leave.

    A step (table 1) is an activation norm, a 1x1 convolution by its PLU factors (equation 10),
    and an affine coupling whose network also sees the mel.
    """
    n = config.squeeze_factor

    def step(channels: int) -> Chain:
        network = ConvNet(channels // 2, config.n_features, config.hidden_channels, channels)
        coupling = Coupling(network, Affine(bound=3.0), Halves())
        return Chain(ActNorm(channels), InvertibleConv1x1PLU(channels), coupling)

    def level(index: int) -> Bijection:
        steps: list[Bijection] = [step(n) for _ in range(config.n_flows)]
        if index + 1 < config.n_levels:
            # n / 2 channels of a signal squeezed by 2 are n channels again.
            deeper = Chain(Squeeze(2), level(index + 1), Inverse(Squeeze(2)))
            steps.append(FactorOut(n // 2, MapCond(deeper, EveryNth(2))))
        return Chain(*steps)

    bijection = Chain(Squeeze(n), level(0))
    conditioner = MelEncoder(mel.n_mels, config.n_features, mel.hop_length // n)
    return Flow(bijection, conditioner, channels=n, hop_length=mel.hop_length)
