"""The contract that every bijection keeps, and the condition that steers them.

A reader who knows this page can read every file of the package.
"""

from collections.abc import Callable, Iterable, Iterator
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


class Rebuilt(NamedTuple):
    """A step taken once more, from an input that was found again from its output.

    Attributes:
        parts: leaves of the graph of `z` and `log_det`.
        join: puts the parts together as x. It only rearranges them, so it puts their
            gradients together as that of x, too.
        z, log_det: as `forward` returns them.
    """

    parts: tuple[Tensor, ...]
    join: Callable[..., Tensor]
    z: Tensor
    log_det: Tensor


class Bijection(nn.Module):
    """An invertible map of (B, C, L) signals whose Jacobian's log-determinant is known.

    `forward(x, cond)` goes from audio to noise and returns `(z, log_det)`;
    `inverse(z, cond)` goes from noise to audio and returns `(x, log_det)`. `log_det` is
    (B,), in nats, of the direction called, summed over C and L, in float32 at least. In a
    padded batch only valid positions count, and what lies in the padding has no meaning.
    A bijection takes a condition (or None) and never changes it.

    The three methods below serve `Reversible` and have defaults: a map that is made of others
    overrides `unroll`, one that can do better than to invert itself the other two.
    """

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def unroll(self, cond: Condition | None) -> "list[Step]":
        """The steps, each with the condition it sees, that make this map one after another."""
        return [Step(self, cond)]

    def opposite(self) -> "Bijection":
        """The same map run the other way."""
        return Inverse(self)

    def rebuild(self, z: Tensor, cond: Condition | None = None) -> Rebuilt:
        """The input that led to z, and the way from it to z with a graph."""
        # The log-determinants of the way back are none of the path's.
        with torch.no_grad(), record_log_dets():
            x, _ = self.inverse(z, cond)
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return Rebuilt((x,), lambda x: x, *self.forward(x, cond))


class Step(NamedTuple):
    """A bijection of a chain and the condition it sees there."""

    bijection: Bijection
    cond: Condition | None


class Inverse(Bijection):
    """A bijection run the other way: IAF is `Inverse(MAF)`."""

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        self.bijection = bijection

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse(x, cond)

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection(z, cond)

    def opposite(self) -> Bijection:
        return self.bijection

    def unroll(self, cond: Condition | None) -> list[Step]:
        steps = self.bijection.unroll(cond)
        return [Step(step.bijection.opposite(), step.cond) for step in reversed(steps)]


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
    record([per_position])
    return per_position.sum(1)


def record(terms: Iterable[Tensor]) -> None:
    """Log-determinants (B, L) for `record_log_dets`, where it is open."""
    recorder = _recorders.get()
    if recorder is not None:
        recorder.extend(terms)


def full_precision(x: Tensor) -> torch.autocast:
    """A context in which autocast does not touch what must not be below float32."""
    return torch.autocast(x.device.type, enabled=False)


def zero_log_det(x: Tensor) -> Tensor:
    """The log-determinant (B,) of a map that keeps volume."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.zeros(x.shape[0], dtype=dtype, device=x.device)
