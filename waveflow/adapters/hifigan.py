"""HiFi-GAN's call, as Matcha-TTS, Grad-TTS, FastSpeech 2 and others make it."""

from torch import Tensor

from waveflow.adapters.base import Adapter


class HiFiGANVocoder(Adapter):
    """In the place of a HiFi-GAN generator.

    Example:
        >>> vocoder = HiFiGANVocoder()
        >>> vocoder(torch.full((2, 80, 3), -8.0)).shape
        torch.Size([2, 1, 768])
    """

    def forward(self, mel: Tensor) -> Tensor:
        """(B, 80, F) or (80, F) to (B, 1, F 256)."""
        audio = self.speak(mel)
        return audio[None, None] if audio.dim() == 1 else audio[:, None]
