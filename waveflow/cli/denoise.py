"""`waveflow denoise`: recordings without a model's hum, or without their own noise."""

from collections.abc import Callable
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from waveflow.cli import options
from waveflow.cli.console import note
from waveflow.cli.jobs import about, plan_jobs, run_jobs
from waveflow.cli.shards import local_device
from waveflow.cli.synthesis import Audio, Recordings
from waveflow.errors import ConfigError

if TYPE_CHECKING:
    from waveflow.audio.denoise import Denoiser
    from waveflow.engine.vocoder import Vocoder


class Bias(StrEnum):
    """Values of `waveflow.audio.denoise.Bias`, which --help must not import."""

    zeros = "zeros"
    normal = "normal"
    silence = "silence"


# NVIDIA's strength for the bias of a model; all of a noise that was recorded.
_MODEL_STRENGTH, _NOISE_STRENGTH = 0.1, 1.0
# Half a step of 16 bits.
_INAUDIBLE = 2.0**-16


def denoise(
    source: Recordings,
    out: Audio,
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength",
            min=0,
            max=10,
            metavar="X",
            help="How often the noise is subtracted. Without it: 0.1, or 1 with --noise.",
        ),
    ] = None,
    model: options.Model = None,
    bias: Annotated[
        Bias | None,
        typer.Option(
            "--bias",
            help="What the model is asked to say for its noise: a mel of zeros or random values, "
            "as NVIDIA, or silence. Without it: zeros for a WaveGlow, silence for others.",
        ),
    ] = None,
    noise: Annotated[
        Path | None,
        typer.Option(
            "--noise", metavar="WAV", help="A recording of noise alone, instead of a model's."
        ),
    ] = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    float32: options.Float = False,
    force: options.Force = False,
    verify: options.Verify = True,
) -> None:
    """Subtracts the constant noise of a vocoder, or of a room, from recordings.

    With a model: speech that it made, at its sample rate; what it says where it
    has nothing to say is subtracted. With --noise: any recording, at its own
    rate, and a pause cut from it (a second is plenty). The result is as long as
    the recording. A folder becomes a folder of .wav files; those that are there
    already are kept.

    \b
    Examples:
      waveflow denoise in.wav -o out.wav --noise pause.wav
      waveflow denoise in.wav -o out.wav --model waveglow/ --strength 0.05
      waveflow denoise spoken/ -o clean/ --model waveglow/ --bias silence
    """
    import numpy as np
    import torch

    from waveflow.audio.io import AUDIO_SUFFIXES, read_audio, write_audio

    if noise is not None and (model is not None or bias is not None):
        raise ConfigError("--noise takes the place of a model's: drop --model and --bias")
    jobs = plan_jobs(source, out, AUDIO_SUFFIXES, ".wav", force)
    options.set_threads(threads)
    denoiser_at: Callable[[int], Denoiser]
    if noise is None:
        wanted_rate, denoiser_at = _of_model(
            options.load_vocoder(model, local_device(device), verify=verify), bias
        )
    else:
        wanted_rate, denoiser_at = None, _of_noise(noise)
    if strength is None:
        strength = _MODEL_STRENGTH if noise is None else _NOISE_STRENGTH

    def work(path: Path, target: Path) -> None:
        recording, rate, changes = read_audio(path, wanted_rate)
        if changes:
            note(f"{path}: {', '.join(changes)}")
        denoised = denoiser_at(rate)(torch.from_numpy(recording), strength).numpy()
        if np.abs(denoised - recording).max() < _INAUDIBLE:
            note(f"{path}: nothing to hear was removed; --noise takes a recording of its noise")
        write_audio(target, denoised, rate, float32)

    run_jobs(jobs, work)


def _of_model(vocoder: "Vocoder", bias: Bias | None) -> tuple[int, Callable[[int], "Denoiser"]]:
    """The model's sample rate, and its denoiser, whatever the rate."""
    denoiser = vocoder.denoiser(None if bias is None else bias.value)
    return vocoder.sample_rate, lambda rate: denoiser


def _of_noise(path: Path) -> Callable[[int], "Denoiser"]:
    """Denoisers for a recorded noise, by sample rate."""
    import torch

    from waveflow.audio.denoise import Denoiser, n_fft_at
    from waveflow.audio.io import read_audio, resample

    noise, noise_rate, _ = read_audio(path)

    @lru_cache
    def denoiser_at(rate: int) -> Denoiser:
        samples = noise if rate == noise_rate else resample(noise, noise_rate, rate)
        with about(path):
            return Denoiser.of_noise(torch.from_numpy(samples), n_fft_at(rate))

    denoiser_at(noise_rate)  # a noise that is too short is known before the first recording
    return denoiser_at
