"""CausalWaveNet: parameters of each sample from the samples before it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from waveflow.context import Context
from waveflow.decoding import Steps
from waveflow.padding import zero_padding


class CausalWaveNet(nn.Module):
    """Gated causal convolutions of width 2, dilations doubling (van den Oord et al. 2016).

    Of each layer's gate tanh(a) sigmoid(b) (equation 5, the features added before it) one
    projection goes on as a residual and one into the sum of skips; two layers with ReLU before
    each map the sum to the parameters, the last of which starts at zero.

    Args:
        channels: C of the signal.
        cond_channels: M, channels of the features.
        hidden_channels: of the residual path, the gates and the skips.
        out_channels: channels of the result.
        dilations: of the layers.
    """

    def __init__(
        self,
        channels: int,
        cond_channels: int,
        hidden_channels: int,
        out_channels: int,
        dilations: list[int],
    ) -> None:
        super().__init__()
        self.dilations = dilations
        width = hidden_channels
        self.enter = nn.Linear(channels, width)
        self.taps = nn.ModuleList(nn.Linear(2 * width, 2 * width) for _ in dilations)
        self.condition = nn.Linear(cond_channels, 2 * width * len(dilations), bias=False)
        self.res_skip = nn.ModuleList(nn.Linear(width, 2 * width) for _ in dilations)
        self.head = nn.Linear(width, width)
        self.leave = nn.Linear(width, out_channels)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        self.context = Context(sum(dilations) + 1, 0)

    def forward(
        self, x: Tensor, features: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x (B, C, L), features (B, M, L) and mask (B, 1, L) to (B, out_channels, L)."""
        conditions = self._conditions(x, features, mask)
        h, skips = self._entered(x, mask), torch.zeros(())
        for i, condition in enumerate(conditions):
            h, skips = self._layer(i, self._delayed(i, h), h, condition, skips)
        return self._result(skips).transpose(1, 2)

    def steps(
        self,
        like: Tensor,
        features: Tensor | None,
        mask: Tensor | None,
        past: Tensor | None = None,
    ) -> Steps:
        """Sample by sample: each layer keeps as many of its inputs as its dilation."""
        conditions = self._conditions(like, features, mask)
        queues: list[list[Tensor]] = [[] for _ in self.dilations]
        position = -1
        if past is not None:
            position += past.shape[2]
            first = None if mask is None else mask[:, :, : past.shape[2]]
            inputs = self._inputs(past, [c[:, : past.shape[2]] for c in conditions], first)
            queues = [
                list(h[:, -dilation:].split(1, 1))
                for h, dilation in zip(inputs, self.dilations, strict=True)
            ]

        def params_of_next(element: Tensor | None) -> Tensor:
            nonlocal position
            position += 1
            x = like.new_zeros(like[:, :, :1].shape) if element is None else element
            if mask is not None:
                x = zero_padding(x, mask[:, :, max(position - 1, 0), None])
            h, skips = self.enter(x.transpose(1, 2)), torch.zeros(())
            for i, (dilation, queue) in enumerate(zip(self.dilations, queues, strict=True)):
                queue.append(h)
                before = queue.pop(0) if len(queue) > dilation else torch.zeros_like(h)
                own = conditions[i][:, position, None]
                h, skips = self._layer(i, before, h, own, skips)
            return self._result(skips).transpose(1, 2)

        return params_of_next

    def _inputs(
        self, past: Tensor, conditions: Sequence[Tensor], mask: Tensor | None
    ) -> list[Tensor]:
        """The inputs (B, L, width) of the layers at the positions of past samples."""
        h, inputs = self._entered(past, mask), []
        for i, condition in enumerate(conditions):
            inputs.append(h)
            h, _ = self._layer(i, self._delayed(i, h), h, condition, torch.zeros(()))
        return inputs

    def _entered(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The first layer's input: at each position the sample before it."""
        return self.enter(F.pad(zero_padding(x, mask), (1, -1)).transpose(1, 2))

    def _delayed(self, i: int, h: Tensor) -> Tensor:
        return F.pad(h, (0, 0, self.dilations[i], 0))[:, : h.shape[1]]

    def _layer(
        self, i: int, before: Tensor, h: Tensor, condition: Tensor, skips: Tensor
    ) -> tuple[Tensor, Tensor]:
        a, b = (self.taps[i](torch.cat([before, h], 2)) + condition).chunk(2, 2)
        residual, skip = self.res_skip[i](a.tanh() * b.sigmoid()).chunk(2, 2)
        return h + residual, skips + skip

    def _result(self, skips: Tensor) -> Tensor:
        return self.leave(self.head(skips.relu()).relu())

    def _conditions(
        self, x: Tensor, features: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        """What the condition adds in each layer before the gate, (B, L, 2 width)."""
        if features is None:
            features = x.new_zeros(x.shape[0], 0, x.shape[2])
        added = self.condition(zero_padding(features, mask).transpose(1, 2))
        return added.chunk(len(self.dilations), 2)
