"""ESPnet2's call: the vocoder of a Text2Speech."""

from pathlib import Path
from typing import Any

from torch import Tensor

from waveflow.adapters.base import Adapter
from waveflow.engine.vocoder import Vocoder


class ESPnetVocoder(Adapter):
    """In the place of `text2speech.vocoder`.

    Args:
        vocoder, options: as `Adapter`. ESPnet's own mels are `convention="espnet"`; those of a
            model with other bands need `lossy=True`.

    Example:
        >>> ESPnetVocoder()(torch.full((3, 80), -8.0)).shape
        torch.Size([768])
    """

    def __init__(self, vocoder: Vocoder | str | Path | None = None, **options: Any) -> None:
        super().__init__(vocoder, **{"time_major": True} | options)
        self.fs = self.sample_rate

    def forward(self, features: Tensor) -> Tensor:
        """(F, 80) to (F 256,)."""
        return self.speak(features)
