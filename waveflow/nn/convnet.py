"""ConvNet: the small coupling network of NICE, RealNVP and Glow here."""

import torch
from torch import Tensor, nn

from waveflow.context import total_context
from waveflow.padding import zero_padding


class ConvNet(nn.Module):
    """Three convolutions with ReLU between them (Glow, Kingma and Dhariwal 2018, section 3.3).

    The last one starts at zero, so that a new coupling is the identity.

    Args:
        in_channels: channels of x; 0 for a network that sees the condition alone.
        cond_channels: M, channels of the features.
        hidden_channels: channels between the convolutions.
        out_channels: channels of the result.
        kernel_size: odd width of the first and the last convolution; the middle one has 1.
    """

    def __init__(
        self,
        in_channels: int,
        cond_channels: int,
        hidden_channels: int,
        out_channels: int,
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        same = kernel_size // 2
        self.enter = nn.Conv1d(
            in_channels + cond_channels, hidden_channels, kernel_size, padding=same
        )
        self.middle = nn.Conv1d(hidden_channels, hidden_channels, 1)
        self.leave = nn.Conv1d(hidden_channels, out_channels, kernel_size, padding=same)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]
        self.context = total_context(self.enter, self.leave)

    def forward(self, x: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, Cp, L), features (B, M, L) and mask (B, 1, L) to (B, out_channels, L)."""
        h = self.enter(zero_padding(torch.cat([x, features], 1), mask)).relu()
        return self.leave(zero_padding(self.middle(h).relu(), mask))
