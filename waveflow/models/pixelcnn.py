"""PixelCNN (van den Oord et al. 2016) in one dimension: masked convolutions over rows of audio."""

from typing import Literal

from pydantic import Field, PositiveInt

from waveflow.audio.mel import MelConfig
from waveflow.bijections import Affine, OverTime
from waveflow.conditioners import MelEncoder
from waveflow.flow import Flow
from waveflow.models.registry import FlowConfig, register
from waveflow.models.wavenet import SPEECH_STD
from waveflow.nn.pixel_net import PixelNet


class PixelCNNConfig(FlowConfig):
    """Sizes of a PixelCNN.

    Attributes:
        squeeze_factor: samples in a row of the image.
        hidden_channels: of the network.
        n_layers: masked layers after the first (paper: 15 of 128 channels).
        n_features: of the mel.
    """

    type: Literal["pixelcnn"] = "pixelcnn"
    squeeze_factor: int = Field(default=32, ge=4)
    hidden_channels: PositiveInt = 32
    n_layers: PositiveInt = 7
    n_features: PositiveInt = 64


@register(PixelCNNConfig)
def pixelcnn(config: PixelCNNConfig, mel: MelConfig) -> Flow:
    """p(x) = prod_i p(x_i | x_1 .. x_{i-1}, mel) in raster order (equation 1).

    The image is the squeezed waveform, whose raster order is the order in time; the network makes
    the rows of it. A pixel's value is no class of 256 here: it has a Gaussian, z = (x - mu) /
    sigma, so that the likelihood compares with every other flow.
    """
    map = Affine(bound=9.0)
    network = PixelNet(
        config.squeeze_factor,
        config.n_features,
        config.hidden_channels,
        map.n_params,
        config.n_layers,
    )
    network.enter.weight.data /= SPEECH_STD
    network.leave.bias.data = map.initial(SPEECH_STD)
    conditioner = MelEncoder(mel.n_mels, config.n_features, mel.hop_length)
    return Flow(OverTime(network, map), conditioner, channels=1, hop_length=mel.hop_length)
