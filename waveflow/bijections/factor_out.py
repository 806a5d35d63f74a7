"""FactorOut and OnChannels: a bijection of some of the channels."""

import torch
from torch import Tensor

from waveflow.bijections.base import Bijection, Condition


class FactorOut(Bijection):
    """The first `n` channels leave as they are; `rest` acts on the others.

    All are concatenated again, so that it is a bijection with one latent of the signal's
    size, and nesting gives the multi-scale flows of RealNVP, Glow and WaveGlow (Prenger et
    al. 2018, section 2.3).
    """

    def __init__(self, n: int, rest: Bijection) -> None:
        super().__init__()
        self.n = n
        self.rest = rest

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        out, log_det = self.rest(x[:, self.n :], cond)
        return torch.cat([x[:, : self.n], out], 1), log_det

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        rest, log_det = self.rest.inverse(z[:, self.n :], cond)
        return torch.cat([z[:, : self.n], rest], 1), log_det


class OnChannels(Bijection):
    """`bijection` acts on the channels of a slice, the others stay where and as they are."""

    def __init__(self, channels: slice, bijection: Bijection) -> None:
        super().__init__()
        self.channels = channels
        self.bijection = bijection

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        part, log_det = self.bijection(x[:, self.channels], cond)
        return self._replaced(x, part), log_det

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        part, log_det = self.bijection.inverse(z[:, self.channels], cond)
        return self._replaced(z, part), log_det

    def _replaced(self, x: Tensor, part: Tensor) -> Tensor:
        x = x.clone()
        x[:, self.channels] = part
        return x
