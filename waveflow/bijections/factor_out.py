"""FactorOut and OnChannels: a bijection of some of the channels."""

import torch
from torch import Tensor

from waveflow.bijections.base import Bijection, Condition, Rebuilt, Step


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

    def unroll(self, cond: Condition | None) -> list[Step]:
        return [Step(FactorOut(self.n, step), seen) for step, seen in self.rest.unroll(cond)]

    def opposite(self) -> Bijection:
        return FactorOut(self.n, self.rest.opposite())

    def rebuild(self, z: Tensor, cond: Condition | None = None) -> Rebuilt:
        early = z[:, : self.n].detach().requires_grad_()
        rest = self.rest.rebuild(z[:, self.n :], cond)

        def join(early: Tensor, *parts: Tensor) -> Tensor:
            return torch.cat([early, rest.join(*parts)], 1)

        with torch.enable_grad():
            z = torch.cat([early, rest.z], 1)
        return Rebuilt((early, *rest.parts), join, z, rest.log_det)


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

    def unroll(self, cond: Condition | None) -> list[Step]:
        steps = self.bijection.unroll(cond)
        return [Step(OnChannels(self.channels, step), seen) for step, seen in steps]

    def opposite(self) -> Bijection:
        return OnChannels(self.channels, self.bijection.opposite())

    def rebuild(self, z: Tensor, cond: Condition | None = None) -> Rebuilt:
        whole = z.detach().requires_grad_()
        inner = self.bijection.rebuild(z[:, self.channels], cond)

        def join(whole: Tensor, *parts: Tensor) -> Tensor:
            return self._replaced(whole, inner.join(*parts))

        with torch.enable_grad():
            z = self._replaced(whole, inner.z)
        return Rebuilt((whole, *inner.parts), join, z, inner.log_det)

    def _replaced(self, x: Tensor, part: Tensor) -> Tensor:
        x = x.clone()
        x[:, self.channels] = part
        return x
