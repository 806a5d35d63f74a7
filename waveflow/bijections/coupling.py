"""Coupling: one part of the channels conditions the map of the other."""

from typing import Protocol

import torch
from torch import Tensor, nn

from waveflow.bijections.base import Bijection, Condition, Rebuilt, sum_log_det
from waveflow.bijections.elementwise import ElementwiseMap, InverseMap


class Split(Protocol):
    """Which channels are passive (seen by the network) and which are active (mapped)."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def merge(self, passive: Tensor, active: Tensor) -> Tensor: ...


class Halves:
    """The first half is passive, the second active (WaveGlow); `swap` exchanges the roles."""

    def __init__(self, swap: bool = False) -> None:
        self.swap = swap

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.chunk(2, 1)
        return (second, first) if self.swap else (first, second)

    def merge(self, passive: Tensor, active: Tensor) -> Tensor:
        return torch.cat([active, passive] if self.swap else [passive, active], 1)


class EvenOdd:
    """Even channels are passive, odd ones active; `swap` exchanges the roles."""

    def __init__(self, swap: bool = False) -> None:
        self.swap = swap

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        even, odd = x[:, 0::2], x[:, 1::2]
        return (odd, even) if self.swap else (even, odd)

    def merge(self, passive: Tensor, active: Tensor) -> Tensor:
        even, odd = (active, passive) if self.swap else (passive, active)
        # Interleaved on the transposed view, so that (B, L, C) memory stays as it is.
        both = torch.stack([even.transpose(1, 2), odd.transpose(1, 2)], -1)
        return both.flatten(2).transpose(1, 2)


class AllActive:
    """No channel is passive: the map depends on the condition alone."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :0], x

    def merge(self, passive: Tensor, active: Tensor) -> Tensor:
        return active


class Coupling(Bijection):
    """active -> map(active; network(passive, cond)), passive stays.

    The Jacobian is triangular, so its log-determinant is the sum of the map's elementwise
    log-derivatives (NICE, Dinh et al. 2015, section 3). With `AllActive` it is an elementwise
    map that only the condition steers: a conditional Gaussian base, x = mean + std u, written
    as a step of the flow, is the same density.

    Args:
        network: `network(passive (B, Cp, L), features, mask) -> params (B, n Ca, L)`.
        map: the elementwise map and its number n of parameters.
        split: which channels are which.
    """

    def __init__(self, network: nn.Module, map: ElementwiseMap, split: Split) -> None:
        super().__init__()
        self.network = network
        self.map = map
        self.split = split

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        passive, active = self.split.split(x)
        active, log_det = self.map.forward(active, self._params(passive, cond))
        return self.split.merge(passive, active), sum_log_det(log_det, cond)

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        passive, active = self.split.split(z)
        active, log_det = self.map.inverse(active, self._params(passive, cond))
        return self.split.merge(passive, active), sum_log_det(log_det, cond)

    def opposite(self) -> Bijection:
        return Coupling(self.network, InverseMap(self.map), self.split)

    def rebuild(self, z: Tensor, cond: Condition | None = None) -> Rebuilt:
        """One evaluation of the network serves both: the passive part is the same before."""
        passive, active = (part.detach() for part in self.split.split(z))
        passive.requires_grad_()
        with torch.enable_grad():
            params = self._params(passive, cond)
            active = self.map.inverse(active, params.detach())[0].requires_grad_()
            mapped, log_det = self.map.forward(active, params)
            z = self.split.merge(passive, mapped)
            log_det = sum_log_det(log_det, cond)
        return Rebuilt((passive, active), self.split.merge, z, log_det)

    def _params(self, passive: Tensor, cond: Condition | None) -> Tensor:
        features, mask = (None, None) if cond is None else cond
        return self.network(passive, features, mask)
