"""WaveGlow's call, as NVIDIA's Tacotron 2 notebooks and their denoiser make it."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from waveflow.adapters.base import Adapter
from waveflow.engine.vocoder import Vocoder


class WaveGlowVocoder(Adapter):
    """In the place of NVIDIA's WaveGlow.

    Example:
        >>> vocoder = WaveGlowVocoder()
        >>> vocoder.infer(torch.full((1, 80, 3), -8.0), sigma=0.666).shape
        torch.Size([1, 768])
    """

    def __init__(self, vocoder: Vocoder | str | None = None, **options: Any) -> None:
        super().__init__(vocoder, **options)
        # Their denoiser makes its mel of zeros like this weight, on the device where the model is.
        self.upsample = SimpleNamespace(weight=next(self.flow.parameters()))

    def infer(self, mel: Tensor, sigma: float = 1.0) -> Tensor:
        """(B, 80, F) to (B, F 256). Sigma is the noise's standard deviation, as theirs."""
        return self.speak(mel, sigma=sigma)

    @staticmethod
    def remove_weightnorm(model: Any) -> Any:
        """The model as it is: the engine folds weight norms when it decodes."""
        return model
