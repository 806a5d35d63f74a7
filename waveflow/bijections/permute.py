"""Permute and Reverse: a fixed order of the channels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from waveflow.bijections.base import Bijection, Condition, check_channels, zero_log_det
from waveflow.context import Context


class Permute(Bijection):
    """Channel i of the output is channel order[i] of the input; log-determinant 0.

    Raises:
        ValueError: `order` is no permutation of 0..C-1, or the signal has not C channels.
    """

    context = Context()
    order: Tensor
    inverse_order: Tensor

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        if sorted(order) != list(range(len(order))):
            raise ValueError(f"not a permutation of 0..{len(order) - 1}: {list(order)}")
        self.register_buffer("order", torch.tensor(order))
        self.register_buffer("inverse_order", torch.argsort(torch.tensor(order)))

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        check_channels(self, x, len(self.order))
        return x[:, self.order], zero_log_det(x)

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        check_channels(self, z, len(self.order))
        return z[:, self.inverse_order], zero_log_det(z)

    def extra_repr(self) -> str:
        return f"{self.order.tolist()}"


class Reverse(Permute):
    """The channels in the opposite order."""

    def __init__(self, channels: int) -> None:
        super().__init__(range(channels - 1, -1, -1))

    def extra_repr(self) -> str:
        return f"channels={len(self.order)}"
