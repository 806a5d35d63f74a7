"""WaveGlow (Prenger, Valle, Catanzaro 2018), as its published code builds it."""

from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from waveflow.audio.mel import MelConfig
from waveflow.bijections import (
    Affine,
    Chain,
    Condition,
    Coupling,
    FactorOut,
    Halves,
    InvertibleConv1x1,
    Squeeze,
)
from waveflow.bijections.squeeze import squeeze
from waveflow.conditioners import RepeatedMel
from waveflow.decoding import declaration
from waveflow.errors import ConfigError
from waveflow.flow import Conditioner, Flow, State
from waveflow.models.registry import FlowConfig, register
from waveflow.nn.upsample import Upsample
from waveflow.nn.wavenet import FoldedWaveNet, WaveNet


class WaveGlowConfig(FlowConfig):
    """Sizes of a WaveGlow; the defaults are the published model of 256 channels.

    Attributes:
        n_mels: M, mel bands.
        hop_length: audio samples for each mel frame.
        n_flows: steps of flow, each a 1x1 convolution and a coupling (paper: 12).
        squeeze_factor: audio samples in a vector (paper: groups of 8).
        n_early_every: flows between two early outputs (paper: 4).
        n_early_size: channels that leave at an early output (paper: 2).
        n_layers: dilated layers in each coupling's network (paper: 8).
        hidden_channels: channels of its residual and skip paths (paper: 512 and 256; the
            published code's configuration: 256 both).
        kernel_size: width of its dilated convolutions (paper: 3).
        conditioning: "upsampled", by a learned transposed convolution to audio rate, or
            "repeated", each frame held through its hop: M features for each vector instead of
            M squeeze_factor, so that wide groups (SqueezeWave, Zhai et al. 2020) stay cheap.
        upsample_kernel: taps of the transposed convolution.
        alternate: whether the halves exchange roles from flow to flow, as in the oldest
            published code; the first half is passive always without it.
    """

    denoiser_bias: ClassVar[Literal["zeros", "normal", "silence"]] = "zeros"

    type: Literal["waveglow"] = "waveglow"
    n_mels: PositiveInt = 80
    hop_length: PositiveInt = 256
    n_flows: PositiveInt = 12
    squeeze_factor: PositiveInt = 8
    n_early_every: PositiveInt = 4
    n_early_size: PositiveInt = 2
    n_layers: int = Field(default=8, gt=0, le=24)  # the dilation doubles in each
    hidden_channels: PositiveInt = 256
    kernel_size: PositiveInt = 3
    conditioning: Literal["upsampled", "repeated"] = "upsampled"
    upsample_kernel: PositiveInt = 1024
    alternate: bool = False

    @model_validator(mode="after")
    def _sizes_fit(self) -> "WaveGlowConfig":
        if self.squeeze_factor % 2 or self.n_early_size % 2:
            raise ValueError(
                f"squeeze_factor {self.squeeze_factor} and n_early_size {self.n_early_size} must "
                "both be even, because each coupling halves the channels"
            )
        n_early = self.n_early_size * ((self.n_flows - 1) // self.n_early_every)
        if n_early >= self.squeeze_factor:
            raise ValueError(
                f"early outputs would take {n_early} of {self.squeeze_factor} channels: choose "
                "fewer flows, a larger n_early_every or a larger squeeze_factor"
            )
        if self.hop_length % self.squeeze_factor:
            raise ValueError(
                f"hop_length {self.hop_length} must be a multiple of squeeze_factor "
                f"{self.squeeze_factor}"
            )
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {self.kernel_size}")
        if self.upsample_kernel < self.hop_length:
            raise ValueError(
                f"upsample_kernel {self.upsample_kernel} must reach over the hop of "
                f"{self.hop_length} samples"
            )
        return self


@register(WaveGlowConfig)
def waveglow(config: WaveGlowConfig, mel: MelConfig | None = None) -> Flow:
    """The flow of figure 1 of the paper; `mel`, if given, must have the config's sizes.

    The paper's x in groups of 8 samples is x here, W_k the weight of `InvertibleConv1x1`, WN
    the `WaveNet`; its t and log s are shift and log_scale, its x_a the passive and x_b the
    active half (equations 5 to 8). Its sigma scales the noise at synthesis and is no part of
    the density here, which has sigma 1.

    Raises:
        ConfigError: the mel has other bands or another hop than the config.
    """
    if mel is not None and (config.n_mels, config.hop_length) != (mel.n_mels, mel.hop_length):
        raise ConfigError(
            f"model has n_mels {config.n_mels} and hop_length {config.hop_length}, "
            f"its mel {mel.n_mels} and {mel.hop_length}"
        )
    conditioner: UpsampledMel | RepeatedMel
    if config.conditioning == "upsampled":
        conditioner = UpsampledMel(
            config.n_mels, config.upsample_kernel, config.hop_length, config.squeeze_factor
        )
    else:
        conditioner = RepeatedMel(config.n_mels, config.hop_length // config.squeeze_factor)
    channels = config.squeeze_factor
    whole = level = Chain(Squeeze(config.squeeze_factor))
    for k in range(config.n_flows):
        if k > 0 and k % config.n_early_every == 0:
            rest = Chain()
            level.steps.append(FactorOut(config.n_early_size, rest))
            level = rest
            channels -= config.n_early_size
        network = WaveNet(
            in_channels=channels // 2,
            cond_channels=conditioner.n_features,
            hidden_channels=config.hidden_channels,
            out_channels=Affine.n_params * channels // 2,
            n_layers=config.n_layers,
            kernel_size=config.kernel_size,
        )
        level.steps.append(InvertibleConv1x1(channels))
        halves = Halves(swap=config.alternate and k % 2 == 1)
        level.steps.append(Coupling(network, Affine(), halves))
    return WaveGlow(whole, conditioner, config.squeeze_factor, config.hop_length)


class WaveGlowStep(NamedTuple):
    """A step of a WaveGlow, all weights in float64.

    Attributes:
        n_early: channels that leave before the step.
        unmix: (C, C), the inverse of its 1x1 convolution.
        swap: whether the second half of the channels is passive.
        network: of its coupling.
    """

    n_early: int
    unmix: Tensor
    swap: bool
    network: FoldedWaveNet


class WaveGlowRows(NamedTuple):
    """The weights of a WaveGlow for a decoder that runs it in rows of channels.

    Attributes:
        hop_length: audio samples for each mel frame.
        condition: the conditioner's `affine_map`.
        steps: in the order of `forward`, through all levels.
    """

    hop_length: int
    condition: tuple[Tensor, Tensor]
    steps: list[WaveGlowStep]


class WaveGlow(Flow):
    """A flow that `waveglow` builds. It can be run in rows of channels (engine/fast/rows.py)."""

    @torch.no_grad()
    def rows(self) -> WaveGlowRows | None:
        """Its weights; None if a part was replaced by another kind of module."""
        affine_map = declaration(self.conditioner, "affine_map")
        condition = None if affine_map is None else affine_map()
        chain = self.bijection
        if condition is None or type(chain) is not Chain or len(chain) < 2:
            return None
        if type(chain[0]) is not Squeeze or chain[0].factor != self.channels:
            return None
        steps: list[WaveGlowStep] = []
        n_early, level = 0, list(chain)[1:]
        while level:
            first, *level = level
            if type(first) is FactorOut and type(first.rest) is Chain and not level:
                n_early, level = n_early + first.n, list(first.rest)
                continue
            step = _step(n_early, first, level.pop(0)) if level else None
            if step is None:
                return None
            steps.append(step)
            n_early = 0
        return WaveGlowRows(self.hop_length, condition, steps) if steps else None


def _step(n_early: int, mix: nn.Module, coupling: nn.Module) -> WaveGlowStep | None:
    """A step of exactly the parts that `waveglow` builds, or None."""
    if type(mix) is not InvertibleConv1x1 or type(coupling) is not Coupling:
        return None
    network, map, split = coupling.network, coupling.map, coupling.split
    if type(network) is not WaveNet or type(map) is not Affine or type(split) is not Halves:
        return None
    folded = network.folded()
    if folded is None or map.bound is not None:
        return None
    return WaveGlowStep(n_early, torch.linalg.inv(mix.weight.double()), split.swap, folded)


class UpsampledMel(Conditioner):
    """The mel at audio rate, squeezed along with the audio: M squeeze_factor features."""

    def __init__(self, n_mels: int, kernel_size: int, hop_length: int, squeeze_factor: int) -> None:
        super().__init__()
        self.upsample = Upsample(n_mels, kernel_size, hop_length)
        self.squeeze_factor = squeeze_factor
        self.n_features = n_mels * squeeze_factor
        self.context = self.upsample.context

    def forward(self, mel: Tensor, mask: Tensor | None = None, state: State = None) -> Condition:
        """Mel (B, M, F) and mask (B, 1, F) to a condition of F hop / squeeze_factor positions."""
        features = squeeze(self.upsample(mel, mask), self.squeeze_factor)
        if mask is not None:
            mask = mask.repeat_interleave(self.upsample.stride // self.squeeze_factor, 2)
        return Condition(features, mask)

    def affine_map(self) -> tuple[Tensor, Tensor] | None:
        """The features as an affine function of mel frames, in float64; None if it is another.

        Returns:
            Maps (P, N, taps M) of a window of frames, newest first, to the N features of each of
            a frame's P positions; and the offset (N,) of all.
        """
        if type(self.upsample) is not Upsample or not self.upsample.is_plain():
            return None
        convolution, n, stride = (
            self.upsample.convolution,
            self.squeeze_factor,
            self.upsample.stride,
        )
        weight = convolution.weight.double()
        weight = F.pad(weight, (0, -weight.shape[2] % stride))
        weight = weight.unflatten(2, (-1, stride // n, n))  # (M in, M out, taps, P, n)
        assert convolution.bias is not None
        offset = convolution.bias.double().repeat_interleave(n)
        return weight.permute(3, 1, 4, 2, 0).flatten(3).flatten(1, 2), offset
