"""Composition: steps one after another."""

from typing import cast

from torch import Tensor, nn

from waveflow.bijections.base import Bijection, Condition, Step, zero_log_det


class Chain(Bijection):
    """Steps one after another, `forward` in the order written.

    log|det d(f_n ... f_1)/dx| is the sum of the steps' own: the chain rule for Jacobians.
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

    def unroll(self, cond: Condition | None) -> list[Step]:
        steps = [cast(Bijection, step).unroll(cond) for step in self.steps]
        return [step for inner in steps for step in inner]
