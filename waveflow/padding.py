"""Zeros in the padding of a batch of unequal lengths."""

import torch
from torch import Tensor


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros where the mask is 0. Selected, not multiplied: padding may hold NaN."""
    return x if mask is None else x.masked_fill(mask == 0, 0.0)


def hold_last(values: Tensor, mask: Tensor | None) -> Tensor:
    """Values (B, L) with each item's last valid one held through its padding; mask (B, L)."""
    if mask is None:
        return values
    last = mask.sum(1).long().clamp_min(1) - 1
    positions = torch.arange(values.shape[1], device=values.device)
    return values.gather(1, torch.minimum(positions[None], last[:, None]))
