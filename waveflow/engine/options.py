"""SynthesisOptions and Speech: the options and the result of a synthesis."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from waveflow.audio.mel_config import MelConfig
from waveflow.audio.mel_names import check_convention
from waveflow.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

# Steps beyond it change nothing that is heard or measured.
MOST_REFINE_STEPS = 64


@dataclass(frozen=True)
class SynthesisOptions:
    """Settings of a synthesis, and of the mel that it is given.

    Attributes:
        sigma: standard deviation of the noise, 0 to 10; None takes the model's own. Below 1 a
            FrameGlow has more of it in unvoiced frames.
        seed: of the noise; one for all items, or one for each.
        refine: mel refinement steps after the draw, 0 to 64; None takes the model's own.
        convention: what the mel is in: a name ("nemo-fastpitch", "log10"; "auto" tells it by its
            values, "native" is the model's own as it is), or its MelConfig. None: the model's own,
            and a mel that is clearly in another one is refused.
        time_major: whether the mel is (F, M) or (B, F, M); "auto" tells it by the sizes.
        lossy: convert by interpolation what cannot be converted exactly
            (`waveflow.audio.conversion`).
        look_ahead: of streams, seconds of the mel behind a piece of audio that it may wait for.
            None waits for all that the model sees, and the pieces are the whole, bit for bit or
            nearly; with less a piece comes sooner and differs from it.

    Raises:
        ConfigError: a value out of range.
    """

    sigma: float | None = None
    seed: int | Sequence[int] = 0
    refine: int | None = None
    convention: str | MelConfig | None = None
    time_major: bool | Literal["auto"] = False
    lossy: bool = False
    look_ahead: float | None = None

    def __post_init__(self) -> None:
        if self.sigma is not None and not 0 <= self.sigma <= 10:
            raise ConfigError(f"sigma {self.sigma} is out of range: give a number from 0 to 10")
        if self.refine is not None and not 0 <= self.refine <= MOST_REFINE_STEPS:
            raise ConfigError(
                f"refine {self.refine} is out of range: give 0 to {MOST_REFINE_STEPS} steps"
            )
        if self.look_ahead is not None and not self.look_ahead >= 0:
            raise ConfigError(f"look_ahead {self.look_ahead}: give seconds, 0 or more")
        if not isinstance(self.seed, Integral | Sequence) or isinstance(self.seed, str):
            raise ConfigError(f"seed {self.seed!r}: give an integer, or one for each mel")
        if isinstance(self.convention, str):
            check_convention(self.convention)
        elif not isinstance(self.convention, MelConfig | None):
            raise ConfigError(f"convention {self.convention!r}: give a name or a MelConfig")
        if self.time_major not in (True, False, "auto"):
            raise ConfigError(f"time_major {self.time_major!r}: give True, False or 'auto'")

    def changed(self, changes: dict[str, Any]) -> "SynthesisOptions":
        """These options with some fields changed, by name."""
        return replace(self, **changes) if changes else self

    def seeds(self, n_items: int) -> list[int]:
        """A seed for each item.

        Raises:
            ConfigError: there are more or fewer seeds than items.
        """
        if not isinstance(self.seed, Sequence):
            return [int(self.seed)] * n_items
        if len(self.seed) != n_items:
            raise ConfigError(f"{len(self.seed)} seeds for {n_items} mels: give one for each")
        return list(self.seed)


# The model's own settings and seed 0.
OWN_OPTIONS = SynthesisOptions()


class Speech(NamedTuple):
    """The result of a synthesis.

    Attributes:
        audio: (B, F hop_length), or (F hop_length,) of one mel, float32 in [-1, 1]; zeros beyond
            an item's end. A tensor; an array of an ONNX graph.
        n_samples: (B,), the samples of each item; None where no lengths were given.
        notes: sentences for the listener: on a convention that was told, on clipped samples.
    """

    audio: Any
    n_samples: "Tensor | None"
    notes: list[str]
