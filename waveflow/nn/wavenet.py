"""WaveNet: the coupling network of WaveGlow."""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from waveflow.context import Context, total_context


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
