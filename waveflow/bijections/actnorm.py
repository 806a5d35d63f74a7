"""ActNorm: a scale and a shift for each channel, started from data."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from waveflow.bijections.base import Bijection, Condition, sum_log_det


class ActNorm(Bijection):
    """z = (x + b) exp(s) for each channel; log-determinant L sum(s).

    The first batch in training mode sets b and s so that its z has mean 0 and variance 1
    (Kingma, Dhariwal 2018, section 3.1). That it happened is a saved buffer. Where a batch is
    spread over processes, it is all of it that has this mean and variance.
    """

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        if self.training and not self.initialized:
            self._start(x, cond)
        z = (x + self.shift[:, None]) * self.log_scale.exp()[:, None]
        return z, self._log_det(x, cond, sign=1)

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        x = z * (-self.log_scale).exp()[:, None] - self.shift[:, None]
        return x, self._log_det(z, cond, sign=-1)

    def _log_det(self, x: Tensor, cond: Condition | None, sign: int) -> Tensor:
        per_position = sign * self.log_scale[None, :, None].expand(x.shape)
        return sum_log_det(per_position, cond)

    @torch.no_grad()
    def _start(self, x: Tensor, cond: Condition | None) -> None:
        weight = torch.ones_like(x[:, :1])
        if cond is not None and cond.mask is not None:
            weight = cond.mask.to(x.dtype)
        total = _all_sum(weight.sum())
        mean = _all_sum((x * weight).sum((0, 2))) / total
        variance = _all_sum(((x - mean[:, None]).square() * weight).sum((0, 2))) / total
        self.shift.copy_(-mean)
        self.log_scale.copy_(-0.5 * variance.clamp_min(1e-8).log())
        self.initialized.fill_(True)


def _all_sum(values: Tensor) -> Tensor:
    """The sum over the processes of a training, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
