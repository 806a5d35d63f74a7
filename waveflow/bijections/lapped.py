"""LappedSqueeze: time into frequency bands by an orthonormal lapped transform."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from waveflow.bijections.base import Bijection, Condition, full_precision, zero_log_det


class LappedSqueeze(Bijection):
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
    """

    # Blocks on each side that a block of the result depends on.
    reach = 1

    def __init__(self, n: int, quadrature: bool = False) -> None:
        super().__init__()
        if n % 2:
            raise ValueError(f"a lapped squeeze needs an even block length, not {n}")
        self.n = n
        self.quadrature = quadrature

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
        blocks = self._rotate(self.transform(z.transpose(1, 2)), cond, sign=-1)
        return blocks.reshape(z.shape[0], 1, -1), zero_log_det(z)

    def matrix(self, like: Tensor) -> Tensor:
        """What transforms a block, (n, n), symmetric, of the type and device of `like`."""
        return _type_four(self.n, self.quadrature, like.dtype, like.device)

    def rotation(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (n / 2,) of the rotation at distance i from an edge."""
        cosine, sine = _edge_rotation(self.n, like.dtype, like.device)
        return cosine, -sine if self.quadrature else sine

    def transform(self, blocks: Tensor) -> Tensor:
        """Each block (B, L, n) into bands or back."""
        with full_precision(blocks):
            return blocks @ self.matrix(blocks)

    def _rotate(self, blocks: Tensor, cond: Condition | None, sign: int) -> Tensor:
        """Rotates the pairs (edge + i, edge - 1 - i) at each inner edge; sign -1 undoes it."""
        half = self.n // 2
        head, tail = blocks[..., :half], blocks[..., half:].flip(-1)
        cosine, sine = self.rotation(blocks)
        sine = sign * sine
        if cond is not None and cond.mask is not None:
            inner = cond.mask[:, 0, 1:, None].to(blocks.dtype)
            cosine, sine = 1 + inner * (cosine - 1), inner * sine
        after, before = head[:, 1:], tail[:, :-1]
        head = torch.cat([head[:, :1], cosine * after + sine * before], 1)
        tail = torch.cat([cosine * before - sine * after, tail[:, -1:]], 1)
        return torch.cat([head, tail.flip(-1)], -1)


@lru_cache(maxsize=16)
def _type_four(n: int, sine: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal DCT-IV (or DST-IV) matrix (n, n), symmetric and its own inverse.

    Built for each dtype from float64, so that a model cast to double is orthonormal to 1e-12.
    """
    with torch.inference_mode(False):
        k = torch.arange(n, dtype=torch.float64) + 0.5
        angle = math.pi / n * torch.outer(k, k)
        matrix = (angle.sin() if sine else angle.cos()) * math.sqrt(2 / n)
        return matrix.to(device=device, dtype=dtype)


@lru_cache(maxsize=16)
def _edge_rotation(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine (n / 2,) of the rotation at distance i from an edge: the sine window."""
    with torch.inference_mode(False):
        i = torch.arange(n // 2, dtype=torch.float64)
        angle = math.pi / 4 * (1 + (2 * i + 1) / n)
        return (
            angle.sin().to(device=device, dtype=dtype),
            angle.cos().to(device=device, dtype=dtype),
        )
