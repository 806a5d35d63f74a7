"""Zeros in the padding of a batch of unequal lengths."""

from torch import Tensor


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros where the mask is 0. Selected, not multiplied: padding may hold NaN."""
    return x if mask is None else x.masked_fill(mask == 0, 0.0)
