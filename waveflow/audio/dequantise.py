"""Noise that turns 16-bit audio into a continuous signal."""

import torch
from torch import Tensor

STEP_16_BIT = 2.0**-15


def dequantise(audio: Tensor, generator: torch.Generator | int | None = None) -> Tensor:
    """Adds uniform noise of one 16-bit step, between -1/2 and 1/2 of 2^-15.

    A density of samples that lie on a grid has no upper bound: a model can put ever narrower peaks
    on the grid's values, and digital silence alone can make the likelihood infinite. With this
    noise the mean log-density is a lower bound of the log-probability of the 16-bit values under
    the model, up to the constant log 2^15 (Theis, van den Oord and Bethge 2016, section 3.1), so
    likelihoods of two models compare.

    Args:
        audio: Any shape, in [-1, 1].
        generator: Source of the noise, or a seed for one (evaluation: the same number each time);
            torch's global generator if None.

    Returns:
        The same shape, dtype and device; it may exceed [-1, 1] by half a step.
    """
    if isinstance(generator, int):
        generator = torch.Generator().manual_seed(generator)
    device = audio.device if generator is None else generator.device
    noise = torch.rand(audio.shape, generator=generator, dtype=audio.dtype, device=device)
    return audio + (noise.to(audio.device) - 0.5) * STEP_16_BIT
