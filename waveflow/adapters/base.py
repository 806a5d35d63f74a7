"""Adapter: what all hosts of a vocoder expect of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from waveflow.engine.options import OWN_OPTIONS
from waveflow.engine.vocoder import Vocoder, load


class Adapter(nn.Module):
    """A module around a vocoder, with its weights as parameters.

    It never computes gradients, is deterministic (its seed stays the same unless it is changed),
    and moves between devices. Hosts that halve it change nothing: the precision is the vocoder's.

    Args:
        vocoder: the model; or its name or folder, as `waveflow.load` takes it.
        options: fields of `SynthesisOptions`: the host's `convention`, sigma, seed, refine.

    Attributes:
        vocoder: as given, or as loaded.
        options: of every call.

    Raises:
        CheckpointError: as `waveflow.load`.
        ConfigError: an option out of range.
    """

    def __init__(self, vocoder: Vocoder | str | Path | None = None, **options: Any) -> None:
        super().__init__()
        self.vocoder = vocoder if isinstance(vocoder, Vocoder) else load(vocoder)
        self.options = OWN_OPTIONS.changed(options)
        self.flow = self.vocoder.flow
        self.eval()

    @property
    def sample_rate(self) -> int:
        """In Hz."""
        return self.vocoder.sample_rate

    def speak(self, mel: Tensor, lengths: Tensor | None = None, **changes: Any) -> Any:
        """Audio (B, F hop) or (F hop,) of a mel (B, M, F) or (M, F), float32 in [-1, 1].

        With lengths (B,), in frames, it is that audio and the items' samples, as `Vocoder` gives.
        """
        with torch.no_grad(), torch.autocast(self.vocoder.device.type, enabled=False):
            return self.vocoder(mel, self.options.changed(changes), lengths)

    def remove_weight_norm(self) -> None:
        """Does nothing: the engine folds weight norms when it decodes."""

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, whatever the host's own modules do."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.vocoder.to(fn(torch.empty(0, device=self.vocoder.device)).device)
        return self
