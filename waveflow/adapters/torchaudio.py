"""torchaudio's call: the vocoder of a Tacotron2TTSBundle."""

import copy
from typing import Any

from torch import Tensor

from waveflow.adapters.base import Adapter


class TorchaudioVocoder(Adapter):
    """In the place of a bundle's vocoder, for bundles of hop 256 (GRIFFINLIM).

    Example:
        >>> audio, lengths = TorchaudioVocoder()(torch.full((1, 80, 3), -8.0), torch.tensor([3]))
        >>> audio.shape, lengths
        (torch.Size([1, 768]), tensor([768]))
    """

    def forward(self, specgram: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        """(B, 80, F) and frames (B,) or None to (B, F 256) and samples (B,) or None."""
        if lengths is None:
            return self.speak(specgram), None
        audio, n_samples = self.speak(specgram, lengths)
        return audio, n_samples.to(lengths)


def with_vocoder(bundle: Any, vocoder: TorchaudioVocoder) -> Any:
    """A copy of a Tacotron2TTSBundle whose `get_vocoder` gives this one."""
    changed = copy.copy(bundle)
    changed.get_vocoder = lambda *, dl_kwargs=None: vocoder
    return changed
