"""Elementwise maps of a coupling: functions of (x, params) without weights of their own.

`params` is (B, n_params C, L), one block of C channels for each parameter. Both directions
return the result and the elementwise log-derivative of that direction, (B, C, L).
"""

import math
from typing import Protocol

import torch
from torch import Tensor


class ElementwiseMap(Protocol):
    """The map of a coupling.

    Attributes:
        n_params: parameters for each value that is mapped.
    """

    n_params: int

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]: ...

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]: ...


class Additive:
    """z = x + shift: volume is kept (NICE, Dinh et al. 2015, equation 9)."""

    n_params = 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return x + params, torch.zeros_like(x)

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return z - params, torch.zeros_like(z)

    def __repr__(self) -> str:
        return "Additive()"


class Affine:
    """z = x exp(log_scale) + shift; params hold (shift, log_scale), WaveGlow's order.

    (RealNVP, Dinh et al. 2017, equation 7; WaveGlow, Prenger et al. 2018, equations 5 to 8.)

    Args:
        bound: log-scales are bounded smoothly to (-bound, bound) by bound tanh(o / bound);
            None leaves them free, as WaveGlow does.
    """

    n_params = 2

    def __init__(self, bound: float | None = None) -> None:
        self.bound = bound

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._split(params)
        return x * log_scale.exp() + shift, log_scale

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._split(params)
        return (z - shift) * (-log_scale).exp(), -log_scale

    def initial(self, std: float) -> Tensor:
        """Parameters (2,) that bring values of this standard deviation to one."""
        log_scale = -math.log(std)
        if self.bound is not None:
            log_scale = self.bound * math.atanh(log_scale / self.bound)
        return torch.tensor([0.0, log_scale])

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor]:
        # exp in half precision loses the round trip, so never below float32.
        params = params.to(torch.promote_types(params.dtype, torch.float32))
        shift, log_scale = params.chunk(2, 1)
        if self.bound is not None:
            log_scale = self.bound * torch.tanh(log_scale / self.bound)
        return shift, log_scale

    def __repr__(self) -> str:
        return "Affine()" if self.bound is None else f"Affine(bound={self.bound:g})"
