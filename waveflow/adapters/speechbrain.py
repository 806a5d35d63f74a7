"""SpeechBrain's call: HIFIGAN.decode_batch."""

from torch import Tensor

from waveflow.adapters.base import Adapter


class SpeechBrainVocoder(Adapter):
    """In the place of `speechbrain.inference.vocoders.HIFIGAN`.

    Example:
        >>> SpeechBrainVocoder().decode_batch(torch.full((1, 80, 3), -8.0)).shape
        torch.Size([1, 1, 768])
    """

    def decode_batch(
        self,
        spectrogram: Tensor,
        mel_lens: Tensor | None = None,
        hop_len: int | None = None,
    ) -> Tensor:
        """(B, 80, F) to (B, 1, F 256).

        Args:
            mel_lens: (B,) frames of each item, beyond which all is zero.
            hop_len: not needed: it is the model's.
        """
        if mel_lens is None:
            return self.speak(spectrogram)[:, None]
        audio, _ = self.speak(spectrogram, mel_lens)
        return audio[:, None]

    forward = decode_batch

    def decode_spectrogram(self, spectrogram: Tensor) -> Tensor:
        """(80, F) to (1, F 256)."""
        return self.speak(spectrogram)[None]
