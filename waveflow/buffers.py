"""Constants of a module that are exact in every precision."""

from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class ExactBuffers(nn.Module):
    """A module whose constant tensors are rounded from float64 once, whatever its dtype.

    A plain buffer stays as coarse as float32 after `.double()`. Here every move of the module
    fills its constants anew from their float64 values. They are no part of the state dict.
    """

    def __init__(self) -> None:
        super().__init__()
        self._exact: dict[str, NDArray[np.float64]] = {}

    def register_exact(self, name: str, values: NDArray[np.float64]) -> None:
        """Adds a buffer of torch's default dtype with these values."""
        self._exact[name] = values
        buffer = torch.from_numpy(values).to(torch.get_default_dtype())
        self.register_buffer(name, buffer, persistent=False)

    def exact(self, name: str, like: Tensor) -> Tensor:
        """The constant on the device and in the dtype of `like`."""
        buffer = getattr(self, name)
        if buffer.dtype == like.dtype and buffer.device == like.device:
            return buffer
        return torch.from_numpy(self._exact[name]).to(like.dtype).to(like.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for name, values in self._exact.items():
            # On the CPU first: an accelerator may have no float64.
            buffer = getattr(self, name)
            setattr(self, name, torch.from_numpy(values).to(buffer.dtype).to(buffer.device))
        return self
