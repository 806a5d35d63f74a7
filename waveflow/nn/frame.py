"""Networks at the mel-frame rate: ConvNeXt blocks and a gated (WaveNet-like) stack.

All take and return (B, L, C): the pointwise layers, nearly all of the cost, are plain matrix
products there. All take an optional mask (B, L, 1) and fill an item's padding with zeros before
each convolution, so that a padded item gets what it gets alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from waveflow.context import Context, total_context
from waveflow.decoding import IntegerGraph, Kit, NotInIntegers, is_exactly
from waveflow.padding import zero_padding


class DepthwiseConv(nn.Conv1d):
    """A depthwise convolution along L of (B, L, C), zero-padded to the same length."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, padding="same", groups=channels)
        self.context = Context(kernel_size // 2, kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        # As a channels-last 2-D convolution it reads (B, L, C) memory without a copy.
        image = x.transpose(1, 2)[:, :, None]
        reach = (0, self.kernel_size[0] // 2)
        weight = self.weight[:, :, None]
        out = F.conv2d(image, weight, self.bias, padding=reach, groups=self.groups)
        return out[:, :, 0].transpose(1, 2)


class ConvNeXtBlock(nn.Module):
    """x + gain MLP(norm(depthwise(x))) with a learned gain (Liu et al. 2022, figure 4)."""

    def __init__(self, channels: int, kernel_size: int = 7, expansion: int = 4) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv(channels, kernel_size)
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, expansion * channels)
        self.contract = nn.Linear(expansion * channels, channels)
        self.gain = nn.Parameter(torch.full((channels,), 0.3))
        self.context = self.depthwise.context

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.norm(self.depthwise(zero_padding(x, mask)))
        return torch.addcmul(x, self.contract(F.relu(self.expand(h))), self.gain)


class ConvNeXt(nn.Module):
    """A stack of `n_layers` ConvNeXt blocks, (B, L, C) -> (B, L, C)."""

    def __init__(self, channels: int, n_layers: int, kernel_size: int = 7) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ConvNeXtBlock(channels, kernel_size) for _ in range(n_layers))
        self.context = total_context(*self.blocks)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x


class GatedLayer(nn.Module):
    """x + W (tanh(a) sigmoid(b)), [a, b] a dilated convolution of x (WaveNet, equation 2)."""

    def __init__(self, channels: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.context = Context(dilation * (kernel_size // 2), dilation * (kernel_size // 2))
        self.dilated = nn.Linear(kernel_size * channels, 2 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        # The taps side by side make the dilated convolution one matrix product.
        a, b = self.dilated(_taps(x, mask, self.kernel_size, self.dilation)).chunk(2, -1)
        return x + self.out(torch.tanh(a) * torch.sigmoid(b))

    def for_decoding(self, kit: Kit) -> nn.Module:
        """In float32 a layer with a faster gate."""
        if kit.dtype != torch.float32 or not self._has_plain_layers():
            return kit.replaced(self)
        return _FastGatedLayer(self, kit)

    def in_integers(self, graph: IntegerGraph, x: Any) -> Any:
        """The layer's result in a graph, of x whose padding is zero."""
        if not self._has_plain_layers():
            raise NotInIntegers
        weights = self.dilated.weight.chunk(self.kernel_size, 1)
        taps = graph.taps(x, self.dilated, weights, self.dilation)
        gated = graph.gate(taps, self.dilated.weight, self.dilated.bias)
        return graph.add(x, graph.apply(self.out, gated))

    def _has_plain_layers(self) -> bool:
        return is_exactly(self.dilated, nn.Linear) and is_exactly(self.out, nn.Linear)


class _FastGatedLayer(nn.Module):
    """A `GatedLayer` with one function for both halves of its gate, and the faster one.

    tanh(a) = 2 sigmoid(2 a) - 1, and both factors of 2 are folded into the weights.
    """

    def __init__(self, layer: GatedLayer, kit: Kit) -> None:
        super().__init__()
        self.kernel_size, self.dilation = layer.kernel_size, layer.dilation
        weight, bias = layer.dilated.weight.detach(), layer.dilated.bias.detach()
        scale = torch.ones_like(bias)
        scale[: len(scale) // 2] = 2
        self.dilated = kit.linear(scale[:, None] * weight, scale * bias)
        self.out = kit.linear(2 * layer.out.weight.detach(), layer.out.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        taps = _taps(x, mask, self.kernel_size, self.dilation)
        signal, gate = self.dilated(taps).sigmoid_().chunk(2, -1)
        return self.out(signal.sub_(0.5) * gate).add_(x)


class GatedStack(nn.Module):
    """Gated layers of the given dilations, (B, L, C) -> (B, L, C)."""

    def __init__(self, channels: int, dilations: Sequence[int], kernel_size: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GatedLayer(channels, kernel_size, d) for d in dilations)
        self.context = total_context(*self.layers)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def in_integers(self, graph: IntegerGraph, x: Any) -> Any:
        """The result of all layers in a graph."""
        for layer in self.layers:
            x = graph.apply(layer, graph.valid(x))
        return x


def _taps(x: Tensor, mask: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    """What a dilated convolution sees of x (B, L, C) at each position, (B, L, k C)."""
    length, reach = x.shape[1], dilation * (kernel_size // 2)
    padded = F.pad(zero_padding(x, mask), (0, 0, reach, reach))
    return torch.cat([padded[:, i * dilation :][:, :length] for i in range(kernel_size)], -1)
