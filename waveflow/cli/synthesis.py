"""`waveflow vocode`, `resynth` and `mel`: between recordings, mels and speech."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from waveflow.cli import options
from waveflow.cli.ahead import Steps
from waveflow.cli.console import closed
from waveflow.cli.jobs import (
    about,
    errors_of,
    note_about,
    note_written,
    plan_jobs,
    run_jobs,
    seconds,
)
from waveflow.errors import ConfigError, MelMismatchError, WaveflowError
from waveflow.processes import check_alone

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from waveflow.audio.mel_config import MelConfig
    from waveflow.engine.options import SynthesisOptions
    from waveflow.engine.vocoder import Vocoder
    from waveflow.export.runtime import OnnxVocoder

PIPE = Path("-")
_TORCH_ONLY = ("precision", "compile", "denoise", "device")

Recordings = Annotated[
    list[Path],
    typer.Argument(metavar="WAV|FOLDER...", help="A recording, several, or a folder of them."),
]
# A text, since a path forgets the slash at its end.
Audio = Annotated[
    str,
    typer.Option("-o", "--out", metavar="OUT", help="A .wav or .flac file; or a folder, for many."),
]


@dataclass(frozen=True)
class Speaking(options.Sampling, options.Loading):
    """The options of verbs that write speech."""

    precision: options.Precision = options.PrecisionName.float32
    compile: options.Compile = False
    denoise: options.Denoise = None
    float32: options.Float = False
    force: options.Force = False

    def options(self) -> "SynthesisOptions":
        """Returns the options of the Python API; the mel is the model's own."""
        return self.sampling().changed({"convention": "native"})

    def vocoder(self) -> "Vocoder":
        """Loads the vocoder, after a check of the options."""
        self.options()
        return self.load(self.precision, self.compile)

    def speak(
        self,
        vocoder: "Vocoder | OnnxVocoder",
        mel: "np.ndarray | Tensor",
        source: Path,
        n_samples: int | None = None,
    ) -> "np.ndarray":
        """Returns the first samples of a mel's speech; notes and errors name the source."""
        from waveflow.engine.checks import as_array

        with errors_of(source):
            speech = vocoder.synthesise(mel, self.options())
            audio = self.denoised(vocoder, speech.audio[:n_samples])
        note_about(source, speech.notes)
        return as_array(audio)

    def speak_all(
        self, vocoder: "Vocoder", sources: Sequence[Path], mels: "Sequence[np.ndarray]"
    ) -> "Iterator[tuple[int, np.ndarray | Exception]]":
        """Yields the number of each mel with its speech, or the error about it."""
        from waveflow.engine.checks import as_array
        from waveflow.engine.together import batches, speak_together

        for batch in batches([mel.shape[1] for mel in mels], vocoder.device.type):
            wanted = [self.options()] * len(batch)
            found = speak_together(vocoder, [mels[i] for i in batch], wanted)
            for i, speech in zip(batch, found, strict=True):
                try:
                    if isinstance(speech, Exception):
                        raise speech
                    audio = as_array(self.denoised(vocoder, speech.audio))
                except WaveflowError as error:
                    yield i, about(sources[i], error)
                except Exception as error:
                    yield i, error
                else:
                    note_about(sources[i], speech.notes)
                    yield i, audio

    def denoised(self, vocoder: "Vocoder | OnnxVocoder", audio: Any) -> Any:
        """The audio without the model's hum, if that is wanted."""
        if self.denoise is None:
            return audio
        return cast("Vocoder", vocoder).denoise(audio, self.denoise)


@dataclass(frozen=True)
class Vocoding(Speaking):
    """The options of `vocode`: those of speech, what the mels are in, and what runs the model."""

    backend: options.Backend = options.BackendName.torch
    convention: options.Convention = None
    time_major: options.TimeMajorOption = options.TimeMajor.no
    lossy: options.Lossy = False
    look_ahead: options.LookAhead = None

    def options(self) -> "SynthesisOptions":
        """Returns the options of the Python API."""
        return self.sampling().changed(
            {
                "convention": self.convention,
                "time_major": options.axes(self.time_major),
                "lossy": self.lossy,
                "look_ahead": self.look_ahead,
            }
        )

    def speaker(self) -> "Vocoder | OnnxVocoder":
        """Loads what speaks, after a check of the options."""
        if self.backend == options.BackendName.torch:
            return self.vocoder()
        self.options()
        for field in fields(self):
            if field.name in _TORCH_ONLY and getattr(self, field.name) != field.default:
                raise ConfigError(f"--{field.name} is not for --backend onnx: leave it out")
        if self.model is None or not self.model.endswith(".onnx"):
            raise ConfigError(
                f"--backend onnx takes a .onnx file, not {self.model or 'the model that ships'}: "
                "make one by `waveflow export`"
            )
        from waveflow.export.runtime import OnnxVocoder

        return OnnxVocoder(Path(self.model), self.threads)


def vocode(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="MEL|FOLDER|-...",
            help="A .npy, .npz or .pt file, several, a folder of them, or stdin.",
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            "-o",
            "--out",
            metavar="OUT",
            help="A .wav or .flac file; or a folder, for many; - for stdout.",
        ),
    ],
    speaking: Vocoding,
) -> None:
    """Mel spectrograms to speech.

    A mel is an array (bands, frames) of natural logarithms: .npy, .npz with one
    array or one named `mel`, or .pt with one tensor or one named `mel`. Mels of
    another convention need --convention. Several, or a folder with the folders in
    it, become a folder of .wav files; those that are there already are kept. Under
    torchrun the processes share the folder, and --device cuda gives each its own
    GPU.

    With `-` for the input, .npy arrays are read from stdin, one after another, as
    numpy.save writes them. They are pieces of one mel, and are spoken as soon as
    the audio is final. With `-o -`, samples go to stdout as they are made, without
    a header: 16-bit integers, or 32-bit floats with --float, little-endian, one
    channel.

    \b
    Examples:
      waveflow vocode mel.npy -o out.wav
      waveflow vocode mel.npy -o out.flac --sigma 0.8 --seed 1
      waveflow vocode a.npy b.npy -o wavs/
      waveflow vocode mels/ -o wavs/ --model runs/x --device cuda
      waveflow vocode mel.npy -o out.wav --convention log10 --time-major yes
      waveflow vocode mel.npy -o out.wav --backend onnx --model frameglow.onnx
      cat mel.npy | waveflow vocode - -o - | aplay -t raw -f S16_LE -r 22050
      cat mel.npy | waveflow vocode - -o out.wav --look-ahead 0.3
    """
    from waveflow.audio.io import MEL_SUFFIXES, check_audio_name, read_mel, write_audio

    if PIPE in (*sources, Path(out)):
        if len(sources) > 1:
            raise ConfigError(f"- takes one input, not {len(sources)}: name a folder with -o")
        _stream(sources[0], Path(out), speaking)
        return
    if speaking.look_ahead is not None:
        raise ConfigError("--look-ahead is for a pipe; a file waits for nothing: leave it out")
    jobs = plan_jobs(sources, out, MEL_SUFFIXES, ".wav", speaking.force)
    if jobs.names is None:
        check_audio_name(jobs.out, speaking.float32)
    vocoder = speaking.speaker()

    def work(path: Path, target: Path) -> str:
        audio = speaking.speak(vocoder, read_mel(path), path)
        write_audio(target, audio, vocoder.sample_rate, speaking.float32)
        return seconds(len(audio), vocoder.sample_rate)

    def make(
        paths: Sequence[Path], mels: Sequence["np.ndarray"]
    ) -> "Iterator[tuple[int, np.ndarray | Exception]]":
        return speaking.speak_all(cast("Vocoder", vocoder), paths, mels)

    def write(target: Path, audio: "np.ndarray") -> None:
        write_audio(target, audio, vocoder.sample_rate, speaking.float32)

    is_graph = speaking.backend == options.BackendName.onnx
    run_jobs(jobs, work, None if is_graph else Steps(read_mel, make, write))


def _stream(source: Path, out: Path, speaking: Vocoding) -> None:
    """Does `vocode` where the source or the output is a pipe."""
    from waveflow.audio.io import check_audio_name, read_mel, read_mels

    check_alone("a pipe")
    if speaking.backend == options.BackendName.onnx:
        raise ConfigError("a graph speaks a mel as a whole: --backend onnx takes no pipe")
    if speaking.denoise is not None:
        raise ConfigError("--denoise works on whole files, not on a pipe: leave it out")
    if source.is_dir():
        raise ConfigError(f"{source} is a folder: name a folder for its outputs, not -")
    if source != PIPE and not source.exists():
        raise MelMismatchError(f"{source} does not exist")
    if out != PIPE:
        check_audio_name(out, speaking.float32)
        options.check_writable(out)
    for path, stream in ((source, "stdin"), (out, "stdout")):
        if path == PIPE and stream in closed:
            raise ConfigError(f"- stands for {stream} here, which is closed")
    vocoder = speaking.vocoder()
    name = "stdin" if source == PIPE else str(source)
    mels = read_mels(sys.stdin.buffer) if source == PIPE else [read_mel(source)]

    def on_note(message: str) -> None:
        note_about(name, [message])

    n_samples = 0
    with opened(out, vocoder.sample_rate, speaking.float32) as write, errors_of(name):
        for piece in vocoder.stream(mels, speaking.options(), on_note=on_note):
            write(piece.cpu().numpy())
            n_samples += len(piece)
    if out != PIPE:
        note_written(out, seconds(n_samples, vocoder.sample_rate))


@contextmanager
def opened(out: Path, sample_rate: int, float32: bool) -> "Iterator[Callable[[np.ndarray], None]]":
    """Yields a function that writes the next audio to a file, or as raw samples to stdout."""
    from waveflow.audio.io import open_audio, to_int16

    if out != PIPE:
        with open_audio(out, sample_rate, float32) as write_to_file:
            yield write_to_file
        return

    def write(audio: "np.ndarray") -> None:
        samples = audio.astype("<f4") if float32 else to_int16(audio).astype("<i2")
        sys.stdout.buffer.write(samples.tobytes())
        sys.stdout.buffer.flush()

    try:
        yield write
    except BrokenPipeError:
        # The listener has closed the pipe. Python flushes stdout as it ends, which must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise ConfigError(f"cannot write to stdout: {error.strerror}") from error


def resynth(sources: Recordings, out: Audio, speaking: Speaking) -> None:
    """Copy-synthesis: a recording's mel, then new speech from the mel alone.

    The copy has the recording's length, at the model's sample rate. Other rates are
    resampled and channels mixed down. Several, or a folder with the folders in it,
    become a folder of .wav files; those that are there already are kept. Under
    torchrun the processes share the folder, and --device cuda gives each its own
    GPU.

    \b
    Examples:
      waveflow resynth in.wav -o out.wav
      waveflow resynth in.wav -o out.wav --refine 0 --float
      waveflow resynth recordings/ -o copies/ --threads 1
    """
    from waveflow.audio.io import check_audio_name, read_audio, write_audio
    from waveflow.files import AUDIO_SUFFIXES

    jobs = plan_jobs(sources, out, AUDIO_SUFFIXES, ".wav", speaking.force)
    if jobs.names is None:
        check_audio_name(jobs.out, speaking.float32)
    vocoder = speaking.vocoder()

    def work(path: Path, target: Path) -> str:
        recording, _, changes = read_audio(path, vocoder.sample_rate)
        note_about(path, changes)
        mel = vocoder.mel_to_copy(recording)
        audio = speaking.speak(vocoder, mel, path, len(recording))
        write_audio(target, audio, vocoder.sample_rate, speaking.float32)
        return seconds(len(audio), vocoder.sample_rate)

    run_jobs(jobs, work)


def mel(
    sources: Recordings,
    out: Annotated[
        str,
        typer.Option(
            "-o", "--out", metavar="OUT", help="A .npy, .npz or .pt file; or a folder, for many."
        ),
    ],
    model: options.Model = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--mel",
            "--preset",
            metavar="NAME",
            help="Mel settings by name instead of a model's: hifigan, nvidia, coqui, ...",
        ),
    ] = None,
    threads: options.Threads = None,
    force: options.Force = False,
) -> None:
    """Recordings to mel spectrograms, as a model takes them.

    Writes an array (bands, frames), float32, natural logarithms unless --mel names
    a system with others: .npy, .npz (the array is named `mel`) or .pt (a tensor).
    Several, or a folder with the folders in it, become a folder of .npy files. Other
    sample rates are resampled and channels mixed down.

    \b
    Examples:
      waveflow mel in.wav -o mel.npy
      waveflow mel in.wav -o mel.npy --mel nvidia
      waveflow mel recordings/ -o mels/ --model runs/x
    """
    from waveflow.audio.io import check_mel_name, read_audio, write_mel
    from waveflow.files import AUDIO_SUFFIXES

    jobs = plan_jobs(sources, out, AUDIO_SUFFIXES, ".npy", force)
    if jobs.names is None:
        check_mel_name(jobs.out)
    config = _mel_config(model, preset)

    import torch

    from waveflow.audio.mel import MelSpectrogram

    options.set_threads(threads)
    spectrogram = MelSpectrogram(config)

    def work(path: Path, target: Path) -> str:
        recording, _, changes = read_audio(path, config.sample_rate)
        note_about(path, changes)
        result = spectrogram(torch.from_numpy(recording)).numpy()
        write_mel(target, result)
        return f"{result.shape[0]} bands, {result.shape[1]} frames"

    run_jobs(jobs, work)


def _mel_config(model: str | None, preset: str | None) -> "MelConfig":
    from waveflow.model_files import read_card
    from waveflow.pretrained import model_folder

    if preset is None:
        return read_card(model_folder(model)).mel
    if model is not None:
        raise ConfigError("--model and --mel both choose the mel settings: give one of them")
    return options.preset_named(preset)
