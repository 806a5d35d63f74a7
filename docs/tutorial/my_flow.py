"""A model of one's own: a learned mu-law, then affine couplings."""

from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from waveflow import Flow, FlowConfig, MelConfig, register
from waveflow.bijections import (
    Affine,
    AllActive,
    Bijection,
    Chain,
    Condition,
    Coupling,
    EvenOdd,
    Squeeze,
)
from waveflow.bijections.base import sum_log_det
from waveflow.conditioners import MelEncoder
from waveflow.nn.convnet import ConvNet


class MuLaw(Bijection):
    """z = sign(x) log(1 + mu |x|) / log(1 + mu), with a mu that is learned."""

    context = (0, 0)  # each sample is mapped by itself

    def __init__(self, mu: float) -> None:
        super().__init__()
        self.log_mu = nn.Parameter(torch.tensor(mu).log())

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        mu = self.log_mu.exp()
        z = x.sign() * (mu * x.abs()).log1p() / mu.log1p()
        return z, sum_log_det(self.log_slope(x), cond)

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        mu = self.log_mu.exp()
        x = z.sign() * (mu.log1p() * z.abs()).expm1() / mu
        return x, sum_log_det(-self.log_slope(x), cond)

    def log_slope(self, x: Tensor) -> Tensor:
        """log dz/dx = log mu - log(1 + mu |x|) - log log(1 + mu), elementwise."""
        mu = self.log_mu.exp()
        return self.log_mu - (mu * x.abs()).log1p() - mu.log1p().log()


class MuLawConfig(FlowConfig):
    type: Literal["mu-law"] = "mu-law"
    mu: PositiveFloat = 16.0
    squeeze_factor: PositiveInt = 16
    n_flows: PositiveInt = 4
    hidden_channels: PositiveInt = 32
    n_features: PositiveInt = 16


@register(MuLawConfig)
def mu_law(config: MuLawConfig, mel: MelConfig) -> Flow:
    """A squeeze, the mu-law, couplings of even and odd samples, and a level from the mel."""
    n, width, n_features = config.squeeze_factor, config.hidden_channels, config.n_features

    def coupling(k: int) -> Coupling:
        network = ConvNet(n // 2, n_features, width, Affine.n_params * (n // 2))
        return Coupling(network, Affine(bound=3.0), EvenOdd(swap=k % 2 == 1))

    level = ConvNet(0, n_features, width, Affine.n_params * n, kernel_size=1)
    bijection = Chain(
        Squeeze(n),
        MuLaw(config.mu),
        *(coupling(k) for k in range(config.n_flows)),
        Coupling(level, Affine(), AllActive()),
    )
    conditioner = MelEncoder(mel.n_mels, n_features, mel.hop_length // n)
    return Flow(bijection, conditioner, channels=n, hop_length=mel.hop_length)
