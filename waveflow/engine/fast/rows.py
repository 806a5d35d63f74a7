"""WaveGlow on a CPU: the flow's inverse in (L, C) rows, without what its algebra can spare.

It computes what `Flow.decode` does and differs from it by rounding alone:

- Weight norm, the inverses of the 1x1 convolutions and all that follows are worked out once, in
  float64.
- In rows of channels every convolution is a product with a matrix: the taps of a dilated one lie
  side by side in a row, zeros beyond both ends.
- `end` is linear, so its product with a layer's skip matrix gives the layer's share of the
  result at once, and the skip path of C channels is gone.
- `start` is linear, so the first dilated convolution takes the few channels of the passive half
  in its place. A channel of ones carries the bias of `start`: it ends where the signal ends, as
  the zero padding does.
- tanh(a) = 2 sigmoid(2 a) - 1: one function for both halves of the gate, and the faster one.
- The condition is added layer by layer, at the rank that `engine.fast.low_rank` finds.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from waveflow.bijections import (
    Affine,
    Chain,
    Coupling,
    FactorOut,
    Halves,
    InvertibleConv1x1,
    Squeeze,
)
from waveflow.engine.contract import each_item
from waveflow.engine.fast.low_rank import Steering
from waveflow.engine.fast.product import Product
from waveflow.errors import ConfigError
from waveflow.flow import Flow, State
from waveflow.models.waveglow import RepeatedMel, UpsampledMel
from waveflow.nn.wavenet import WaveNet

# Rows that go through a layer at a time: few enough for the cache, enough for the products.
_BLOCK = 1024


class RowsWaveGlow:
    """The inverse of a WaveGlow on a CPU, in rows: a decoder.

    It holds its own copy of the weights as they are when it is built: build another when they
    change. It keeps nothing from call to call, so threads may share it.

    Args:
        flow: a flow that `waveglow` builds, on the CPU.
        dtype: of the products with the networks' weights, float32 or bfloat16. Sums over
            layers, gates, affine maps and 1x1 convolutions are float32 always.

    Raises:
        ConfigError: the flow is no WaveGlow or not on the CPU, or another dtype.

    Example:
        >>> from waveflow.models.waveglow import WaveGlowConfig, waveglow
        >>> flow = waveglow(WaveGlowConfig(n_flows=2, hidden_channels=8))
        >>> decode = RowsWaveGlow(flow)
        >>> decode(flow.noise(3, seeds=[0]), torch.zeros(1, 80, 3)).shape
        torch.Size([1, 768])
    """

    @torch.no_grad()
    def __init__(self, flow: Flow, dtype: torch.dtype = torch.float32) -> None:
        parts = _parts(flow)
        if parts is None:
            raise ConfigError("this flow is no WaveGlow: only a WaveGlow is run in rows")
        if any(parameter.device.type != "cpu" for parameter in flow.parameters()):
            raise ConfigError("a WaveGlow is run in rows on the CPU alone: move it there first")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"a WaveGlow is run in rows in float32 or bfloat16, not {dtype}")
        assert isinstance(flow.conditioner, UpsampledMel | RepeatedMel)
        self._dtype = dtype
        self._hop_length = flow.hop_length
        n_positions = flow.hop_length // flow.channels
        self._steering = Steering(flow.conditioner, max(1, _BLOCK // n_positions))
        self._steps = [
            _Step(
                part.n_early,
                part.mix.inverted().T.float(),
                part.swap,
                _Network(part.network, self._steering, dtype),
            )
            for part in parts
        ]

    @staticmethod
    def takes(flow: Flow) -> bool:
        """Whether the flow is a WaveGlow."""
        return _parts(flow) is not None

    @torch.inference_mode()
    def __call__(
        self,
        z: Tensor,
        mel: Tensor,
        lengths: Tensor | None = None,
        state: State = None,
    ) -> Tensor:
        """Noise z (B, C, L) and mel (B, M, F) to audio (B, C L), as `Flow.decode`.

        `lengths` (B,) are the frames of each padded item; its audio beyond them is zero.
        A WaveGlow has no `state`.
        """
        return each_item(self._decode, self._hop_length, z, mel, lengths, state)

    def _decode(self, noise: Tensor, mel: Tensor, state: State) -> Tensor:
        """One item: noise (1, C, L) and mel (1, M, F) to audio (1, C L)."""
        z, mel = noise[0].T.float(), mel[0].T.float()
        features = self._steering.rows(mel).to(self._dtype)
        hidden = self._steps[0].network.hidden(len(z))
        n_out = sum(step.n_early for step in self._steps)
        x = z[:, n_out:]
        for step in reversed(self._steps):
            x = step.inverse(x, features, hidden)
            n_out -= step.n_early
            x = torch.cat([z[:, n_out : n_out + step.n_early], x], 1)
        # x (L, C): its rows, one after another, are the audio.
        return x.reshape(1, -1)


class _Part(NamedTuple):
    """A step of a WaveGlow, before which `n_early` channels leave."""

    n_early: int
    mix: InvertibleConv1x1
    network: WaveNet
    swap: bool


def _parts(flow: Flow) -> list[_Part] | None:
    """The steps in the order of `forward`, through all levels; None if it is no WaveGlow."""
    if not isinstance(flow.bijection, Chain):
        return None
    first, *level = flow.bijection.steps
    if not isinstance(first, Squeeze) or not isinstance(
        flow.conditioner, UpsampledMel | RepeatedMel
    ):
        return None
    parts: list[_Part] = []
    n_early = 0
    while level:
        match level:
            case [
                InvertibleConv1x1() as mix,
                Coupling(
                    network=WaveNet() as network,
                    map=Affine(bound=None),
                    split=Halves(swap=swap),
                ),
                *level,
            ]:
                parts.append(_Part(n_early, mix, network, swap))
                n_early = 0
            case [FactorOut(n=n, rest=Chain(steps=rest))]:
                n_early += n
                level = list(rest)
            case _:
                return None
    return parts or None


class _Step(NamedTuple):
    """The inverse of a part: `unmix` is the 1x1 convolution's, transposed."""

    n_early: int
    unmix: Tensor
    swap: bool
    network: "_Network"

    def inverse(self, z: Tensor, features: Tensor, hidden: Tensor) -> Tensor:
        """z (L, C) to x (L, C); `hidden` as in `_Network`."""
        first, second = z.chunk(2, 1)
        passive, active = (second, first) if self.swap else (first, second)
        shift, log_scale = self.network(passive, features, hidden).chunk(2, 1)
        active = (active - shift) * (-log_scale).exp()
        return torch.cat([active, passive] if self.swap else [passive, active], 1) @ self.unmix


class _Layer(NamedTuple):
    """A gated layer.

    Attributes:
        dilation: of its taps.
        taps: side by side, to both halves of the gate.
        condition: the condition's rows to the same.
        out: the gate's C channels to the residual, if another layer follows, and then to the
            share of the result.
    """

    dilation: int
    taps: Product
    condition: Product
    out: Product


class _Network:
    """A `WaveNet` in rows, with `start` and `end` folded into its layers."""

    def __init__(self, network: WaveNet, steering: Steering, dtype: torch.dtype) -> None:
        self._steering = steering
        self._dtype = dtype
        self._channels = network.hidden_channels
        self._start = _matrix(network.start).T.float()
        self._start_bias = _bias(network.start).float()
        self._bias = _bias(network.end).float()
        self._layers = _layers(network, steering, dtype)
        side = _convolution(network.in_layers[0]).kernel_size[0] // 2
        self._offsets = range(-side, side + 1)
        self._padding = side * self._layers[-1].dilation
        self._block = max(1, _BLOCK // steering.n_positions) * steering.n_positions

    def hidden(self, n_rows: int) -> Tensor:
        """Memory for the rows before and after a layer, zeros at both ends of each."""
        return torch.zeros(2, self._padding + n_rows + self._padding, self._channels)

    def __call__(self, x: Tensor, features: Tensor, hidden: Tensor) -> Tensor:
        """x (L, in_channels) and rows of the condition to (L, out_channels)."""
        inside = slice(self._padding, self._padding + len(x))
        here, there = hidden
        torch.addmm(self._start_bias, x, self._start, out=here[inside])
        result = self._bias.repeat(len(x), 1)
        x_and_ones = F.pad(F.pad(x, (0, 1), value=1), (0, 0, self._padding, self._padding))
        first, *others = self._layers
        # Its taps see x, so that it can add its residual where it stands.
        self._run(first, x_and_ones, features, here[inside], here[inside], result)
        for layer in others:
            self._run(layer, here, features, here[inside], there[inside], result)
            here, there = there, here
        return result

    def _run(
        self,
        layer: _Layer,
        seen: Tensor,
        features: Tensor,
        before: Tensor,
        after: Tensor,
        result: Tensor,
    ) -> None:
        """`before` (L, C) and the layer's residual to `after`; its share is added to `result`.

        `seen` are the rows that the taps see, with zeros at both ends.
        """
        width, n_result = seen.shape[1], result.shape[1]
        taps = seen.new_empty(self._block, width * len(self._offsets), dtype=self._dtype)
        gated = seen.new_empty(self._block, self._channels, dtype=self._dtype)
        for begin in range(0, len(before), self._block):
            block = slice(begin, min(begin + self._block, len(before)))
            n_rows = block.stop - begin
            for i, offset in enumerate(self._offsets):
                first = self._padding + begin + offset * layer.dilation
                taps[:n_rows, i * width : (i + 1) * width] = seen[first : first + n_rows]
            condition = layer.condition(features[self._steering.row_range(block)])
            gates = layer.taps.plus(taps[:n_rows], self._steering.positions(condition))
            signal, gate = gates.float().sigmoid_().chunk(2, 1)
            torch.mul(signal.sub_(0.5), gate, out=gated[:n_rows])
            residual, share = layer.out(gated[:n_rows]).tensor_split([-n_result], 1)
            result[block] += share
            if residual.shape[1]:
                torch.add(before[block], residual, out=after[block])


def _layers(network: WaveNet, steering: Steering, dtype: torch.dtype) -> list[_Layer]:
    channels, n_layers = network.hidden_channels, len(network.in_layers)
    end = _matrix(network.end)
    # tanh(a) sigmoid(b) = 2 (sigmoid(2 a) - 1/2) sigmoid(b)
    scale = torch.ones(2 * channels, 1, dtype=torch.float64)
    scale[:channels] = 2
    conditions = _matrix(network.cond_layer).chunk(n_layers)
    condition_biases = _bias(network.cond_layer).chunk(n_layers)
    layers = []
    for i in range(n_layers):
        dilated, res_skip = _convolution(network.in_layers[i]), network.res_skip_layers[i]
        weight = dilated.weight.double()
        if i == 0:
            start = torch.cat([_matrix(network.start), _bias(network.start)[:, None]], 1)
            weight = torch.einsum("ock,cj->ojk", weight, start)
        taps = scale * weight.transpose(1, 2).flatten(1)
        condition, bias = steering.folded(conditions[i])
        bias = scale[:, 0] * (bias + condition_biases[i] + _bias(dilated))
        residual, skip = _matrix(res_skip).tensor_split([-channels])
        residual_bias, skip_bias = _bias(res_skip).tensor_split([-channels])
        out = 2 * torch.cat([residual, end @ skip])
        out_bias = torch.cat([residual_bias, end @ skip_bias])
        layers.append(
            _Layer(
                dilated.dilation[0],
                Product(taps, dtype, _BLOCK, bias),
                Product(scale * condition, dtype, _BLOCK),
                Product(out, dtype, _BLOCK, out_bias),
            )
        )
    return layers


def _convolution(module: nn.Module) -> nn.Conv1d:
    assert isinstance(module, nn.Conv1d)
    return module


def _matrix(module: nn.Module) -> Tensor:
    """The weight (out, in) of a 1x1 convolution, in float64."""
    return _convolution(module).weight.double()[:, :, 0]


def _bias(module: nn.Module) -> Tensor:
    bias = _convolution(module).bias
    assert bias is not None
    return bias.double()
