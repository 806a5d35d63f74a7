"""InvertibleConv1x1: a learned mixing of the channels, free or by its PLU factors."""

import torch
from torch import Tensor, nn

from waveflow.bijections.base import (
    Bijection,
    Condition,
    check_channels,
    full_precision,
    sum_log_det,
)
from waveflow.context import Context
from waveflow.decoding import Kit


class InvertibleConv1x1(Bijection):
    """z = W x at every position; log-determinant L log|det W| (Kingma, Dhariwal 2018, 3.2).

    Never computed below float32. `inverse` inverts W in float64 at each call, because the
    weights may have changed; a decoder inverts it once (`for_decoding`).

    Args:
        channels: C.
        start: "orthogonal" (random, determinant +1, as in the paper) or "identity".

    Raises:
        ValueError: another start, or a signal of another number of channels.
    """

    context = Context()

    def __init__(self, channels: int, start: str = "orthogonal") -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(_start_matrix(channels, start))

    def matrix(self) -> Tensor:
        """W, (C, C)."""
        return self.weight

    def inverted(self) -> Tensor:
        """W^-1, (C, C), computed in float64."""
        matrix = self.matrix()
        return torch.linalg.inv(matrix.double()).to(matrix.dtype)

    def log_abs_det(self) -> Tensor:
        """log|det W|, a scalar."""
        # slogdet, because logdet is NaN for a negative determinant.
        return torch.linalg.slogdet(self.weight)[1]

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        check_channels(self, x, self.channels)
        return _mix(self.matrix(), x), _sum(self.log_abs_det(), x, cond)

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        check_channels(self, z, self.channels)
        return _mix(self.inverted(), z), _sum(-self.log_abs_det(), z, cond)

    def for_decoding(self, kit: Kit) -> nn.Module:
        """A product with the inverse, which is computed once."""
        return _Inverted(self, kit)

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


class InvertibleConv1x1PLU(InvertibleConv1x1):
    """The same with W = P L (U + diag(s)), P fixed: log|det W| is the sum of log|s|.

    Glow's cheaper form (Kingma, Dhariwal 2018, equation 10); it cannot become singular.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int, start: str = "orthogonal") -> None:
        super().__init__(channels, start)
        permutation, lower, upper = torch.linalg.lu(self.weight.detach())
        diagonal = upper.diagonal()
        del self.weight
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", diagonal.sign())
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_diagonal = nn.Parameter(diagonal.abs().log())

    def matrix(self) -> Tensor:
        identity = torch.eye(len(self.sign), dtype=self.lower.dtype, device=self.lower.device)
        lower = self.lower.tril(-1) + identity
        upper = self.upper.triu(1) + torch.diag(self.sign * self.log_diagonal.exp())
        with full_precision(lower):
            return self.permutation @ lower @ upper

    def log_abs_det(self) -> Tensor:
        return self.log_diagonal.sum()

    for_decoding = InvertibleConv1x1.for_decoding


class _Inverted(Bijection):
    """An invertible 1x1 convolution whose inverse is computed once, for `inverse` alone."""

    context = Context()
    log_abs_det: Tensor

    @torch.no_grad()
    def __init__(self, convolution: InvertibleConv1x1, kit: Kit) -> None:
        super().__init__()
        self.linear = kit.linear(convolution.inverted())
        self.register_buffer("log_abs_det", convolution.log_abs_det())

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        return self.linear(z.transpose(1, 2)).transpose(1, 2), _sum(-self.log_abs_det, z, cond)


def _mix(matrix: Tensor, x: Tensor) -> Tensor:
    # On the transposed view: frame-rate signals lie in memory as (B, L, C).
    with full_precision(x):
        return torch.matmul(x.to(matrix.dtype).transpose(1, 2), matrix.T).transpose(1, 2)


def _sum(log_abs_det: Tensor, x: Tensor, cond: Condition | None) -> Tensor:
    return sum_log_det(log_abs_det.expand(x.shape[0], 1, x.shape[2]), cond)


def _start_matrix(channels: int, start: str) -> Tensor:
    if start == "identity":
        return torch.eye(channels)
    if start != "orthogonal":
        raise ValueError(f"start must be 'orthogonal' or 'identity', not {start!r}")
    matrix = torch.linalg.qr(torch.randn(channels, channels))[0].contiguous()
    matrix[:, 0] *= torch.linalg.det(matrix).sign()
    return matrix
