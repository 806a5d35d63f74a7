"""ActNorm: a scale and a shift for each channel, started from data."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from waveflow.bijections.base import Bijection, Condition, check_channels, sum_log_det
from waveflow.context import Context
from waveflow.padding import zero_padding


class ActNorm(Bijection):
    """z = (x + b) exp(s) for each channel; log-determinant L sum(s).

    The first batch in training mode sets b and s so that its z has mean 0 and variance 1
    (Kingma, Dhariwal 2018, section 3.1); a saved buffer remembers it. Where several processes
    share a batch, they count its mean and variance together.

    Raises:
        ValueError: the signal has another number of channels.
    """

    context = Context()
    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        check_channels(self, x, len(self.shift))
        if self.training and not self.initialized:
            self._start(x, cond)
        z = (x + self.shift[:, None]) * self.log_scale.exp()[:, None]
        return z, self._log_det(x, cond, sign=1)

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        check_channels(self, z, len(self.shift))
        x = z * (-self.log_scale).exp()[:, None] - self.shift[:, None]
        return x, self._log_det(z, cond, sign=-1)

    def _log_det(self, x: Tensor, cond: Condition | None, sign: int) -> Tensor:
        per_position = sign * self.log_scale[None, :, None].expand(x.shape)
        return sum_log_det(per_position, cond)

    @torch.no_grad()
    def _start(self, x: Tensor, cond: Condition | None) -> None:
        mean, variance = channel_moments(x, None if cond is None else cond.mask)
        self.shift.copy_(-mean)
        self.log_scale.copy_(-0.5 * variance.clamp_min(1e-8).log())
        self.initialized.fill_(True)

    def extra_repr(self) -> str:
        return f"channels={len(self.shift)}"


def channel_moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of x (B, C, L) over the valid positions of all processes."""
    weight = torch.ones_like(x[:, :1]) if mask is None else mask.to(x.dtype)
    total = _all_sum(weight.sum())
    mean = _all_sum(zero_padding(x, mask).sum((0, 2))) / total
    centred = zero_padding(x - mean[:, None], mask)
    return mean, _all_sum(centred.square().sum((0, 2))) / total


def _all_sum(values: Tensor) -> Tensor:
    """The sum over the processes of a training, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values
