"""A model in a file of its own, outside the package: what a stranger would write."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from waveflow.audio.mel import MelConfig
from waveflow.bijections import (
    Affine,
    Bijection,
    Chain,
    Condition,
    Coupling,
    Halves,
    Inverse,
    InvertibleConv1x1,
    MapCond,
    Squeeze,
    SqueezeCondition,
)
from waveflow.context import Context
from waveflow.flow import Conditioner, Flow, State
from waveflow.models.registry import FlowConfig, register
from waveflow.padding import zero_padding


class ToyConfig(FlowConfig):
    type: Literal["toy"] = "toy"
    width: int = 8
    declares: bool = True


class ToyNetwork(nn.Module):
    """Two positions to the left, one to the right; weight norm on a Linear layer."""

    def __init__(self, n_in: int, n_out: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Conv1d(n_in, width, 4)
        self.middle = weight_norm(nn.Linear(width, width))
        self.leave = nn.Linear(width, n_out)
        self.context: Context | None = Context(2, 1)

    def forward(self, x: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        x = zero_padding(torch.cat([x, features], 1), mask)
        h = self.enter(nn.functional.pad(x, (2, 1))).transpose(1, 2)
        return self.leave(self.middle(h).tanh()).transpose(1, 2)


class DoubleCoupling(Coupling):
    """A subclass: its parameters are twice those of the network."""

    def _params(self, passive: Tensor, active: Tensor, cond: Condition | None) -> Tensor:
        return 2 * super()._params(passive, active, cond)


class HeldMel(Conditioner):
    """Each frame, after a layer, held through its hop."""

    context = Context()

    def __init__(self, n_mels: int, n_features: int, times: int) -> None:
        super().__init__()
        self.layer = nn.Conv1d(n_mels, n_features, 1)
        self.times = times

    def forward(self, mel: Tensor, mask: Tensor | None = None, state: State = None) -> Condition:
        features = self.layer(zero_padding(mel, mask)).repeat_interleave(self.times, 2)
        return Condition(features, None if mask is None else mask.repeat_interleave(self.times, 2))


@register(ToyConfig)
def toy(config: ToyConfig, mel: MelConfig) -> Flow:
    def coupling(kind: type[Coupling], channels: int, n_features: int, swap: bool) -> Bijection:
        half = channels // 2
        network = ToyNetwork(half + n_features, Affine.n_params * half, config.width)
        if not config.declares:
            network.context = None
        return kind(network, Affine(bound=2.0), Halves(swap))

    deeper = Chain(
        Squeeze(2), coupling(Coupling, 8, 6, swap=True), InvertibleConv1x1(8), Inverse(Squeeze(2))
    )
    bijection = Chain(
        Squeeze(4),
        coupling(DoubleCoupling, 4, 3, swap=False),
        InvertibleConv1x1(4),
        MapCond(deeper, SqueezeCondition(2)),
        coupling(Coupling, 4, 3, swap=False),
    )
    conditioner = HeldMel(mel.n_mels, 3, mel.hop_length // 4)
    return Flow(bijection, conditioner, channels=4, hop_length=mel.hop_length)
