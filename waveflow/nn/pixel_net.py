"""PixelNet: parameters of each sample from masked convolutions over a squeezed waveform."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from waveflow.context import Context


class PixelNet(nn.Module):
    """Masked 2-D convolutions in raster order (PixelCNN, van den Oord et al. 2016, section 3.4).

    The image is the squeezed waveform: row l holds samples l n .. l n + n - 1, so raster order is
    the order in time. A kernel of k x k pixels is masked: of it stay the rows above and what lies
    to the left in the same row, and the pixel itself only after the first layer (mask A there,
    mask B after it). Here the end of a row meets the beginning of the next, so that the first
    sample of a row sees the one before it. Then the pixel r rows above and c columns to the right
    lies r n - c samples back, and a masked convolution is a causal one with these lags.

    The first kernel is 7 x 7. Layers of 3 x 3 follow, with the gate and the features of the
    conditional PixelCNN (van den Oord et al. 2016 b, equation 4) and a residual. The last layer
    starts at zero.

    Args:
        row: n, samples in a row, at least 4.
        cond_channels: M, channels of the features.
        hidden_channels: of the residual path.
        n_params: parameters for each sample.
        n_layers: layers of 3 x 3.
    """

    lags_a: Tensor
    lags_b: Tensor

    def __init__(
        self, row: int, cond_channels: int, hidden_channels: int, n_params: int, n_layers: int
    ) -> None:
        super().__init__()
        width = hidden_channels
        self.register_buffer("lags_a", mask_a(row, 7), persistent=False)
        self.register_buffer("lags_b", mask_b(row, 3), persistent=False)
        self.enter = nn.Linear(len(self.lags_a), width)
        self.taps = nn.ModuleList(
            nn.Linear(len(self.lags_b) * width, 2 * width) for _ in range(n_layers)
        )
        self.condition = nn.Linear(cond_channels, 2 * width * n_layers, bias=False)
        self.residual = nn.ModuleList(nn.Linear(width, width) for _ in range(n_layers))
        self.head = nn.Linear(width, width)
        self.leave = nn.Linear(width, n_params)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        self.context = Context(int(self.lags_a.max() + n_layers * self.lags_b.max()), 0)

    def forward(
        self, x: Tensor, features: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x (B, 1, T) and features (B, M, T) to (B, n_params, T).

        No mask is needed: padding comes last, and a causal network never looks there.
        """
        conditions = self._conditions(x, features)
        return self._result(self._inputs(x, conditions)[-1]).transpose(1, 2)

    def steps(
        self,
        like: Tensor,
        features: Tensor | None,
        mask: Tensor | None,
        past: Tensor | None = None,
    ) -> Callable[[Tensor | None], Tensor]:
        """Sample by sample: each layer keeps as much of its input as its lags reach."""
        conditions = self._conditions(like, features)
        past = like[:, :, :0] if past is None else past
        position = past.shape[2]
        lags = [self.lags_a] + [self.lags_b] * len(self.taps)
        sizes = [int(of_layer.max()) + 1 for of_layer in lags]
        # Of the input at a time t, place t modulo its size.
        kept = []
        for size, h in zip(sizes, self._inputs(past, conditions[:, :position]), strict=False):
            times = torch.arange(max(position - size, 0), position)
            kept.append(h.new_zeros(len(h), size, h.shape[2]))
            kept[-1][:, times % size] = h[:, times]

        def params_of_next(element: Tensor | None) -> Tensor:
            nonlocal position
            if element is not None:
                kept[0][:, (position - 1) % sizes[0]] = element[:, 0]
            h = self.enter(kept[0][:, (position - self.lags_a) % sizes[0]].flatten(1))
            seen = (position - self.lags_b) % sizes[-1]
            for i in range(len(self.taps)):
                kept[i + 1][:, position % sizes[-1]] = h
                h = self._layer(i, kept[i + 1][:, seen].flatten(1), h, conditions[:, position, i])
            position += 1
            return self._result(h)[:, :, None]

        return params_of_next

    def _inputs(self, x: Tensor, conditions: Tensor) -> list[Tensor]:
        """The inputs (B, T, width) of all layers and the result of the last."""
        inputs = [x.transpose(1, 2)]
        h = self.enter(_seen(inputs[0], self.lags_a))
        for i in range(len(self.taps)):
            inputs.append(h)
            h = self._layer(i, _seen(h, self.lags_b), h, conditions[:, :, i])
        return [*inputs, h]

    def _layer(self, i: int, seen: Tensor, h: Tensor, condition: Tensor) -> Tensor:
        a, b = (self.taps[i](seen) + condition).chunk(2, -1)
        return h + self.residual[i](a.tanh() * b.sigmoid())

    def _result(self, h: Tensor) -> Tensor:
        return self.leave(self.head(h.relu()).relu())

    def _conditions(self, x: Tensor, features: Tensor | None) -> Tensor:
        """What the features add in each layer before the gate, (B, T, layers, 2 width)."""
        if features is None:
            features = x.new_zeros(x.shape[0], 0, x.shape[2])
        added = self.condition(features.transpose(1, 2))
        return added.unflatten(2, (len(self.taps), -1 if len(self.taps) else 0))


def mask_a(row: int, kernel_size: int) -> Tensor:
    """How many samples back the pixels lie that mask A leaves of a kernel, in ascending order."""
    reach = kernel_size // 2
    lags = {r * row - c for r in range(reach + 1) for c in range(-reach, reach + 1)}
    return torch.tensor(sorted(lag for lag in lags if lag > 0))


def mask_b(row: int, kernel_size: int) -> Tensor:
    """The same of mask B, which leaves the pixel itself too."""
    return torch.cat([torch.zeros(1, dtype=torch.long), mask_a(row, kernel_size)])


def _seen(h: Tensor, lags: Tensor) -> Tensor:
    """h (B, T, C) at each of the lags (K,) before a sample, zeros before the first, (B, T, K C)."""
    shifted = [F.pad(h, (0, 0, lag, 0))[:, : h.shape[1]] for lag in lags.tolist()]
    return torch.cat(shifted, 2)
