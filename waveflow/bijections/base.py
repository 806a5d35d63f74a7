"""The contract that every bijection keeps, and the condition that steers them.

A reader who knows this page can read every file of the package.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Condition(NamedTuple):
    """What steers a flow: features and the valid positions of each item.

    Attributes:
        features: (B, M, L), at the resolution of the signal at this place of the chain.
        mask: (B, 1, L), 1 where a position belongs to its item and 0 in the padding of a
            batch of unequal lengths; None where every position is valid.
    """

    features: Tensor
    mask: Tensor | None = None

    def crop(self, n_positions: int) -> "Condition":
        """The first `n_positions` positions."""
        mask = None if self.mask is None else self.mask[..., :n_positions]
        return Condition(self.features[..., :n_positions], mask)

    def repeat(self, times: int) -> "Condition":
        """The whole batch, `times` times over: (times B, M, L)."""
        mask = None if self.mask is None else self.mask.repeat(times, 1, 1)
        return Condition(self.features.repeat(times, 1, 1), mask)


class Bijection(nn.Module):
    """An invertible map of (B, C, L) signals whose Jacobian's log-determinant is known.

    `forward(x, cond)` goes from audio to noise and returns `(z, log_det)`;
    `inverse(z, cond)` goes from noise to audio and returns `(x, log_det)`. `log_det` is
    (B,), in nats, of the direction called, summed over C and L, in float32 at least. In a
    padded batch only valid positions count, and what lies in the padding has no meaning.
    A bijection takes a condition (or None) and never changes it.
    """

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


_recorders: ContextVar[list[Tensor] | None] = ContextVar("log_det_recorder", default=None)


@contextmanager
def record_log_dets() -> Iterator[list[Tensor]]:
    """Collects the log-determinant of every step at each position, (B, L), while it is open.

    The contract sums over positions; calibration (training/losses.py) needs the volume of a
    path frame by frame. Steps that keep volume contribute nothing.
    """
    terms: list[Tensor] = []
    token = _recorders.set(terms)
    try:
        yield terms
    finally:
        _recorders.reset(token)


def sum_log_det(elementwise: Tensor, cond: Condition | None) -> Tensor:
    """Reduces a log-determinant (B, C or 1, L) to (B,), over valid positions only."""
    per_position = elementwise.float() if elementwise.dtype.itemsize < 4 else elementwise
    per_position = per_position.sum(1)
    if cond is not None and cond.mask is not None:
        per_position = per_position * cond.mask[:, 0].to(per_position.dtype)
    recorder = _recorders.get()
    if recorder is not None:
        recorder.append(per_position)
    return per_position.sum(1)


def full_precision(x: Tensor) -> torch.autocast:
    """A context in which autocast does not touch what must not be below float32."""
    return torch.autocast(x.device.type, enabled=False)


def zero_log_det(x: Tensor) -> Tensor:
    """The log-determinant (B,) of a map that keeps volume."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.zeros(x.shape[0], dtype=dtype, device=x.device)
