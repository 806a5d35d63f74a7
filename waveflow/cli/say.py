"""`waveflow say`: text to speech."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from waveflow.cli import options
from waveflow.cli.console import closed
from waveflow.cli.jobs import note_about, note_written, seconds
from waveflow.cli.synthesis import PIPE, opened
from waveflow.errors import ConfigError
from waveflow.pretrained import voice_folder
from waveflow.processes import check_alone

if TYPE_CHECKING:
    from waveflow.tts.speaker import Acoustic


# Of a text that ends no sentence, which are then spoken at once.
_MOST_LINES = 100


@dataclass(frozen=True)
class Saying(options.Sampling, options.Loading):
    """The options of `say` that belong to the vocoder."""

    precision: options.Precision = options.PrecisionName.float32
    lossy: options.Lossy = False
    float32: options.Float = False


def say(
    text: Annotated[str, typer.Argument(metavar="TEXT|-", help="English text, or stdin.")],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="OUT", help="A .wav or .flac file, or - for stdout."),
    ],
    saying: Saying,
    voice: Annotated[
        str | None,
        typer.Option(
            "--voice",
            metavar="NAME|FOLDER|espeak",
            help="A voice that ships, a folder of recipes/tts/train.py, or espeak: the program "
            "espeak-ng, re-voiced.",
        ),
    ] = None,
    acoustic: Annotated[
        str | None,
        typer.Option(
            "--acoustic",
            metavar="NAME",
            help="Instead of a voice: a model of transformers, by folder or ORG/NAME, or a "
            "TACOTRON2_... bundle of torchaudio.",
        ),
    ] = None,
    pace: Annotated[
        float, typer.Option("--pace", min=0.25, max=4, metavar="X", help="2 is twice as fast.")
    ] = 1.0,
) -> None:
    """Text to speech.

    Numbers, dates and abbreviations are read as words. A long text is spoken a
    sentence at a time. With `-` the text comes from stdin: what ends in a full stop
    or an empty line is spoken at once. With `-o -`, samples go to stdout as they are
    made, without a header: 16-bit integers, or 32-bit floats with --float,
    little-endian, one channel.

    \b
    Examples:
      waveflow say "Good morning." -o out.wav
      waveflow say "Good morning." -o out.wav --pace 1.2 --seed 1
      cat book.txt | waveflow say - -o - | aplay -t raw -f S16_LE -r 22050
      waveflow say "Good morning." -o out.wav --voice espeak
      waveflow say "Hello." -o out.wav --acoustic microsoft/speecht5_tts --lossy
    """
    from waveflow.audio.io import check_audio_name

    check_alone("a text")
    if voice is not None and acoustic is not None:
        raise ConfigError("--voice and --acoustic both make the mels: give one of them")
    if out != PIPE:
        check_audio_name(out, saying.float32)
        options.check_writable(out)
    elif "stdout" in closed:
        raise ConfigError("- stands for stdout here, which is closed")
    changed = saying.sampling().changed({"lossy": saying.lossy})
    texts = _texts_of_stdin() if text == "-" else iter([text])
    first = next(texts, "")
    if not first.strip():
        raise ConfigError("there is no text to say")
    if acoustic is None and voice != "espeak":
        voice_folder(voice)  # a wrong name is an error before torch is imported
    vocoder = saying.load(saying.precision)
    from waveflow.tts.speaker import load_speaker

    speaker = load_speaker(voice if acoustic is None else _loaded(acoustic), vocoder)

    def all_texts() -> Iterator[str]:
        yield first
        yield from texts

    notes: dict[str, None] = {}
    n_samples = 0
    with opened(out, speaker.sample_rate, saying.float32) as write:
        for piece in speaker.stream(all_texts(), changed, pace, notes.setdefault):
            write(piece)
            n_samples += len(piece)
    note_about("speech", list(notes))
    if out != PIPE:
        note_written(out, seconds(n_samples, speaker.sample_rate))


def _loaded(name: str) -> "Acoustic":
    from waveflow.tts.foreign import load_acoustic

    return load_acoustic(name)


def _texts_of_stdin() -> Iterator[str]:
    """Whole sentences, as soon as a line of stdin ends one."""
    from waveflow.tts.text import ends_sentence

    waiting: list[str] = []
    try:
        for line in sys.stdin:
            waiting.append(line)
            if not line.strip() or ends_sentence(line) or len(waiting) == _MOST_LINES:
                if text := "".join(waiting).strip():
                    yield text
                waiting.clear()
    except UnicodeDecodeError as error:
        raise ConfigError(f"stdin is no text in {error.encoding}: {error.reason}") from error
    if text := "".join(waiting).strip():
        yield text
