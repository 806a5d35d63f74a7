"""WaveFlow (Ping, Peng, Zhao, Song 2020): autoregressive over the rows of a squeezed waveform."""

from typing import Literal

from pydantic import PositiveInt

from waveflow.audio.mel import MelConfig
from waveflow.bijections import Affine, Bijection, Chain, OverChannels, Permute, Squeeze
from waveflow.conditioners import MelEncoder
from waveflow.flow import Flow
from waveflow.models.registry import FlowConfig, register
from waveflow.models.wavenet import SPEECH_STD
from waveflow.nn.row_net import RowNet

# Dilations over the height by the number of rows (table 3).
HEIGHT_DILATIONS = {
    8: [1, 1, 1, 1, 1, 1, 1, 1],
    16: [1, 1, 1, 1, 1, 1, 1, 1],
    32: [1, 2, 4, 1, 2, 4, 1, 2],
    64: [1, 2, 4, 8, 16, 1, 2, 4],
}


class WaveFlowConfig(FlowConfig):
    """Sizes of a WaveFlow; the paper has 8 flows of 8 layers, 64 to 256 channels.

    Attributes:
        rows: H, samples in a column.
        n_flows: autoregressive steps.
        n_layers, hidden_channels: of their networks.
        n_features: of the mel.
    """

    type: Literal["waveflow"] = "waveflow"
    rows: Literal[8, 16, 32, 64] = 16
    n_flows: PositiveInt = 8
    n_layers: PositiveInt = 8
    hidden_channels: PositiveInt = 64
    n_features: PositiveInt = 64


@register(WaveFlowConfig)
def waveflow(config: WaveFlowConfig, mel: MelConfig) -> Flow:
    """Z_ij = sigma_ij X_ij + mu_ij, both of the rows above i (equation 6), n_flows times.

    Between flows the rows change their order (section 3.2, strategy b): they are reversed, and
    in the second half of the flows each half of the rows is reversed by itself.
    """
    height, half = config.rows, config.rows // 2
    reverse = list(range(height))[::-1]
    order = reverse[half:] + reverse[:half]
    dilations = [HEIGHT_DILATIONS[height][i % 8] for i in range(config.n_layers)]
    steps: list[Bijection] = []
    for k in range(config.n_flows):
        map = Affine(bound=6.0)
        network = RowNet(height, config.n_features, config.hidden_channels, map.n_params, dilations)
        if k == 0:
            network.leave.bias.data = map.initial(SPEECH_STD)  # type: ignore[union-attr]
        steps.append(OverChannels(network, map, height))
        steps.append(Permute(reverse if k < config.n_flows // 2 else order))
    bijection = Chain(Squeeze(height), *steps)
    conditioner = MelEncoder(mel.n_mels, config.n_features, mel.hop_length // height)
    return Flow(bijection, conditioner, channels=height, hop_length=mel.hop_length)
