"""SqueezeWave (Zhai et al. 2020): a WaveGlow of long vectors and separable convolutions."""

from typing import Literal

from pydantic import PositiveInt

from waveflow.audio.mel import MelConfig
from waveflow.bijections import (
    Affine,
    Chain,
    Coupling,
    FactorOut,
    Halves,
    InvertibleConv1x1,
    Squeeze,
)
from waveflow.conditioners import RepeatedMel
from waveflow.errors import ConfigError
from waveflow.flow import Flow
from waveflow.models.registry import FlowConfig, register
from waveflow.nn.separable_wavenet import SeparableWaveNet


class SqueezeWaveConfig(FlowConfig):
    """Sizes of a SqueezeWave; the defaults are 128S.

    The paper's names count the vectors in a segment of 16,384 samples:

        name   squeeze_factor   hidden_channels
        128L   128              256
        128S   128              128
        64L    256              256
        64S    256              128

    Attributes:
        squeeze_factor: samples in a vector.
        n_flows: steps of flow, each a 1x1 convolution and a coupling (paper: 12).
        n_early_every: flows between two early outputs (published: 2).
        n_early_size: channels that leave at an early output (published: 16).
        n_layers, hidden_channels: of the couplings' networks (paper: 8 layers).
    """

    type: Literal["squeezewave"] = "squeezewave"
    squeeze_factor: PositiveInt = 128
    n_flows: PositiveInt = 12
    n_early_every: PositiveInt = 2
    n_early_size: PositiveInt = 16
    n_layers: PositiveInt = 8
    hidden_channels: PositiveInt = 128


@register(SqueezeWaveConfig)
def squeezewave(config: SqueezeWaveConfig, mel: MelConfig) -> Flow:
    """The flow of WaveGlow (Prenger et al. 2018, figure 1) on vectors of 128 or 256 samples.

    A vector is about as long as a mel frame, so each frame is held through its hop
    (section 3.1); the networks are `SeparableWaveNet` (section 3.2).

    Raises:
        ConfigError: the early outputs take all channels, or leave an odd number of them.
    """
    channels, size = config.squeeze_factor, config.n_early_size
    n_early = size * ((config.n_flows - 1) // config.n_early_every)
    if channels % 2 or size % 2 or n_early >= channels:
        raise ConfigError(
            f"squeeze_factor {channels} with n_early_size {size}, {n_early} channels in all: each "
            "coupling needs an even number of channels that are left"
        )
    whole = level = Chain(Squeeze(channels))
    for k in range(config.n_flows):
        if k and k % config.n_early_every == 0:
            rest = Chain()
            level.steps.append(FactorOut(size, rest))
            level, channels = rest, channels - size
        network = SeparableWaveNet(
            channels // 2, mel.n_mels, config.hidden_channels, channels, config.n_layers
        )
        level.steps.append(InvertibleConv1x1(channels))
        # Free log-scales, as published, let a young model draw samples of 10^9: twelve couplings
        # multiply their scales where one value of z is rare. Bounds below 3 learn slowly.
        level.steps.append(Coupling(network, Affine(bound=3.0), Halves()))
    n = config.squeeze_factor
    conditioner = RepeatedMel(mel.n_mels, mel.hop_length // n)
    return Flow(whole, conditioner, channels=n, hop_length=mel.hop_length)
