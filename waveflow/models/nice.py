"""NICE (Dinh, Krueger, Bengio 2015): additive couplings, and a scaling at the end."""

from typing import Literal

from pydantic import PositiveInt

from waveflow.audio.mel import MelConfig
from waveflow.bijections import Additive, Affine, AllActive, Chain, Coupling, EvenOdd, Squeeze
from waveflow.conditioners import MelEncoder
from waveflow.flow import Flow
from waveflow.models.registry import FlowConfig, register
from waveflow.nn.convnet import ConvNet


class NICEConfig(FlowConfig):
    """Sizes of a NICE.

    Attributes:
        squeeze_factor: samples in a vector, which NICE calls the input's dimensions.
        n_flows: additive couplings (paper: 4).
        hidden_channels: of the couplings' networks.
        n_features: of the mel.
    """

    type: Literal["nice"] = "nice"
    squeeze_factor: PositiveInt = 32
    n_flows: PositiveInt = 6
    hidden_channels: PositiveInt = 128
    n_features: PositiveInt = 64


@register(NICEConfig)
def nice(config: NICEConfig, mel: MelConfig) -> Flow:
    """y_1 = x_1, y_2 = x_2 + m(x_1) (equations 9 and 10), even and odd samples by turns.

    Additive couplings keep volume, so the scaling at the end (section 3.3) decides the density's
    level. In speech the level changes with time: here the mel gives the scaling, and a shift.
    """
    n, n_features = config.squeeze_factor, config.n_features

    def coupling(k: int) -> Coupling:
        network = ConvNet(n // 2, n_features, config.hidden_channels, n // 2)
        return Coupling(network, Additive(), EvenOdd(swap=k % 2 == 1))

    scaling = ConvNet(0, n_features, config.hidden_channels, Affine.n_params * n, kernel_size=1)
    bijection = Chain(
        Squeeze(n),
        *(coupling(k) for k in range(config.n_flows)),
        Coupling(scaling, Affine(), AllActive()),
    )
    conditioner = MelEncoder(mel.n_mels, n_features, mel.hop_length // n)
    return Flow(bijection, conditioner, channels=n, hop_length=mel.hop_length)
