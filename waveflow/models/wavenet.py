"""WaveNet (van den Oord et al. 2016) as an exact flow: each sample given all before it."""

from typing import Literal

from pydantic import PositiveInt

from waveflow.audio.mel import MelConfig
from waveflow.bijections import Affine, MixtureOfLogistics, OverTime
from waveflow.conditioners import MelEncoder
from waveflow.flow import Flow
from waveflow.models.registry import FlowConfig, register
from waveflow.nn.causal_wavenet import CausalWaveNet

# Of samples of speech, roughly: a network that had to learn it would spend its first steps on it.
# Divided by it, samples start as large as the biases beside them; WaveNet then learns in 150 steps
# what took 300.
SPEECH_STD = 0.1


class WaveNetConfig(FlowConfig):
    """Sizes of a WaveNet.

    Attributes:
        hidden_channels: of the residual path, the gates and the skips.
        n_cycles, n_layers: dilations 1, 2, .. 2^(n_layers - 1), n_cycles times over (paper: 10).
        head: "gaussian" (ClariNet, Ping et al. 2019, section 3.1), or "mixture" of logistics
            (Parallel WaveNet, van den Oord et al. 2018, section 2.1).
        n_components: of the mixture.
        n_features: of the mel.
    """

    type: Literal["wavenet"] = "wavenet"
    hidden_channels: PositiveInt = 48
    n_cycles: PositiveInt = 1
    n_layers: PositiveInt = 9
    head: Literal["gaussian", "mixture"] = "gaussian"
    n_components: PositiveInt = 4
    n_features: PositiveInt = 64


@register(WaveNetConfig)
def wavenet(config: WaveNetConfig, mel: MelConfig) -> Flow:
    """p(x) = prod_t p(x_t | x_1 .. x_{t-1}, mel) (equation 1).

    With a Gaussian head z_t = (x_t - mu) / sigma; with a mixture z_t is the normal quantile of
    its distribution function at x_t. Both are densities of continuous samples, in nats, so they
    compare with every other flow. A discretised head gives probabilities of 16-bit values; such a
    value stands for a uniform step of 2^-15, so its log-probability minus log(2^-15) is this
    density's mean over the step.
    """
    map = MixtureOfLogistics(config.n_components) if config.head == "mixture" else Affine(bound=9.0)
    dilations = [2**i for i in range(config.n_layers)] * config.n_cycles
    network = CausalWaveNet(1, config.n_features, config.hidden_channels, map.n_params, dilations)
    network.enter.weight.data /= SPEECH_STD
    network.leave.bias.data = map.initial(SPEECH_STD)
    conditioner = MelEncoder(mel.n_mels, config.n_features, mel.hop_length)
    return Flow(OverTime(network, map), conditioner, channels=1, hop_length=mel.hop_length)
