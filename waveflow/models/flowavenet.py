"""FloWaveNet (Kim, Lee, Song, Kim, Yoon 2019): blocks of WaveNet couplings, ever more squeezed."""

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
    MapCond,
    Squeeze,
)
from waveflow.conditioners import MelEncoder
from waveflow.flow import Flow
from waveflow.models.registry import FlowConfig, register
from waveflow.nn.wavenet import WaveNet


class FloWaveNetConfig(FlowConfig):
    """Sizes of a FloWaveNet; the paper has 8 blocks of 6 flows and 256 channels.

    Attributes:
        squeeze_factor: samples in a vector of the first block (paper: 2).
        n_blocks: context blocks, each squeezed by 2 more than the one before.
        n_flows: flows in a block (paper: 6).
        n_early_every: after so many blocks half of the channels leave (paper: 4).
        n_layers, hidden_channels: of the couplings' WaveNets (paper: 2 and 256).
        n_features: of the mel.
    """

    type: Literal["flowavenet"] = "flowavenet"
    squeeze_factor: PositiveInt = 4
    n_blocks: PositiveInt = 4
    n_flows: PositiveInt = 4
    n_early_every: PositiveInt = 2
    n_layers: PositiveInt = 2
    hidden_channels: PositiveInt = 64
    n_features: PositiveInt = 64


@register(FloWaveNetConfig)
def flowavenet(config: FloWaveNetConfig, mel: MelConfig) -> Flow:
    """Figure 1: a context block squeezes, and its flows change the order of the halves.

    A flow (section 3.2) is an activation norm, an affine coupling with a WaveNet that is not
    causal, and the exchange of the two halves: here they take turns as the passive one. Two
    things differ from the paper. The channels that leave have a standard normal and no
    network of their own, and those are half of what is there.
    """

    def block(index: int, channels: int) -> Bijection:
        steps: list[Bijection] = []
        for k in range(config.n_flows):
            network = WaveNet(
                channels // 2, config.n_features, config.hidden_channels, channels, config.n_layers
            )
            steps.append(ActNorm(channels))
            steps.append(Coupling(network, Affine(bound=3.0), Halves(swap=k % 2 == 1)))
        if index + 1 < config.n_blocks:
            leave = (index + 1) % config.n_early_every == 0
            rest = channels // 2 if leave else channels
            deeper = Chain(Squeeze(2), block(index + 1, 2 * rest), Inverse(Squeeze(2)))
            inner = MapCond(deeper, EveryNth(2))
            steps.append(FactorOut(channels - rest, inner) if leave else inner)
        return Chain(*steps)

    n = config.squeeze_factor
    bijection = Chain(Squeeze(n), block(0, n))
    conditioner = MelEncoder(mel.n_mels, config.n_features, mel.hop_length // n)
    return Flow(bijection, conditioner, channels=n, hop_length=mel.hop_length)
