"""NeMo's call: a vocoder of its text-to-speech models."""

from torch import Tensor

from waveflow.adapters.base import Adapter


class NeMoVocoder(Adapter):
    """In the place of a HifiGanModel.

    NeMo overwrites the last frame of a mel by padding. Frames of one value in all bands are made
    silent.

    Example:
        >>> NeMoVocoder().convert_spectrogram_to_audio(spec=torch.full((1, 80, 3), -8.0)).shape
        torch.Size([1, 768])
    """

    def convert_spectrogram_to_audio(
        self,
        *,
        spec: Tensor,
        sigma: float | None = None,
        denoise: bool = False,
        denoiser_strength: float = 0.01,
    ) -> Tensor:
        """(B, 80, F) to (B, F 256).

        Args:
            sigma, denoise, denoiser_strength: as those of NeMo's WaveGlow up to 2.x.
        """
        audio = self.speak(spec, sigma=self.options.sigma if sigma is None else sigma)
        return self.vocoder.denoise(audio, denoiser_strength) if denoise else audio
