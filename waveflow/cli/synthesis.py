"""`waveflow vocode`, `resynth` and `mel`: files to files, or pipes to pipes."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from waveflow.cli import options
from waveflow.cli.console import note
from waveflow.cli.jobs import about, plan_jobs, run_jobs
from waveflow.cli.shards import check_alone, local_device
from waveflow.errors import ConfigError, MelMismatchError

if TYPE_CHECKING:
    import numpy as np

    from waveflow.audio.mel import MelConfig

PIPE = Path("-")

Recordings = Annotated[
    Path, typer.Argument(metavar="WAV|FOLDER", help="A recording, or a folder of them.")
]
Audio = Annotated[
    Path,
    typer.Option("-o", "--out", metavar="OUT", help="A .wav or .flac file; a folder for a folder."),
]


def vocode(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="MEL|FOLDER|-", help="A .npy, .npz or .pt file, a folder of them, or stdin."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            metavar="OUT",
            help="A .wav or .flac file; a folder for a folder; - for stdout.",
        ),
    ],
    model: options.Model = None,
    sigma: options.Sigma = None,
    refine: options.Refine = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    precision: options.Precision = options.PrecisionName.float32,
    compile: options.Compile = False,
    denoise: options.Denoise = None,
    float32: options.Float = False,
    force: options.Force = False,
    verify: options.Verify = True,
) -> None:
    """Mel spectrograms to speech.

    A mel is an array (bands, frames) of natural logarithms: .npy, .npz with one
    array or one named `mel`, or .pt with one tensor. A folder becomes a folder of
    .wav files; those that are there already are kept. The processes of a torchrun
    share the folder, each with a GPU of its own for --device cuda.

    With `-` for the input, .npy arrays are read from stdin, one after another, as
    numpy.save writes them: pieces of one mel, spoken as soon as they are final.
    With `-o -`, samples go to stdout as they are made, without a header: 16-bit
    integers, or 32-bit floats with --float, little-endian, one channel.

    \b
    Examples:
      waveflow vocode mel.npy -o out.wav
      waveflow vocode mel.npy -o out.flac --sigma 0.8 --seed 1
      waveflow vocode mels/ -o wavs/ --model runs/x --device cuda
      cat mel.npy | waveflow vocode - -o - | aplay -t raw -f S16_LE -r 22050
    """
    from waveflow.audio.io import (
        MEL_SUFFIXES,
        check_audio_name,
        read_mel,
        read_mels,
        write_audio,
    )

    device = local_device(device)
    if PIPE in (source, out):
        check_alone("a pipe")
        if denoise is not None:
            raise ConfigError("--denoise works on whole files, not on a pipe: leave it out")
        if source.is_dir():
            raise ConfigError(f"{source} is a folder: name a folder for its outputs, not -")
        if source != PIPE and not source.exists():
            raise MelMismatchError(f"{source} does not exist")
        if out != PIPE:
            check_audio_name(out, float32)
            options.check_writable(out)
        for stream in (sys.stdin, sys.stdout):
            if stream is None:
                raise ConfigError("- stands for stdin and stdout, and one of them is closed")
        vocoder = options.load_vocoder(model, device, threads, verify, precision, compile)
        name = "stdin" if source == PIPE else str(source)
        mels = read_mels(sys.stdin.buffer) if source == PIPE else [read_mel(source)]
        with _opened(out, vocoder.sample_rate, float32) as write, about(name):
            for piece in vocoder.stream(mels, sigma=sigma, seed=seed, refine=refine):
                write(piece.cpu().numpy())
        return
    jobs = plan_jobs(source, out, MEL_SUFFIXES, ".wav", force)
    if not source.is_dir():
        check_audio_name(out, float32)
    vocoder = options.load_vocoder(model, device, threads, verify, precision, compile)

    def work(path: Path, target: Path) -> None:
        mel = read_mel(path)
        with about(path):
            audio = vocoder(mel, sigma=sigma, seed=seed, refine=refine)
            if denoise is not None:
                audio = vocoder.denoise(audio, denoise)
        write_audio(target, audio.cpu().numpy(), vocoder.sample_rate, float32)

    run_jobs(jobs, work)


@contextmanager
def _opened(out: Path, sample_rate: int, float32: bool) -> "Iterator[Callable[[np.ndarray], None]]":
    """Gives a function that writes the next audio to a file, or as raw samples to stdout."""
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
        # Who listened has heard enough. What Python flushes as it ends must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise ConfigError(f"cannot write to stdout: {error.strerror}") from error


def resynth(
    source: Recordings,
    out: Audio,
    model: options.Model = None,
    sigma: options.Sigma = None,
    refine: options.Refine = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    precision: options.Precision = options.PrecisionName.float32,
    compile: options.Compile = False,
    denoise: options.Denoise = None,
    float32: options.Float = False,
    force: options.Force = False,
    verify: options.Verify = True,
) -> None:
    """Copy-synthesis: a recording's mel, then new speech from the mel alone.

    The copy has the recording's length, at the model's sample rate. Other rates are
    resampled and channels mixed down. A folder becomes a folder of .wav files;
    those that are there already are kept. The processes of a torchrun share the
    folder, each with a GPU of its own for --device cuda.

    \b
    Examples:
      waveflow resynth in.wav -o out.wav
      waveflow resynth in.wav -o out.wav --refine 0 --float
      waveflow resynth recordings/ -o copies/ --threads 1
    """
    from waveflow.audio.io import AUDIO_SUFFIXES, check_audio_name, read_audio, write_audio

    jobs = plan_jobs(source, out, AUDIO_SUFFIXES, ".wav", force)
    if not source.is_dir():
        check_audio_name(out, float32)
    vocoder = options.load_vocoder(model, local_device(device), threads, verify, precision, compile)

    def work(path: Path, target: Path) -> None:
        recording, _, changes = read_audio(path, vocoder.sample_rate)
        _note_changes(path, changes)
        with about(path):
            audio = vocoder.resynth(recording, sigma=sigma, seed=seed, refine=refine)
            if denoise is not None:
                audio = vocoder.denoise(audio, denoise)
        write_audio(target, audio.cpu().numpy(), vocoder.sample_rate, float32)

    run_jobs(jobs, work)


def mel(
    source: Recordings,
    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="OUT", help="A .npy file; a folder for a folder."),
    ],
    model: options.Model = None,
    preset: Annotated[
        options.MelPreset | None,
        typer.Option("--preset", help="Mel settings by name instead of a model's."),
    ] = None,
    threads: options.Threads = None,
    force: options.Force = False,
) -> None:
    """Recordings to mel spectrograms, as a model takes them.

    Writes an array (bands, frames), float32, natural logarithms. Other sample
    rates are resampled and channels mixed down.

    \b
    Examples:
      waveflow mel in.wav -o mel.npy
      waveflow mel in.wav -o mel.npy --preset nvidia
      waveflow mel recordings/ -o mels/ --model runs/x
    """
    import torch

    from waveflow.audio.io import AUDIO_SUFFIXES, read_audio, write_mel
    from waveflow.audio.mel import MelSpectrogram

    jobs = plan_jobs(source, out, AUDIO_SUFFIXES, ".npy", force)
    config = _mel_config(model, preset)
    options.set_threads(threads)
    spectrogram = MelSpectrogram(config)

    def work(path: Path, target: Path) -> None:
        recording, _, changes = read_audio(path, config.sample_rate)
        _note_changes(path, changes)
        write_mel(target, spectrogram(torch.from_numpy(recording)).numpy())

    run_jobs(jobs, work)


def _mel_config(model: str | None, preset: options.MelPreset | None) -> "MelConfig":
    from waveflow.audio.mel import MEL_PRESETS

    if preset is None:
        return options.read_config(model).mel
    if model is not None:
        raise ConfigError("--model and --preset both choose the mel settings: give one of them")
    return MEL_PRESETS[preset]


def _note_changes(path: Path, changes: list[str]) -> None:
    if changes:
        note(f"{path}: {', '.join(changes)}")
