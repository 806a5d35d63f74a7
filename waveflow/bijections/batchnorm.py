"""BatchNorm: running mean and variance as a step of a flow."""

import torch
from torch import Tensor

from waveflow.bijections.actnorm import channel_moments
from waveflow.bijections.base import Bijection, Condition, check_channels, sum_log_det
from waveflow.context import Context


class BatchNorm(Bijection):
    """z = (x - m) / sqrt(v + eps), m and v running averages (RealNVP, Dinh et al. 2017, 3.7).

    The averages are those before the batch at hand, which moves them only afterwards. So they
    are constants of the batch, and the log-determinant is exact in training and in evaluation.
    (With the moments of the batch itself, as in a network's batch norm, it would not be.) The
    first batch in training mode starts them.

    Args:
        channels: C.
        momentum: weight of the batch at hand in the averages.
        eps: added to the variance.
    """

    context = Context()
    mean: Tensor
    variance: Tensor
    initialized: Tensor

    def __init__(self, channels: int, momentum: float = 0.05, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        check_channels(self, x, len(self.mean))
        if self.training and not self.initialized:
            self._move(x, cond, 1.0)
        shift, log_scale = self._constants()
        z = (x - shift) * log_scale.exp()
        if self.training:
            self._move(x, cond, self.momentum)
        return z, sum_log_det(log_scale.expand(x.shape), cond)

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        check_channels(self, z, len(self.mean))
        shift, log_scale = self._constants()
        return z * (-log_scale).exp() + shift, sum_log_det((-log_scale).expand(z.shape), cond)

    def _constants(self) -> tuple[Tensor, Tensor]:
        """m and -log sqrt(v + eps), (C, 1) each: copies, because the averages move in place."""
        return self.mean[:, None].clone(), -0.5 * (self.variance[:, None] + self.eps).log()

    @torch.no_grad()
    def _move(self, x: Tensor, cond: Condition | None, weight: float) -> None:
        mean, variance = channel_moments(x, None if cond is None else cond.mask)
        self.mean.lerp_(mean.to(self.mean.dtype), weight)
        self.variance.lerp_(variance.to(self.variance.dtype), weight)
        self.initialized.fill_(True)

    def extra_repr(self) -> str:
        return f"channels={len(self.mean)}"
