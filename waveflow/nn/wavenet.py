"""WaveNet: the coupling network of WaveGlow."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from waveflow.context import Context, total_context
from waveflow.decoding import IntegerKit, NotInIntegers, is_exactly

# Rows of a block in integers: enough for efficient products, few enough for the cache.
_INTEGER_ROWS = 512


class FoldedLayer(NamedTuple):
    """A layer of a `WaveNet`, all weights in float64.

    Attributes:
        dilation: of its taps.
        taps, condition: (2 C, C, k) and (2 C, M), added to `bias` (2 C,) before the gate.
        residual: (C, C) of the gate's result, or (0, C) in the last layer; with its bias.
        share: (N, C), the layer's share of the network's result; with its bias.
    """

    dilation: int
    taps: Tensor
    condition: Tensor
    bias: Tensor
    residual: Tensor
    residual_bias: Tensor
    share: Tensor
    share_bias: Tensor


class FoldedWaveNet(NamedTuple):
    """The weights of a `WaveNet` without its skip path, in float64.

    The result is `bias` and the sum of the layers' shares, because `end` is linear.

    Attributes:
        start, start_bias: (C, Cp) and (C,), from x to the first layer's input.
        layers: in their order.
        bias: (N,), of the result.
    """

    start: Tensor
    start_bias: Tensor
    layers: list[FoldedLayer]
    bias: Tensor


class WaveNet(nn.Module):
    """Gated dilated convolutions, not causal, that features steer (WaveGlow, section 2.1).

    Layer i has dilation 2^i and adds its own rows of one fused 1x1 convolution of the features
    before the gate tanh(a) sigmoid(b). Of its output one half goes on as a residual, the other
    into the sum of skips, which `end` maps to the result; the last layer has skips alone.
    `end` starts at zero, so that a new coupling is the identity. The names of the layers are
    those of the published weights.

    Args:
        in_channels: channels of x.
        cond_channels: M, channels of the features.
        hidden_channels: C of the residual and skip paths.
        out_channels: channels of the result.
        n_layers: number of gated layers.
        kernel_size: odd width of the dilated convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        cond_channels: int,
        hidden_channels: int,
        out_channels: int,
        n_layers: int,
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        self.hidden_channels = hidden_channels
        self.start = weight_norm(nn.Conv1d(in_channels, hidden_channels, 1))
        self.cond_layer = weight_norm(nn.Conv1d(cond_channels, 2 * hidden_channels * n_layers, 1))
        self.in_layers = nn.ModuleList()
        self.res_skip_layers = nn.ModuleList()
        for i in range(n_layers):
            dilated = nn.Conv1d(
                hidden_channels,
                2 * hidden_channels,
                kernel_size,
                dilation=2**i,
                padding=2**i * (kernel_size - 1) // 2,
            )
            n_outputs = hidden_channels if i == n_layers - 1 else 2 * hidden_channels
            self.in_layers.append(weight_norm(dilated))
            self.res_skip_layers.append(weight_norm(nn.Conv1d(hidden_channels, n_outputs, 1)))
        self.end = nn.Conv1d(hidden_channels, out_channels, 1)
        nn.init.zeros_(self.end.weight)
        nn.init.zeros_(self.end.bias)  # type: ignore[arg-type]

    @property
    def context(self) -> Context:
        """Positions of x on each side of a position of the result that it depends on."""
        return total_context(*self.in_layers)

    def forward(self, x: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, Cp, L), features (B, M, L) and mask (B, 1, L) to (B, out_channels, L).

        With a mask a padded item gets what it gets alone, where zero padding ends the signal.
        """
        h = self.start(x)
        skips = torch.zeros_like(h)
        conditions = self.cond_layer(features).chunk(len(self.in_layers), 1)
        for in_layer, condition, res_skip in zip(
            self.in_layers, conditions, self.res_skip_layers, strict=True
        ):
            if mask is not None:
                # Selected, not multiplied: padding may hold NaN.
                h = h.masked_fill(mask == 0, 0.0)
            signal, gate = (in_layer(h) + condition).chunk(2, 1)
            *residual, skip = res_skip(signal.tanh() * gate.sigmoid()).split(
                self.hidden_channels, 1
            )
            if residual:
                h = h + residual[0]
            skips = skips + skip
        return self.end(skips)

    @torch.no_grad()
    def folded(self) -> FoldedWaveNet | None:
        """Its weights as matrices; None if a layer is not of the kind that `__init__` makes."""
        pointwise = [self.start, self.cond_layer, self.end, *self.res_skip_layers]
        if not all(map(_is_plain, [*pointwise, *self.in_layers])):
            return None
        if any(layer.kernel_size != (1,) for layer in pointwise):
            return None
        width, n_layers = self.hidden_channels, len(self.in_layers)
        end, end_bias = _matrix(self.end), _bias(self.end)
        conditions = _matrix(self.cond_layer).chunk(n_layers)
        condition_biases = _bias(self.cond_layer).chunk(n_layers)
        layers = []
        dilated: Any
        for dilated, res_skip, condition, condition_bias in zip(
            self.in_layers, self.res_skip_layers, conditions, condition_biases, strict=True
        ):
            residual, skip = _matrix(res_skip).tensor_split([-width])
            residual_bias, skip_bias = _bias(res_skip).tensor_split([-width])
            layers.append(
                FoldedLayer(
                    dilated.dilation[0],
                    dilated.weight.double(),
                    condition,
                    condition_bias + _bias(dilated),
                    residual,
                    residual_bias,
                    end @ skip,
                    end @ skip_bias,
                )
            )
        return FoldedWaveNet(_matrix(self.start), _bias(self.start), layers, end_bias)

    def for_integers(self, kit: IntegerKit) -> nn.Module:
        """The network as one graph, without its skip path (`folded`)."""
        folded = self.folded()
        if folded is None:
            raise NotInIntegers
        graph = kit.graph(_INTEGER_ROWS, self.context, channel_axis=1)
        x = graph.input(folded.start.shape[1])
        features = graph.input(folded.layers[0].condition.shape[1])
        all_conditions = torch.cat([layer.condition for layer in folded.layers])
        features = graph.integers(features, self.cond_layer, all_conditions)
        h = graph.valid(graph.affine(x, folded.start, folded.start_bias))
        result = None
        for layer, dilated, res_skip in zip(
            folded.layers, self.in_layers, self.res_skip_layers, strict=True
        ):
            taps = layer.taps.unbind(2)
            gated = graph.gate(
                graph.join(graph.taps(h, dilated, taps, layer.dilation), features),
                torch.cat([*taps, layer.condition], 1),
                layer.bias,
            )
            gated = graph.integers(gated, res_skip, _matrix(res_skip))
            bias = layer.share_bias if result is not None else layer.share_bias + folded.bias
            share = graph.product(gated, layer.share, bias)
            result = share if result is None else graph.add(result, share)
            if len(layer.residual):
                residual = graph.product(gated, layer.residual, layer.residual_bias)
                h = graph.valid(graph.add(h, residual))
        return _InIntegers(graph.compiled(result))


class _InIntegers(nn.Module):
    """A network as a compiled graph, for one item without padding."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self._run = run

    def forward(self, x: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._run(x[0].T, features[0].T).T[None]


def _is_plain(layer: Any) -> bool:
    """Whether a layer is torch's own convolution, with zeros to the same length and a bias."""
    if not is_exactly(layer, nn.Conv1d) or layer.bias is None:
        return False
    same = (layer.dilation[0] * (layer.kernel_size[0] // 2),)
    is_plain = (layer.stride, layer.groups, layer.padding_mode) == ((1,), 1, "zeros")
    return is_plain and layer.padding == same and layer.kernel_size[0] % 2 == 1


def _matrix(convolution: Any) -> Tensor:
    """The weight (N, K) of a 1x1 convolution, in float64."""
    return convolution.weight.double()[:, :, 0]


def _bias(convolution: Any) -> Tensor:
    return convolution.bias.double()
