"""FactorOut and OnChannels: a bijection of some of the channels."""

import torch
from torch import Tensor

from waveflow.bijections.base import Bijection, Condition
from waveflow.context import Context, context_of


class FactorOut(Bijection):
    """The first `n` channels leave as they are; `rest` acts on the others.

    All are concatenated again, so that it is a bijection with one latent of the signal's
    size, and nesting gives the multi-scale flows of RealNVP, Glow and WaveGlow (Prenger et
    al. 2018, section 2.3).

    Raises:
        ValueError: no channel is left for `rest`, or `rest` changes the signal's shape.
    """

    def __init__(self, n: int, rest: Bijection) -> None:
        super().__init__()
        self.n = n
        self.rest = rest

    @property
    def block(self) -> int:  # type: ignore[override]
        return self.rest.block

    @property
    def context(self) -> Context:
        return context_of(self.rest)

    @property
    def inverse_context(self) -> Context:
        return self.rest.inverse_context

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        early, rest = self._split(x)
        out, log_det = self.rest(rest, cond)
        return _joined(self, early, rest, out), log_det

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        early, rest = self._split(z)
        out, log_det = self.rest.inverse(rest, cond)
        return _joined(self, early, rest, out), log_det

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not 0 < self.n < x.shape[1]:
            raise ValueError(f"FactorOut(n={self.n}) takes n of {x.shape[1]} channels out")
        return x[:, : self.n], x[:, self.n :]

    def extra_repr(self) -> str:
        return f"n={self.n}"


class OnChannels(Bijection):
    """`bijection` acts on the channels of a slice; the others stay where and as they are.

    Raises:
        ValueError: `bijection` changes the shape of its channels.
    """

    def __init__(self, channels: slice, bijection: Bijection) -> None:
        super().__init__()
        self.channels = channels
        self.bijection = bijection

    @property
    def block(self) -> int:  # type: ignore[override]
        return self.bijection.block

    @property
    def context(self) -> Context:
        return context_of(self.bijection)

    @property
    def inverse_context(self) -> Context:
        return self.bijection.inverse_context

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        part, log_det = self.bijection(x[:, self.channels], cond)
        return self._replaced(x, part), log_det

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        part, log_det = self.bijection.inverse(z[:, self.channels], cond)
        return self._replaced(z, part), log_det

    def _replaced(self, x: Tensor, part: Tensor) -> Tensor:
        _check_same_shape(self, x[:, self.channels], part)
        x = x.clone()
        x[:, self.channels] = part
        return x

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


def _joined(bijection: Bijection, early: Tensor, rest: Tensor, out: Tensor) -> Tensor:
    _check_same_shape(bijection, rest, out)
    return torch.cat([early, out], 1)


def _check_same_shape(bijection: Bijection, before: Tensor, after: Tensor) -> None:
    if before.shape != after.shape:
        raise ValueError(
            f"the inner bijection of {type(bijection).__name__} makes {tuple(after.shape)} of "
            f"{tuple(before.shape)}: if it squeezes, end it with the inverse squeeze"
        )
