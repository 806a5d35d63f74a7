"""Text to mels by other systems: transformers, torchaudio, and the program espeak-ng."""

import io
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import soundfile
import torch
from torch import Tensor

from waveflow.audio.io import resample
from waveflow.engine.vocoder import Vocoder
from waveflow.errors import ConfigError
from waveflow.tts.text import pieces_of

ESPEAK = "espeak"
# espeak-ng's own words a minute.
_WORDS_PER_MINUTE = 175
_SECONDS = 60


class Espeak:
    """The program espeak-ng, re-voiced: its speech becomes a mel, and the mel is spoken.

    The voice is espeak-ng's, heard through the vocoder. A text is English.

    Raises:
        ConfigError: the program is not installed.
    """

    convention = None
    refine_steps = None

    def __init__(self, vocoder: Vocoder) -> None:
        self.vocoder = vocoder
        if shutil.which("espeak-ng") is None:
            raise ConfigError("the voice espeak needs the program espeak-ng: install it")

    def mels(self, text: str, pace: float = 1.0, seed: int = 0) -> Iterator[Tensor]:
        """A mel (M, F) for each piece of a text; `seed` changes nothing."""
        words_per_minute = round(_WORDS_PER_MINUTE * pace)
        command = ["espeak-ng", "-v", "en-us", "-s", str(words_per_minute), "--stdin", "--stdout"]
        for piece in pieces_of(text):
            data = piece.encode(errors="replace")
            try:
                done = subprocess.run(command, input=data, capture_output=True, timeout=_SECONDS)
            except subprocess.TimeoutExpired as error:
                raise ConfigError(f"espeak-ng was not done in {_SECONDS} seconds") from error
            if done.returncode:
                reason = done.stderr.decode(errors="replace").strip()
                raise ConfigError(f"espeak-ng failed with status {done.returncode}: {reason:.200}")
            # Its header on a pipe gives no length.
            try:
                audio, rate = soundfile.read(io.BytesIO(done.stdout), dtype="float32")
            except soundfile.SoundFileError as error:
                raise ConfigError(f"espeak-ng gave no audio: {error}") from error
            yield self.vocoder.mel_to_copy(resample(audio, rate, self.vocoder.sample_rate))


def load_acoustic(name: str) -> Any:
    """An acoustic model of transformers, by folder or ORG/NAME, or a bundle of torchaudio by name.

    Raises:
        ConfigError: its package is missing, or there is no such model.
    """
    return Tacotron2(name) if name.startswith("TACOTRON2_") else TransformersModel(name)


class TransformersModel:
    """SpeechT5 or FastSpeech2Conformer, with the tokenizer beside it.

    SpeechT5 is given a speaker of zeros: the middle of the voices that it knows.
    """

    refine_steps = 0  # a mel that a network made is no target to be met

    def __init__(self, name: str) -> None:
        try:
            import transformers
        except ImportError as error:
            raise ConfigError(f"{name!r} needs transformers: pip install transformers") from error
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            self.model = transformers.AutoModelForTextToSpectrogram.from_pretrained(name).eval()
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ConfigError(f"{name!r} is no model of transformers: {reason:.300}") from error
        kind = self.model.config.model_type
        self.convention = {"speecht5": "speecht5"}.get(kind, "fastspeech2conformer")
        self.is_speecht5 = kind == "speecht5"

    @torch.no_grad()
    def mels(self, text: str, pace: float = 1.0, seed: int = 0) -> Iterator[Tensor]:
        """A mel (M, F) for each piece of a text."""
        if pace != 1:
            raise ConfigError(f"pace {pace}: a model of transformers speaks at its own, 1")
        torch.manual_seed(seed % 2**63)
        for piece in pieces_of(text):
            tokens = self.tokenizer(piece, return_tensors="pt")["input_ids"]
            if self.is_speecht5:
                speaker = torch.zeros(1, self.model.config.speaker_embedding_dim)
                yield self.model.generate_speech(tokens, speaker).T
            else:
                yield self.model(tokens, return_dict=True).spectrogram[0].T


class Tacotron2:
    """The acoustic half of a torchaudio bundle, by the bundle's name."""

    refine_steps = 0

    def __init__(self, name: str) -> None:
        try:
            from torchaudio import pipelines
        except (ImportError, OSError) as error:
            raise ConfigError(f"{name} needs a torchaudio that fits this torch: {error}") from error
        bundle = getattr(pipelines, name, None)
        if bundle is None:
            raise ConfigError(f"torchaudio has no bundle {name}")
        try:
            self.read, self.model = bundle.get_text_processor(), bundle.get_tacotron2()
        except (OSError, RuntimeError, ImportError) as error:
            raise ConfigError(f"cannot fetch the bundle {name}: {error}") from error
        self.convention = "torchaudio-wavernn" if "WAVERNN" in name else "torchaudio-griffinlim"

    @torch.no_grad()
    def mels(self, text: str, pace: float = 1.0, seed: int = 0) -> Iterator[Tensor]:
        """A mel (M, F) for each piece of a text."""
        if pace != 1:
            raise ConfigError(f"pace {pace}: a Tacotron 2 speaks at its own, 1")
        torch.manual_seed(seed % 2**63)
        for piece in pieces_of(text):
            tokens, n_tokens = self.read(piece)
            if not tokens.numel():
                raise ConfigError(f"{piece!r:.60} has no letter that this model knows")
            yield self.model.infer(tokens, n_tokens)[0][0]
