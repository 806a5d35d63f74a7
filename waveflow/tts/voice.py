"""Voice: a trained Glow-TTS in a folder, as checkpoints are: config, weights, hashes; no code."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from waveflow.audio.mel_config import MelConfig
from waveflow.checkpoint import budget_of, load_weights, parse_tensors, save_checkpoint
from waveflow.engine.fast.packed import DecodingKit
from waveflow.errors import CheckpointError
from waveflow.model_files import CONFIG, FORMAT, WEIGHTS, first_problem, read_files
from waveflow.pretrained import voice_folder
from waveflow.tts.glow_tts import GlowTTS, GlowTTSConfig
from waveflow.tts.text import SYMBOLS, numbers, read_sentences


class VoiceCard(BaseModel):
    """config.json of a voice.

    Attributes:
        symbols: what the text encoder knows, in its order.
        noise_scale: standard deviation of z around its prior mean, in synthesis.
        refine_steps: the vocoder's mel refinement of its mels; None: the vocoder's own.
        data, licence: origin of the weights, in words, and their licence.
        steps: of the optimizer.
        log_likelihood: of validation mels, nats for each value of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    model: GlowTTSConfig
    mel: MelConfig
    symbols: tuple[str, ...] = SYMBOLS
    noise_scale: float = Field(default=0.2, ge=0, le=10)
    refine_steps: int | None = Field(default=0, ge=0, le=64)
    data: str = ""
    licence: str = ""
    steps: int = 0
    log_likelihood: float | None = None


class Voice:
    """English text to mels, a sentence at a time.

    Attributes:
        card: the voice's config.
        model: the network, whose weights stay as they are.
        convention: of its mels.
        refine_steps: as in the card.
    """

    def __init__(self, card: VoiceCard, model: GlowTTS) -> None:
        self.card = card
        self.model = model.eval()
        kit = DecodingKit()
        fast: Any = kit.replaced(model, flow=kit.convert(model.flow))
        self._fast: GlowTTS = fast
        self.convention = card.mel
        self.refine_steps = card.refine_steps

    def mels(self, text: str, pace: float = 1.0, seed: int = 0) -> Iterator[Tensor]:
        """A mel (M, F) for each sentence of a text.

        Raises:
            ConfigError: as `read_sentences`.
        """
        for symbols in read_sentences(text):
            numbered = torch.tensor(numbers(symbols))
            yield self._fast.speak(numbered, self.card.noise_scale, pace, seed)


def save_voice(folder: Path, card: VoiceCard, model: GlowTTS) -> None:
    """Writes a voice's folder; weights as float16, which `load_voice` widens."""
    weights = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_checkpoint(folder, card, weights)


def load_voice(voice: str | Path | None = None) -> Voice:
    """A voice that ships, by name, or from its folder.

    Raises:
        CheckpointError: no such voice, damaged, or made for other symbols.
    """
    folder = voice_folder(voice)
    files = read_files(folder)
    try:
        card = VoiceCard.model_validate_json(files[CONFIG])
    except ValidationError as error:
        raise CheckpointError(f"{folder / CONFIG}: {first_problem(error)}") from error
    if card.symbols != SYMBOLS:
        raise CheckpointError(f"{folder} knows other symbols than this waveflow: train it again")
    weights = parse_tensors(files[WEIGHTS], folder / WEIGHTS)
    with budget_of(weights, folder):
        model = GlowTTS(card.model, card.mel.n_mels)
    load_weights(model, weights, folder)
    return Voice(card, model)
