"""WaveGlow on a CPU: the flow's inverse in (L, C) rows, with fewer and larger products.

It computes what `Flow.decode` does and differs from it by rounding alone:

- The weights below are computed once, in float64, from those without weight norm.
- In rows of channels every convolution is a product with a matrix: the taps of a dilated one lie
  side by side in a row, zeros beyond both ends.
- `end` is linear, so its product with a layer's skip matrix gives the layer's share of the
  result at once, and the skip path of C channels is gone.
- `start` is linear, so the first dilated convolution takes the few channels of the passive half
  directly. A channel of ones carries the bias of `start`; it ends where the signal ends, because
  the zero padding does.
- tanh(a) = 2 sigmoid(2 a) - 1: one function for both halves of the gate, and the faster one.
- The condition is added layer by layer, at the rank that `engine.fast.low_rank` finds.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from waveflow.decoding import declaration
from waveflow.engine.contract import each_item
from waveflow.engine.fast.low_rank import Steering
from waveflow.engine.fast.product import Product
from waveflow.errors import ConfigError
from waveflow.flow import Flow, State
from waveflow.models.waveglow import WaveGlowRows, WaveGlowStep
from waveflow.nn.wavenet import FoldedLayer, FoldedWaveNet

# Rows that go through a layer at a time: few enough for the cache, enough for the products.
_BLOCK = 1024


class RowsWaveGlow:
    """A decoder: the inverse of a WaveGlow on a CPU, in rows.

    It keeps its own copy of the weights: build another when they change. It keeps nothing from
    call to call, so threads may share it.

    Args:
        rows: the weights of a WaveGlow (`WaveGlow.rows`), on the CPU.
        dtype: of the products with the networks' weights, float32 or bfloat16. Sums over
            layers, gates, affine maps and 1x1 convolutions are float32 always.

    Raises:
        ConfigError: another dtype.

    Example:
        >>> from waveflow.models.waveglow import WaveGlowConfig, waveglow
        >>> flow = waveglow(WaveGlowConfig(n_flows=2, hidden_channels=8))
        >>> decode = RowsWaveGlow(flow.rows())
        >>> decode(flow.noise(3, seeds=[0]), torch.zeros(1, 80, 3)).shape
        torch.Size([1, 768])
    """

    @torch.no_grad()
    def __init__(self, rows: WaveGlowRows, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"a WaveGlow is run in rows in float32 or bfloat16, not {dtype}")
        self._dtype = dtype
        self._hop_length = rows.hop_length
        n_positions = len(rows.condition[0])
        self._steering = Steering(*rows.condition, max(1, _BLOCK // n_positions))
        self._steps = [_Step(step, self._steering, dtype) for step in rows.steps]

    @torch.inference_mode()
    def __call__(
        self,
        z: Tensor,
        mel: Tensor,
        lengths: Tensor | None = None,
        state: State = None,
        sigma: float = 1.0,
    ) -> Tensor:
        """Noise z (B, C, L) and mel (B, M, F) to audio (B, C L), as `Flow.decode`.

        `lengths` (B,) are the frames of each padded item; its audio beyond them is zero.
        A WaveGlow has no `state`.
        """
        return each_item(self._decode, self._hop_length, sigma * z, mel, lengths, state)

    def _decode(self, noise: Tensor, mel: Tensor, state: State) -> Tensor:
        """Audio (1, C L) of one item, noise (1, C, L) and mel (1, M, F)."""
        z, mel = noise[0].T.float(), mel[0].T.float()
        features = self._steering.rows(mel).to(self._dtype)
        n_out = sum(step.n_early for step in self._steps)
        x = z[:, n_out:]
        for step in reversed(self._steps):
            x = step.inverse(x, features)
            n_out -= step.n_early
            x = torch.cat([z[:, n_out : n_out + step.n_early], x], 1)
        # x (L, C): its rows, one after another, are the audio.
        return x.reshape(1, -1)


def rows_of(flow: Flow) -> WaveGlowRows | None:
    """The weights of a flow that says it can be run in rows; None for others."""
    rows = declaration(flow, "rows")
    return None if rows is None else rows()


class _Step:
    """The inverse of a step of the flow."""

    def __init__(self, step: WaveGlowStep, steering: Steering, dtype: torch.dtype) -> None:
        self.n_early = step.n_early
        self._swap = step.swap
        self._unmix = step.unmix.T.float()
        self._network = _Network(step.network, steering, dtype)

    def inverse(self, z: Tensor, features: Tensor) -> Tensor:
        """z (L, C) to x (L, C)."""
        first, second = z.chunk(2, 1)
        passive, active = (second, first) if self._swap else (first, second)
        shift, log_scale = self._network(passive, features).chunk(2, 1)
        active = (active - shift) * (-log_scale).exp()
        return torch.cat([active, passive] if self._swap else [passive, active], 1) @ self._unmix


class _Layer(NamedTuple):
    """A gated layer.

    Attributes:
        offsets: of the rows that its taps see.
        taps: side by side, to both halves of the gate.
        condition: the condition's rows to the same.
        out: the gate's C channels to the residual, if another layer follows, and then to the
            share of the result.
    """

    offsets: range
    taps: Product
    condition: Product
    out: Product


class _Network:
    """A `WaveNet` in rows, with `start` and `end` folded into its layers."""

    def __init__(self, network: FoldedWaveNet, steering: Steering, dtype: torch.dtype) -> None:
        self._steering = steering
        self._dtype = dtype
        self._start = network.start.T.float()
        self._start_bias = network.start_bias.float()
        self._bias = network.bias.float()
        first, *others = network.layers
        # `start` is linear: the first layer takes x and ones in the place of its channels.
        start = torch.cat([network.start, network.start_bias[:, None]], 1)
        first = first._replace(taps=torch.einsum("ock,cj->ojk", first.taps, start))
        self._layers = [_layer(layer, steering, dtype) for layer in (first, *others)]
        self._padding = max(layer.offsets[-1] for layer in self._layers)
        self._block = max(1, _BLOCK // steering.n_positions) * steering.n_positions

    def __call__(self, x: Tensor, features: Tensor) -> Tensor:
        """x (L, in_channels) and rows of the condition to (L, out_channels)."""
        inside = slice(self._padding, self._padding + len(x))
        # The rows before and after a layer, with zeros at both ends of each.
        here, there = x.new_zeros(2, len(x) + 2 * self._padding, self._start.shape[1])
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
        taps = seen.new_empty(self._block, width * len(layer.offsets), dtype=self._dtype)
        gated = seen.new_empty(self._block, before.shape[1], dtype=self._dtype)
        for begin in range(0, len(before), self._block):
            block = slice(begin, min(begin + self._block, len(before)))
            n_rows = block.stop - begin
            for i, offset in enumerate(layer.offsets):
                first = self._padding + begin + offset
                taps[:n_rows, i * width : (i + 1) * width] = seen[first : first + n_rows]
            condition = layer.condition(features[self._steering.row_range(block)])
            gates = layer.taps.plus(taps[:n_rows], self._steering.positions(condition))
            signal, gate = gates.float().sigmoid_().chunk(2, 1)
            torch.mul(signal.sub_(0.5), gate, out=gated[:n_rows])
            residual, share = layer.out(gated[:n_rows]).tensor_split([-n_result], 1)
            result[block] += share
            if residual.shape[1]:
                torch.add(before[block], residual, out=after[block])


def _layer(layer: FoldedLayer, steering: Steering, dtype: torch.dtype) -> _Layer:
    # tanh(a) sigmoid(b) = 2 (sigmoid(2 a) - 1/2) sigmoid(b)
    scale = torch.ones_like(layer.bias)[:, None]
    scale[: len(scale) // 2] = 2
    condition, bias = steering.folded(layer.condition)
    bias = scale[:, 0] * (bias + layer.bias)
    taps = scale * layer.taps.transpose(1, 2).flatten(1)
    out = 2 * torch.cat([layer.residual, layer.share])
    out_bias = torch.cat([layer.residual_bias, layer.share_bias])
    # Then a sum of two matrices takes no pass of its own (`Product.plus`). A condition that is
    # combined from fewer rows cannot bring the bias.
    brings_bias = steering.n_rows == steering.n_positions
    reach = layer.dilation * (layer.taps.shape[2] // 2)
    return _Layer(
        range(-reach, reach + 1, layer.dilation),
        Product(taps, dtype, _BLOCK, None if brings_bias else bias),
        Product(scale * condition, dtype, _BLOCK, bias if brings_bias else None),
        Product(out, dtype, _BLOCK, out_bias),
    )
