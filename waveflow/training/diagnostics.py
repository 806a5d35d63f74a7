"""What a flow does to speech: the volume of every step, and whether z is Gaussian."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from waveflow.bijections import Inverse
from waveflow.bijections.base import Bijection

N_MOMENTS = 4


class LatentStatistics(NamedTuple):
    """Of all values of z; those of N(0, 1) are 0, 1 and 3.

    A kurtosis above 3 says that some values are wider than others still, or have heavy tails:
    what the flow has not explained. A standard deviation away from 1 says that the likelihood
    would rise by a scale alone, as it does on speech unlike the training's.
    """

    mean: float
    standard_deviation: float
    kurtosis: float


def power_sums(z: Tensor) -> Tensor:
    """The sums of z, z^2, z^3 and z^4 over all values, (4,) float64."""
    z = z.double()
    return torch.stack([z.pow(k).sum() for k in range(1, N_MOMENTS + 1)])


def latent_statistics(sums: Tensor, n_values: float) -> LatentStatistics:
    """Statistics of `n_values` values with these `power_sums` (4,), added up where there are many.

    The central moments are polynomials of the raw ones; in float64, with z of order one,
    nothing is lost by that.
    """
    mean, square, cube, fourth = (sums / n_values).tolist()
    variance = square - mean**2
    centred = fourth - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4
    kurtosis = centred / variance**2 if variance > 0 else math.nan
    return LatentStatistics(mean, math.sqrt(max(variance, 0.0)), kurtosis)


def learned_steps(bijection: Bijection) -> dict[str, Bijection]:
    """The innermost steps that have weights, in the order of the flow, by name.

    A name is a number and the type: "03_coupling". Squeezes and permutations keep volume.
    """
    steps: list[Bijection] = []

    def visit(module: nn.Module) -> None:
        # An Inverse calls what is in it backwards: its own result is what has the right sign.
        innermost = isinstance(module, Inverse) or not any(
            isinstance(part, Bijection) for part in list(module.modules())[1:]
        )
        if isinstance(module, Bijection) and innermost:
            if next(module.parameters(), None) is not None:
                steps.append(module)
        else:
            for child in module.children():
                visit(child)

    visit(bijection)
    return {f"{i:02d}_{type(step).__name__.lower()}": step for i, step in enumerate(steps, 1)}


@contextmanager
def record_step_log_dets(steps: dict[str, Bijection]) -> Iterator[dict[str, Tensor]]:
    """Collects each step's log-determinant (B,) of the forward passes made while it is open."""
    log_dets: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(module: Bijection, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            log_dets[name] = output[1].detach()

        return hook

    handles = [step.register_forward_hook(record(name)) for name, step in steps.items()]
    try:
        yield log_dets
    finally:
        for handle in handles:
            handle.remove()
