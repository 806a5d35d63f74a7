"""SeparableWaveNet: the coupling network of SqueezeWave."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from waveflow.context import Context
from waveflow.decoding import Kit, is_exactly
from waveflow.nn.frame import DepthwiseConv


class SeparableWaveNet(nn.Module):
    """Gated depthwise separable convolutions that features steer (Zhai et al. 2020, section 3).

    Each layer is a batch norm, a depthwise convolution of width 3 and a pointwise one, with the
    features added before the gate tanh(a) sigmoid(b), and a residual. There are no dilations and
    no skips: `end`, which starts at zero, maps the last residual to the result.

    In training a batch norm takes the moments of the batch at hand, over valid positions only, so
    items see each other, and the parts of a step (`accumulate`) or its processes each have their
    own. A flow's log-determinant stays exact: the network makes the parameters of a coupling, and
    is not inverted. In evaluation the running moments are constants; a decoder folds them into
    the convolutions.

    Args:
        in_channels: channels of x.
        cond_channels: M, channels of the features.
        hidden_channels: C of the residual path.
        out_channels: channels of the result.
        n_layers: number of gated layers.
    """

    def __init__(
        self,
        in_channels: int,
        cond_channels: int,
        hidden_channels: int,
        out_channels: int,
        n_layers: int,
    ) -> None:
        super().__init__()
        width = hidden_channels
        self.start = weight_norm(nn.Linear(in_channels, width))
        self.condition = weight_norm(nn.Linear(cond_channels, 2 * width * n_layers))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(n_layers))
        self.depthwise = nn.ModuleList(DepthwiseConv(width, 3) for _ in range(n_layers))
        self.pointwise = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(n_layers))
        self.residual = nn.ModuleList(weight_norm(nn.Linear(width, width)) for _ in range(n_layers))
        self.end = nn.Linear(width, out_channels)
        nn.init.zeros_(self.end.weight)
        nn.init.zeros_(self.end.bias)
        self.context = Context(n_layers, n_layers)

    def forward(self, x: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, Cp, L), features (B, M, L) and mask (B, 1, L) to (B, out_channels, L)."""
        h = self.start(x.transpose(1, 2))
        conditions = self.condition(features.transpose(1, 2)).chunk(len(self.norms), 2)
        for norm, depthwise, pointwise, residual, condition in zip(
            self.norms, self.depthwise, self.pointwise, self.residual, conditions, strict=True
        ):
            a, b = (pointwise(depthwise(_normalised(norm, h, mask))) + condition).chunk(2, 2)
            h = h + residual(a.tanh() * b.sigmoid())
        return self.end(h).transpose(1, 2)

    def for_decoding(self, kit: Kit) -> nn.Module:
        """The network without its batch norms."""
        linears = (self.start, self.condition, self.end, *self.pointwise, *self.residual)
        is_plain = (
            all(is_exactly(layer, nn.Linear) for layer in linears)
            and all(is_exactly(layer, nn.BatchNorm1d) for layer in self.norms)
            and all(is_exactly(layer, DepthwiseConv) for layer in self.depthwise)
        )
        return _Folded(self, kit) if is_plain else kit.replaced(self)


class _Folded(nn.Module):
    """A `SeparableWaveNet` in evaluation: its batch norms are a scale and a shift.

    The scale goes into the depthwise convolution. The shift b adds the same to every position,
    W (w_1 + w_2 + w_3) b for the taps w and the pointwise W; but at an end of the signal a tap
    meets the padding, which has no shift. So two features say where the left and the right
    neighbour are missing, and the projection of the features takes W w_1 b or W w_3 b away.
    """

    @torch.no_grad()
    def __init__(self, network: SeparableWaveNet, kit: Kit) -> None:
        super().__init__()

        def layer(like: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
            twin = kit.replaced(like)
            twin._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
            no_gradient = None if bias is None else nn.Parameter(bias, requires_grad=False)
            twin._parameters["bias"] = no_gradient
            return kit.convert(twin)

        self.depthwise, self.pointwise = nn.ModuleList(), nn.ModuleList()
        constant, ends = [], []
        norm: Any
        depthwise: Any
        pointwise: Any
        condition: Any = network.condition
        for norm, depthwise, pointwise in zip(
            network.norms, network.depthwise, network.pointwise, strict=True
        ):
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            shift = norm.bias - scale * norm.running_mean
            taps, mix = depthwise.weight[:, 0], pointwise.weight
            self.depthwise.append(layer(depthwise, scale[:, None, None] * depthwise.weight, None))
            self.pointwise.append(layer(pointwise, mix, None))
            constant.append(mix @ (depthwise.bias + taps.sum(1) * shift) + pointwise.bias)
            ends.append(-mix @ (taps[:, [0, 2]] * shift[:, None]))
        self.condition = layer(
            condition,
            torch.cat([condition.weight, torch.cat(ends)], 1),
            condition.bias + torch.cat(constant),
        )
        self.start, self.end = kit.convert(network.start), kit.convert(network.end)
        self.residual = nn.ModuleList(map(kit.convert, network.residual))

    def forward(self, x: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        valid = torch.ones_like(features[:, :1]) if mask is None else mask.to(features.dtype)
        missing = 1 - torch.cat([F.pad(valid, (1, -1)), F.pad(valid, (-1, 1))], 1)
        features = torch.cat([features, missing], 1).transpose(1, 2)
        h = self.start(x.transpose(1, 2))
        conditions = self.condition(features).chunk(len(self.residual), 2)
        for depthwise, pointwise, residual, condition in zip(
            self.depthwise, self.pointwise, self.residual, conditions, strict=True
        ):
            if mask is not None:
                # Selected, not multiplied: padding may hold NaN.
                h = h.masked_fill(mask.transpose(1, 2) == 0, 0.0)
            a, b = (pointwise(depthwise(h)) + condition).chunk(2, 2)
            h = h + residual(a.tanh() * b.sigmoid())
        return self.end(h).transpose(1, 2)


def _normalised(norm: nn.Module, h: Tensor, mask: Tensor | None) -> Tensor:
    """The valid positions of h (B, L, C) through a batch norm; zeros in the padding."""
    if mask is None:
        return norm(h.flatten(0, 1)).view_as(h)
    valid = mask[:, 0] != 0
    result = torch.zeros_like(h)
    result[valid] = norm(h[valid]).to(h.dtype)
    return result
