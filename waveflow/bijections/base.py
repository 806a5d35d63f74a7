"""The contract that every bijection keeps, and the condition that steers them.

A reader who knows this page can read every file of the package.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from waveflow.context import Context, context_of
from waveflow.padding import zero_padding


class Condition(NamedTuple):
    """Features that steer a flow, and the valid positions of each item.

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

    `forward(x, cond)` goes from audio to noise and returns `(z, log_det)`; `inverse(z, cond)`
    goes from noise to audio and returns `(x, log_det)`. `log_det` is (B,), in nats, of the
    direction called, summed over C and L, in float32 at least. In a padded batch only valid
    positions count, and values in the padding have no meaning. A bijection takes a condition
    (or None) and never changes it.

    A bijection also declares how far it looks, as windows and streams need to know:

    Attributes:
        context: (left, right), positions of x around a position of z that `forward` depends on.
            There is no default: a bijection without it is refused by windows and streams.
        inverse_context: the same of `inverse`, z around x; by default equal to `context`.
        stream_context: the same of `inverse_after`; by default equal to `inverse_context`.
        factor: positions of x for each position of z; a squeeze by n has n.
        block: positions of x that belong together; contexts count from the edges of whole blocks.

    `check_bijection` (bijections/check.py) proves all of this for a bijection.
    """

    factor: Fraction | int = 1
    block: int = 1

    @property
    def inverse_context(self) -> Context:
        return context_of(self)

    @property
    def stream_context(self) -> Context:
        return self.inverse_context

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} has no forward(x, cond)")

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} has no inverse(z, cond)")

    def inverse_after(self, past: Tensor, z: Tensor, cond: Condition | None = None) -> Tensor:
        """x (B, C, L) of which a stream has made the first positions, `past`, already.

        A bijection whose inverse goes from position to position continues there, and needs
        no more of the past than its `stream_context`. By default all is computed again.
        """
        return self.inverse(z, cond)[0]


class Inverse(Bijection):
    """A bijection run the other way: IAF is `Inverse(MAF)`."""

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        self.bijection = bijection
        self.factor = 1 / Fraction(bijection.factor)
        self.block = max(1, int(bijection.block * self.factor))

    @property
    def context(self) -> Context:
        return self._rescaled(self.bijection.inverse_context)

    @property
    def inverse_context(self) -> Context:
        return self._rescaled(context_of(self.bijection))

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse(x, cond)

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection(z, cond)

    def _rescaled(self, context: Context) -> Context:
        """Counted in positions of the other side."""
        return Context(*(rounded_up(side * self.factor) for side in context))


def rounded_up(positions: float | Fraction, block: int | Fraction = 1) -> Any:
    """The next whole number of blocks, in positions, as an exact number; infinity stays."""
    if positions == math.inf:
        return math.inf
    if isinstance(positions, int) and isinstance(block, int):  # as almost always, and quicker
        return -(-positions // block) * block
    return math.ceil(Fraction(positions) / block) * block


_log_dets: ContextVar[list[Tensor] | None] = ContextVar("log-determinants", default=None)


@contextmanager
def log_dets_by_position() -> Iterator[list[Tensor]]:
    """Gives a list that gets the log-determinant (B, L) of each bijection that runs inside."""
    found: list[Tensor] = []
    token = _log_dets.set(found)
    try:
        yield found
    finally:
        _log_dets.reset(token)


def sum_log_det(elementwise: Tensor, cond: Condition | None) -> Tensor:
    """Reduces a log-determinant (B, C or 1, L) to (B,), over valid positions only."""
    per_position = elementwise.float() if elementwise.dtype.itemsize < 4 else elementwise
    per_position = per_position.sum(1)
    if cond is not None and cond.mask is not None:
        per_position = zero_padding(per_position, cond.mask[:, 0])
    # Dynamo, which compiles decoders, knows no context variables.
    if not torch.compiler.is_dynamo_compiling() and (found := _log_dets.get()) is not None:
        found.append(per_position)
    return per_position.sum(1)


def check_channels(bijection: nn.Module, x: Tensor, channels: int) -> None:
    """Raises ValueError with both shapes unless x is (B, channels, L)."""
    if x.dim() != 3 or x.shape[1] != channels:
        raise ValueError(
            f"{type(bijection).__name__} is for (B, {channels}, L), and got {tuple(x.shape)}"
        )


def full_precision(x: Tensor) -> torch.autocast:
    """A context in which autocast does not touch operations that need float32."""
    return torch.autocast(x.device.type, enabled=False)


def zero_log_det(x: Tensor) -> Tensor:
    """The log-determinant (B,) of a map that keeps volume."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.zeros(x.shape[0], dtype=dtype, device=x.device)
