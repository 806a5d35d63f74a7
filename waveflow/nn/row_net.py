"""RowNet: WaveFlow's network, causal over the rows of a squeezed signal."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from waveflow.context import Context
from waveflow.decoding import Steps
from waveflow.padding import zero_padding


class RowNet(nn.Module):
    """Gated dilated 2-D convolutions over rows and positions (WaveFlow, Ping et al. 2020).

    The H channels of the signal are rows of an image (section 3.1). A row's parameters see the
    rows above it at positions on both sides: the image is shifted down by one row, and each
    convolution looks at the row and the `kernel_size - 1` rows above, `height_dilations` apart,
    and at positions on both sides, 2^i apart in layer i. The last layer starts at zero.

    Args:
        rows: H.
        cond_channels: M, channels of the features, the same for all rows of a position.
        hidden_channels: of the residual path, the gates and the skips.
        n_params: parameters for each value.
        height_dilations: one for each layer.
        kernel_size: odd width in both directions.
    """

    def __init__(
        self,
        rows: int,
        cond_channels: int,
        hidden_channels: int,
        n_params: int,
        height_dilations: list[int],
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        self.height_dilations = height_dilations
        self.reach = kernel_size - 1
        width, n_layers = hidden_channels, len(height_dilations)
        self.enter = nn.Conv2d(1, width, 1)
        self.taps = nn.ModuleList(
            nn.Conv2d(
                width,
                2 * width,
                kernel_size,
                dilation=(down, 2**i),
                padding=(0, 2**i * self.reach // 2),
            )
            for i, down in enumerate(height_dilations)
        )
        self.condition = nn.Linear(cond_channels, 2 * width * n_layers, bias=False)
        self.res_skip = nn.ModuleList(nn.Conv2d(width, 2 * width, 1) for _ in height_dilations)
        self.leave = nn.Conv2d(width, n_params, 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]
        side = sum(2**i * self.reach // 2 for i in range(n_layers))
        self.context = Context(side, side)

    def forward(
        self, x: Tensor, features: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x (B, H, L), features (B, M, L) and mask (B, 1, L) to (B, n_params H, L)."""
        image = zero_padding(F.pad(x, (0, 0, 1, -1)), mask)[:, None]
        h, skips = self._entered(image, mask), torch.zeros(())
        for i, condition in enumerate(self._conditions(x, features, mask)):
            window = F.pad(h, (0, 0, self.reach * self.height_dilations[i], 0))
            h, skips = self._layer(i, window, h, condition, skips, mask)
        return self.leave(skips.relu()).flatten(1, 2)

    def steps(self, like: Tensor, features: Tensor | None, mask: Tensor | None) -> Steps:
        """Row by row: each layer keeps the rows above that its convolution sees."""
        conditions = self._conditions(like, features, mask)
        kept: list[list[Tensor]] = [[] for _ in self.height_dilations]

        def params_of_next(element: Tensor | None) -> Tensor:
            row = torch.zeros_like(like[:, :1]) if element is None else element
            h, skips = self._entered(zero_padding(row, mask)[:, None], mask), torch.zeros(())
            for i, (down, rows) in enumerate(zip(self.height_dilations, kept, strict=True)):
                rows.append(h)
                n = self.reach * down + 1
                missing = [torch.zeros_like(h)] * (n - len(rows))
                window = torch.cat([*missing, *rows[-n:]], 2)
                h, skips = self._layer(i, window, h, conditions[i], skips, mask)
            return self.leave(skips.relu()).flatten(1, 2)

        return params_of_next

    def _entered(self, image: Tensor, mask: Tensor | None) -> Tensor:
        return _zero_columns(self.enter(image), mask)

    def _layer(
        self,
        i: int,
        window: Tensor,
        h: Tensor,
        condition: Tensor,
        skips: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        a, b = (self.taps[i](window) + condition[:, :, None]).chunk(2, 1)
        residual, skip = self.res_skip[i](a.tanh() * b.sigmoid()).chunk(2, 1)
        return _zero_columns(h + residual, mask), skips + skip

    def _conditions(
        self, x: Tensor, features: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        """What the condition adds in each layer before the gate, (B, 2 width, L)."""
        if features is None:
            features = x.new_zeros(x.shape[0], 0, x.shape[2])
        added = self.condition(zero_padding(features, mask).transpose(1, 2)).transpose(1, 2)
        return added.chunk(len(self.height_dilations), 1)


def _zero_columns(image: Tensor, mask: Tensor | None) -> Tensor:
    return image if mask is None else zero_padding(image, mask[:, :, None])
