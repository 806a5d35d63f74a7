"""Takes mels as their makers have them, and gives a model's own."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from waveflow.audio.conventions import FEWEST_FRAMES, Reading, find_convention, foreign_words
from waveflow.audio.conversion import MelConversion
from waveflow.audio.mel_config import MelConfig
from waveflow.audio.mel_names import AUTO, NATIVE, convention_named
from waveflow.engine.checks import Floats, band_major, checked_lengths, checked_mel, mel_array
from waveflow.engine.options import SynthesisOptions
from waveflow.errors import ConfigError, MelMismatchError

if TYPE_CHECKING:
    from waveflow.engine.checks import Lengths

# No more of a mel is looked at: an hour of it would take its size again.
_MOST_FRAMES = 10_000


class IncomingMels:
    """Checks and converts the mels, or the pieces of one mel, that a synthesis is given.

    The convention of the first piece is that of all.

    Args:
        own: the model's convention.
        options: what the mels are in.
        judges: whether a mel without a convention is refused where it is clearly foreign.
        likelier: asked with convention "auto" for better bands than the model's own, given a mel
            (M, F) and its scale.

    Attributes:
        notes: the convention, where it was told by the values.

    Raises:
        MelMismatchError: the convention cannot be converted.
    """

    def __init__(
        self,
        own: MelConfig,
        options: SynthesisOptions,
        judges: bool = False,
        likelier: Callable[[Floats, Reading], Reading] = lambda mel, found: found,
    ) -> None:
        self._likelier = likelier
        self._own = own
        self._options = options
        self._seen: list[Floats] | None = None
        self._conversion: MelConversion | None = None
        self.notes: list[str] = []
        convention = options.convention
        if convention is None:
            self._seen = [] if judges else None
        elif convention != AUTO:
            if isinstance(convention, str):
                convention = convention_named(convention, own)
            self._convert_from(convention)

    @property
    def delay_samples(self) -> int:
        """Samples by which to delay the speech, so that it lies where the frames were."""
        return 0 if self._conversion is None else self._conversion.delay_samples

    def take(
        self, mel: Any, lengths: "Lengths | None" = None
    ) -> tuple[Floats, bool, NDArray[np.int64] | None]:
        """A mel of the model's convention.

        Args:
            mel: (B, M, F) or (M, F), or (B, F, M) or (F, M) as the options say; an array or a
                tensor.
            lengths: (B,), frames of each item.

        Returns:
            (B, M, F); whether the batch axis was added; and the lengths.

        Raises:
            MelMismatchError: wrong bands, shape, lengths or values, or another convention.
        """
        source = self._own if self._conversion is None else self._conversion.source
        whose = "the model takes" if source.n_mels == self._own.n_mels else "its convention has"
        turned = band_major(mel_array(mel), source.n_mels, self._options.time_major)
        frames = None if lengths is None else checked_lengths(turned, lengths)
        batch, squeezed = checked_mel(turned, source.n_mels, frames, whose)
        if self._conversion is None and self._options.convention == AUTO:
            self._find(batch, frames)
        if self._conversion is not None:
            if frames is not None and self._conversion.changes_frames:
                raise ConfigError("a mel of another rate or hop takes no lengths: give one mel")
            batch, _ = checked_mel(self._conversion(batch), self._own.n_mels)  # exp may overflow
        self._judge(batch, frames)
        return batch, squeezed, frames

    def piece(self, mel: Any) -> Floats:
        """The next piece (1, M, f) of a stream, as `take`."""
        if self._conversion is not None and self._conversion.changes_frames:
            raise ConfigError("a mel of another rate or hop is converted as a whole: no stream")
        batch, _, _ = self.take(mel)
        if len(batch) != 1:
            raise MelMismatchError(f"a stream is of one mel (M, f), not {batch.shape}")
        return batch

    def finish(self) -> None:
        """Judges a stream that ends before it was long enough.

        Raises:
            MelMismatchError: it is clearly in another convention.
        """
        if self._seen:
            self._decide(np.concatenate(self._seen, axis=1))

    def _convert_from(self, config: MelConfig) -> None:
        if config != self._own:
            self._conversion = MelConversion(config, self._own, self._options.lossy)

    def _find(self, batch: Floats, frames: NDArray[np.int64] | None) -> None:
        items = list(_items(batch, frames))
        found = find_convention(np.concatenate(items, axis=1), self._own)
        found = self._likelier(max(items, key=np.size), found)
        self._options = self._options.changed({"convention": found.config})
        try:
            self._convert_from(found.config)
        except MelMismatchError as error:
            raise MelMismatchError(f"taken for {found.name}: {error}") from error
        if found.name != NATIVE:
            self.notes.append(f"taken for {found.name}")

    def _judge(self, batch: Floats, frames: NDArray[np.int64] | None) -> None:
        """Looks at each item, or at the first pieces of a stream until they are long enough."""
        if self._seen is None:
            return
        items = list(_items(batch, frames))
        if len(items) > 1:
            for item in items:
                self._decide(item)
        elif sum(piece.shape[1] for piece in (*self._seen, *items)) >= FEWEST_FRAMES:
            self._decide(np.concatenate([*self._seen, *items], axis=1))
        else:
            self._decide(items[0])
            self._seen += items

    def _decide(self, mel: Floats) -> None:
        if words := foreign_words(mel, self._own):
            raise MelMismatchError(words)
        if mel.shape[1] >= FEWEST_FRAMES:
            self._seen = None


def _items(batch: Floats, frames: NDArray[np.int64] | None) -> Iterator[Floats]:
    ends = [batch.shape[2]] * len(batch) if frames is None else frames.tolist()
    for item, end in zip(batch, ends, strict=True):
        yield item[:, : min(end, _MOST_FRAMES)]
