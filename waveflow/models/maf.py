"""MAF and IAF over blocks of samples: one autoregressive step, run in either direction.

Masked autoregressive flow (Papamakarios, Pavlakou, Murray 2017) has a fast density and slow
draws; inverse autoregressive flow (Kingma et al. 2016) is its `Inverse`, with fast draws.
"""

from typing import Literal

from pydantic import PositiveInt

from waveflow.audio.mel import MelConfig
from waveflow.bijections import (
    Affine,
    AllActive,
    Bijection,
    Chain,
    Coupling,
    Inverse,
    OverChannels,
    Reverse,
    Squeeze,
)
from waveflow.conditioners import MelEncoder
from waveflow.flow import Flow
from waveflow.models.registry import FlowConfig, register
from waveflow.models.wavenet import SPEECH_STD
from waveflow.nn.convnet import ConvNet
from waveflow.nn.made import MADE


class MAFConfig(FlowConfig):
    """Sizes of a MAF.

    Attributes:
        squeeze_factor: samples in a block.
        n_flows: autoregressive steps (paper: 5 or 10).
        hidden_channels: units in each of a MADE's two hidden layers.
        n_features: of the mel.
    """

    type: Literal["maf"] = "maf"
    squeeze_factor: PositiveInt = 64
    n_flows: PositiveInt = 4
    hidden_channels: PositiveInt = 256
    n_features: PositiveInt = 64


class IAFConfig(MAFConfig):
    """Sizes of an IAF; as `MAFConfig`. Its training goes sample by sample through a block."""

    type: Literal["iaf"] = "iaf"  # type: ignore[assignment]
    squeeze_factor: PositiveInt = 32


@register(IAFConfig)
@register(MAFConfig)
def maf(config: MAFConfig, mel: MelConfig) -> Flow:
    """u_i = (x_i - mu_i) exp(-alpha_i), both functions of x_1 .. x_{i-1} (MAF, equation 4).

    Each step has a MADE of its own, and the order of the samples is reversed between steps
    (section 4.1). A block sees other blocks through the mel alone. An IAF starts from noise whose
    mean and deviation the mel gives (Kingma et al. 2016, equation 10).
    """
    n = config.squeeze_factor
    steps: list[Bijection] = []
    for k in range(config.n_flows):
        network = MADE(n, config.n_features, config.hidden_channels, Affine.n_params)
        step = OverChannels(network, Affine(bound=3.0), n)
        steps += [Reverse(n)] if k else []
        steps += [Inverse(step) if config.type == "iaf" else step]
    if config.type == "iaf":
        base, map = ConvNet(0, config.n_features, config.hidden_channels, 2 * n), Affine(bound=9.0)
        base.leave.bias.data = map.initial(SPEECH_STD).repeat_interleave(n)
        steps += [Coupling(base, map, AllActive())]
    bijection = Chain(Squeeze(n), *steps)
    conditioner = MelEncoder(mel.n_mels, config.n_features, mel.hop_length // n)
    return Flow(bijection, conditioner, channels=n, hop_length=mel.hop_length)
