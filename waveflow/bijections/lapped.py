"""LappedSqueeze: time into frequency bands by an orthonormal lapped transform."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from waveflow.bijections.base import Bijection, Condition, full_precision, zero_log_det
from waveflow.buffers import ExactBuffers
from waveflow.context import Context
from waveflow.decoding import Kit


class LappedSqueeze(ExactBuffers, Bijection):
    """(B, 1, L n) -> (B, n, L): L blocks of n samples become L blocks of n bands.

    Plane rotations across every inner block edge (sine window, w^2 + reversed w^2 = 1), none
    at the two outer edges, then an orthonormal DCT-IV in each block. Both factors are
    orthonormal for every L >= 1, so the log-determinant is exactly 0; inside the signal it is
    the MDCT (Princen, Bradley 1986; Malvar 1992) of mirrored time, up to sign. Against a
    polyphase squeeze, in which every channel holds the whole spectrum aliased, each channel
    here is a frequency band: neighbours overlap, and networks run at the frame rate.

    An MDCT with zero padding at its ends is not orthonormal there; a wrong rotation sign is
    orthonormal but smears each band. In a padded batch (a mask in `cond`) no rotation crosses
    an item's last valid edge.

    Args:
        n: samples in a block = bands; even.
        quadrature: the transform in quadrature, rotations of the opposite sign and then a
            DST-IV: with the plain one it gives amplitude and phase of a signal in each band.

    Raises:
        ValueError: n is odd, or the signal's shape does not fit.
    """

    def __init__(self, n: int, quadrature: bool = False) -> None:
        super().__init__()
        if n < 2 or n % 2:
            raise ValueError(f"a lapped squeeze needs an even block length, not {n}")
        self.n = self.factor = self.block = n
        self.quadrature = quadrature
        self.context = Context(n, n)
        cosine, sine = _edge_rotation(n)
        self.transform = BlockTransform(n, quadrature)
        self.register_exact("cosine", cosine)
        self.register_exact("sine", -sine if quadrature else sine)

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        batch, channels, length = x.shape
        if channels != 1 or length % self.n:
            raise ValueError(
                f"LappedSqueeze({self.n}) takes (B, 1, T) with T a multiple of {self.n}, "
                f"not {tuple(x.shape)}"
            )
        blocks = self._rotate(x.reshape(batch, length // self.n, self.n), cond, sign=1)
        return self.transform(blocks).transpose(1, 2), zero_log_det(x)

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        if z.shape[1] != self.n:
            raise ValueError(f"LappedSqueeze({self.n}) makes {self.n} bands, not {z.shape[1]}")
        blocks = self._rotate(self.transform(z.transpose(1, 2)), cond, sign=-1)
        return blocks.reshape(z.shape[0], 1, -1), zero_log_det(z)

    def _rotate(self, blocks: Tensor, cond: Condition | None, sign: int) -> Tensor:
        """Rotates the pairs (edge + i, edge - 1 - i) at each inner edge; sign -1 undoes it."""
        half = self.n // 2
        head, tail = blocks[..., :half], blocks[..., half:].flip(-1)
        cosine, sine = self.exact("cosine", blocks), sign * self.exact("sine", blocks)
        after, before = head[:, 1:], tail[:, :-1]
        rotated = cosine * after + sine * before, cosine * before - sine * after
        if cond is not None and cond.mask is not None:
            inner = cond.mask[:, 0, 1:, None] != 0
            # Selected, not multiplied: padding may hold NaN.
            rotated = (
                torch.where(inner, rotated[0], after),
                torch.where(inner, rotated[1], before),
            )
        head = torch.cat([head[:, :1], rotated[0]], 1)
        tail = torch.cat([rotated[1], tail[:, -1:]], 1)
        return torch.cat([head, tail.flip(-1)], -1)

    def extra_repr(self) -> str:
        return f"n={self.n}" + (", quadrature=True" if self.quadrature else "")


class BlockTransform(ExactBuffers):
    """The orthonormal DCT-IV, or DST-IV, of every block (B, L, n), which is its own inverse."""

    matrix: Tensor

    def __init__(self, n: int, sine: bool) -> None:
        super().__init__()
        self.register_exact("matrix", _type_four(n, sine))

    def forward(self, blocks: Tensor) -> Tensor:
        with full_precision(blocks):
            return blocks @ self.exact("matrix", blocks)

    def for_decoding(self, kit: Kit) -> nn.Module:
        """A product with the matrix, which is symmetric."""
        return kit.linear(self.matrix)


def _type_four(n: int, sine: bool) -> NDArray[np.float64]:
    """The orthonormal DCT-IV (or DST-IV) matrix (n, n), symmetric and its own inverse."""
    k = np.arange(n) + 0.5
    angle = math.pi / n * np.outer(k, k)
    return (np.sin(angle) if sine else np.cos(angle)) * math.sqrt(2 / n)


def _edge_rotation(n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cosine and sine (n / 2,) of the rotation at distance i from an edge: the sine window."""
    i = np.arange(n // 2)
    angle = math.pi / 4 * (1 + (2 * i + 1) / n)
    return np.sin(angle), np.cos(angle)
