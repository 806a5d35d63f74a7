"""Squeeze: time into channels."""

from torch import Tensor

from waveflow.bijections.base import Bijection, Condition, zero_log_det
from waveflow.context import Context


class Squeeze(Bijection):
    """(B, C, L n) -> (B, C n, L): position t of channel c goes to channel c n + t mod n.

    A permutation of the signal, so the log-determinant is 0. On audio (C = 1) group l holds
    samples l n .. l n + n - 1, WaveGlow's squeeze (Prenger et al. 2018, section 2). `cond`
    is at the resolution after the squeeze and is left alone.

    Raises:
        ValueError: the length, or the channels of z, are not a multiple of n.
    """

    context = Context()

    def __init__(self, n: int) -> None:
        super().__init__()
        if n < 1:
            raise ValueError(f"Squeeze(n={n}): n must be 1 or more")
        self.n = self.factor = self.block = n

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        return squeeze(x, self.n), zero_log_det(x)

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        return unsqueeze(z, self.n), zero_log_det(z)

    def extra_repr(self) -> str:
        return f"n={self.n}"


def squeeze(x: Tensor, n: int) -> Tensor:
    """(B, C, L n) -> (B, C n, L) in the order of `Squeeze`."""
    batch, channels, length = x.shape
    if length % n:
        raise ValueError(f"cannot squeeze {length} positions by {n}: not a multiple")
    x = x.reshape(batch, channels, length // n, n).transpose(2, 3)
    return x.reshape(batch, channels * n, length // n)


def unsqueeze(z: Tensor, n: int) -> Tensor:
    """(B, C n, L) -> (B, C, L n), the inverse of `squeeze`."""
    batch, channels, length = z.shape
    if channels % n:
        raise ValueError(f"cannot unsqueeze {channels} channels by {n}: not a multiple")
    z = z.reshape(batch, channels // n, n, length).transpose(2, 3)
    return z.reshape(batch, channels // n, length * n)
