"""Vocos's call."""

from torch import Tensor

from waveflow.adapters.base import Adapter


class VocosVocoder(Adapter):
    """In the place of a Vocos, for a mel in the vocoder's own convention or the one it is told.

    Example:
        >>> VocosVocoder().decode(torch.full((1, 80, 3), -8.0)).shape
        torch.Size([1, 768])
    """

    def decode(self, features: Tensor) -> Tensor:
        """(B, 80, F) to (B, F 256)."""
        return self.speak(features)
