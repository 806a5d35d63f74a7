"""Speaker: text to speech, a sentence at a time."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from waveflow.audio.mel_config import MelConfig
from waveflow.engine.options import OWN_OPTIONS, SynthesisOptions
from waveflow.engine.vocoder import Vocoder, load, warn_caller
from waveflow.errors import ConfigError

# Between sentences, in seconds.
PAUSE = 0.3
SLOWEST, FASTEST = 0.25, 4.0


class Acoustic(Protocol):
    """Text to mels: a `Voice`, or another system's model (waveflow/tts/foreign.py)."""

    @property
    def convention(self) -> str | MelConfig | None:
        """Of its mels; None for the vocoder's own."""
        ...

    @property
    def refine_steps(self) -> int | None:
        """How often the vocoder refines their speech, unless it is told; None: its own."""
        ...

    def mels(self, text: str, pace: float, seed: int) -> Iterable[Tensor]:
        """A mel (M, F) for each sentence of a text."""
        ...


class Speaker:
    """Text to speech: an acoustic model gives the mels, a vocoder speaks them.

    Attributes:
        acoustic, vocoder: as given.
        sample_rate: in Hz.

    Example:
        >>> speaker = waveflow.load_speaker()
        >>> audio = speaker("Hello.")
        >>> audio.dtype, speaker.sample_rate
        (dtype('float32'), 22050)
    """

    def __init__(self, acoustic: Acoustic, vocoder: Vocoder) -> None:
        self.acoustic = acoustic
        self.vocoder = vocoder
        self.sample_rate = vocoder.sample_rate

    def __call__(
        self, text: str, options: SynthesisOptions = OWN_OPTIONS, pace: float = 1.0, **changes: Any
    ) -> np.ndarray:
        """Speech of a text, (T,) float32 in [-1, 1]; arguments and errors as `stream`."""
        notes: list[str] = []
        pieces = list(self.stream([text], options, pace, notes.append, **changes))
        warn_caller(list(dict.fromkeys(notes)))
        return np.concatenate(pieces)

    def stream(
        self,
        texts: Iterable[str],
        options: SynthesisOptions = OWN_OPTIONS,
        pace: float = 1.0,
        on_note: Callable[[str], None] | None = None,
        **changes: Any,
    ) -> Iterator[np.ndarray]:
        """Speech of texts, each sentence as soon as it is made, a pause before all but the first.

        Args:
            texts: whole sentences, in pieces of any length.
            options: of the vocoder; its seed is also that of the mels. Other fields of the mel
                than lossy are the acoustic model's.
            pace: of the speech, 0.25 to 4; 2 is twice as fast.
            on_note: called with each note of a synthesis.
            changes: fields of the options by name.

        Raises:
            ConfigError: a text without a word, or an option out of range.
        """
        if not SLOWEST <= pace <= FASTEST:
            raise ConfigError(f"pace {pace} is out of range: give {SLOWEST} to {FASTEST}")
        options = options.changed(changes | {"convention": self.acoustic.convention or "native"})
        if options.refine is None:
            options = options.changed({"refine": self.acoustic.refine_steps})
        [seed] = options.seeds(1)
        pause = np.zeros(0, np.float32)
        for text in texts:
            for mel in self.acoustic.mels(text, pace, seed):
                speech = self.vocoder.synthesise(mel, options)
                if on_note is not None:
                    for note in speech.notes:
                        on_note(note)
                yield np.concatenate([pause, speech.audio.cpu().numpy()])
                pause = np.zeros(round(PAUSE * self.sample_rate), np.float32)
        if not pause.size:
            raise ConfigError("there is no word to speak: give a text with letters or digits")


def load_speaker(
    voice: str | Path | Acoustic | None = None, vocoder: str | Path | Vocoder | None = None
) -> Speaker:
    """Text to speech with a voice and a model that ship, or with others.

    Args:
        voice: the name of a voice that ships, a voice's folder, "espeak" (the program espeak-ng,
            re-voiced), or an acoustic model; None for the default.
        vocoder: as `waveflow.load` takes it, or a vocoder.

    Raises:
        CheckpointError: no such voice or model, or a damaged one.
        ConfigError: what the voice needs is not installed.
    """
    if not isinstance(vocoder, Vocoder):
        vocoder = load(vocoder)
    if voice is None or isinstance(voice, str | Path):
        from waveflow.tts.foreign import ESPEAK, Espeak
        from waveflow.tts.voice import load_voice

        return Speaker(Espeak(vocoder) if voice == ESPEAK else load_voice(voice), vocoder)
    return Speaker(voice, vocoder)
