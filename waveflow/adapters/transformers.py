"""transformers' call: SpeechT5, FastSpeech2Conformer, the text-to-audio pipeline."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from waveflow.adapters.base import Adapter
from waveflow.engine.vocoder import Vocoder


class TransformersVocoder(Adapter):
    """In the place of a SpeechT5HifiGan, for time-major mels.

    Batches are padded with zeros, which would be loud: they are made silent (a note says so).

    Args:
        vocoder, options: as `Adapter`. SpeechT5's own mels are `convention="speecht5"`, of 16 kHz,
            and another model's rate needs `lossy=True`.

    Attributes:
        config: has `sampling_rate`, which the pipeline reads.

    Example:
        >>> vocoder = TransformersVocoder()
        >>> vocoder(torch.full((3, 80), -8.0)).shape, vocoder.config.sampling_rate
        (torch.Size([768]), 22050)
    """

    def __init__(self, vocoder: Vocoder | str | Path | None = None, **options: Any) -> None:
        super().__init__(vocoder, **{"time_major": True} | options)
        self.config = SimpleNamespace(sampling_rate=self.sample_rate)

    def forward(self, spectrogram: Tensor) -> Tensor:
        """(F, 80) to (F 256,), or (B, F, 80) to (B, F 256)."""
        return self.speak(spectrogram)
