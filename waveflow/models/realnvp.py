"""RealNVP (Dinh, Sohl-Dickstein, Bengio 2017): masked affine couplings at several scales."""

from typing import Literal

from pydantic import PositiveInt

from waveflow.audio.mel import MelConfig
from waveflow.bijections import (
    Affine,
    BatchNorm,
    Bijection,
    Chain,
    Coupling,
    EvenOdd,
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
from waveflow.nn.convnet import ConvNet


class RealNVPConfig(FlowConfig):
    """Sizes of a RealNVP.

    Attributes:
        squeeze_factor: samples in a vector of the first scale.
        n_scales: half of the channels leave after each scale but the last.
        n_flows: couplings with each kind of mask in a scale (paper: 3).
        hidden_channels: of the couplings' networks.
        n_features: of the mel.
    """

    type: Literal["realnvp"] = "realnvp"
    squeeze_factor: PositiveInt = 16
    n_scales: PositiveInt = 3
    n_flows: PositiveInt = 3
    hidden_channels: PositiveInt = 96
    n_features: PositiveInt = 64


@register(RealNVPConfig)
def realnvp(config: RealNVPConfig, mel: MelConfig) -> Flow:
    """In each scale couplings with a checkerboard mask, a squeeze, and couplings by channels.

    On audio a checkerboard in time (figure 3, left) is every second sample of a vector
    (`EvenOdd`), and channels are halved after the squeeze (right). After each coupling comes a
    batch normalisation (section 3.7), and half of the channels leave a scale (equation 15).
    """
    n = config.squeeze_factor

    def couplings(channels: int, split: type[EvenOdd] | type[Halves]) -> list[Bijection]:
        steps: list[Bijection] = []
        for k in range(config.n_flows):
            half = channels // 2
            network = ConvNet(half, config.n_features, config.hidden_channels, 2 * half)
            # Bounded log-scales: the paper's tanh times a learned factor.
            steps += [Coupling(network, Affine(bound=3.0), split(swap=k % 2 == 1))]
            # Small batches: with 0.05 draws are 0.4 nats per sample less likely after 3 minutes.
            steps += [BatchNorm(channels, momentum=0.01)]
        return steps

    def scale(level: int) -> Chain:
        steps = couplings(n, EvenOdd)
        inner: list[Bijection] = couplings(2 * n, Halves)
        if level + 1 < config.n_scales:
            inner.append(FactorOut(n, scale(level + 1)))
        deeper = Chain(Squeeze(2), *inner, Inverse(Squeeze(2)))
        return Chain(*steps, MapCond(deeper, EveryNth(2)))

    bijection = Chain(Squeeze(n), scale(0))
    conditioner = MelEncoder(mel.n_mels, config.n_features, mel.hop_length // n)
    return Flow(bijection, conditioner, channels=n, hop_length=mel.hop_length)
