"""Chain: steps one after another."""

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import cast, overload

from torch import Tensor, nn

from waveflow.bijections.base import Bijection, Condition, rounded_up, zero_log_det
from waveflow.context import Context, context_of


class Chain(Bijection):
    """Steps one after another, `forward` in the order written.

    log|det d(f_n ... f_1)/dx| is the sum of the steps' own: the chain rule for Jacobians.

    Example:
        >>> chain = Chain(Squeeze(8), InvertibleConv1x1(8))
        >>> len(chain), chain[1]
        (2, InvertibleConv1x1(channels=8))
    """

    def __init__(self, *steps: Bijection) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        log_det = zero_log_det(x)
        for step in self.steps:
            x, step_log_det = step(x, cond)
            log_det = log_det + step_log_det
        return x, log_det

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        log_det = zero_log_det(z)
        for step in reversed(self.steps):
            z, step_log_det = cast(Bijection, step).inverse(z, cond)
            log_det = log_det + step_log_det
        return z, log_det

    @property
    def factor(self) -> Fraction:  # type: ignore[override]
        return math.prod((Fraction(step.factor) for step in self), start=Fraction(1))

    @property
    def block(self) -> int:  # type: ignore[override]
        blocks = (scale * step.block for step, scale in self._scaled())
        return math.lcm(*(math.ceil(block) for block in blocks))

    @property
    def context(self) -> Context:
        steps = reversed(list(self._scaled()))
        return _one_after_another((step, scale, context_of(step)) for step, scale in steps)

    @property
    def inverse_context(self) -> Context:
        return _one_after_another(
            (step, scale, step.inverse_context) for step, scale in self._scaled()
        )

    def _scaled(self) -> Iterator[tuple[Bijection, Fraction | int]]:
        """The steps, each with the positions of the chain's x for one position of its own x."""
        scale: Fraction | int = 1
        for step in self:
            yield step, scale
            scale *= step.factor

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Bijection]:
        return iter(cast(Iterable[Bijection], self.steps))

    @overload
    def __getitem__(self, index: int) -> Bijection: ...

    @overload
    def __getitem__(self, index: slice) -> "Chain": ...

    def __getitem__(self, index: int | slice) -> Bijection:
        if isinstance(index, slice):
            return Chain(*list(self)[index])
        return cast(Bijection, self.steps[index])


def _one_after_another(steps: Iterable[tuple[Bijection, Fraction | int, Context]]) -> Context:
    """The context of steps, from the one that makes the result to the one that sees the input.

    Each comes with its scale and the context of the direction that is meant. A step with blocks
    needs whole ones, so the positions that are needed up to it are rounded up to its blocks.
    """
    needed: list[float | Fraction] = [0, 0]
    for step, scale, context in steps:
        needed = [
            rounded_up(side, step.block * scale) + more * scale
            for side, more in zip(needed, context, strict=True)
        ]
    return Context(*map(rounded_up, needed))
