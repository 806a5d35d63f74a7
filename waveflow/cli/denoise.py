"""`waveflow denoise`: removes a model's hum, or a recorded noise, from recordings."""

from collections.abc import Callable
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from waveflow.cli import options
from waveflow.cli.jobs import errors_of, note_about, plan_jobs, run_jobs, seconds
from waveflow.cli.synthesis import Audio, Recordings
from waveflow.errors import ConfigError

if TYPE_CHECKING:
    from waveflow.audio.denoise import Denoiser
    from waveflow.engine.vocoder import Vocoder


class Bias(StrEnum):
    """Values of `waveflow.audio.denoise.Bias`, here for --help without imports."""

    zeros = "zeros"
    normal = "normal"
    silence = "silence"


# For a model's bias NVIDIA's strength; of a recorded noise all is subtracted.
_MODEL_STRENGTH, _NOISE_STRENGTH = 0.1, 1.0
# Half a step of 16 bits.
_INAUDIBLE = 2.0**-16


def denoise(
    sources: Recordings,
    out: Audio,
    loading: options.Loading,
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength",
            min=0,
            max=10,
            metavar="X",
            help="How often the noise is subtracted. Default: 0.1, or 1 with --noise.",
        ),
    ] = None,
    bias: Annotated[
        Bias | None,
        typer.Option(
            "--bias",
            help="The mel in which the model's noise is heard: zeros or random values, as NVIDIA, "
            "or silence. Default: zeros for a WaveGlow, silence for others.",
        ),
    ] = None,
    noise: Annotated[
        Path | None,
        typer.Option(
            "--noise", metavar="WAV", help="A recording of noise alone, instead of a model's."
        ),
    ] = None,
    float32: options.Float = False,
    force: options.Force = False,
) -> None:
    """Subtracts the constant noise of a vocoder, or of a room, from recordings.

    With a model: for speech that it made, at its sample rate; the hum that it makes
    of an empty mel is subtracted. With --noise: for any recording, at its own rate,
    with a pause cut from it (a second is plenty). The result is as long as the
    recording. Several, or a folder with the folders in it, become a folder of .wav
    files; those that are there already are kept.

    \b
    Examples:
      waveflow denoise in.wav -o out.wav --noise pause.wav
      waveflow denoise in.wav -o out.wav --model waveglow/ --strength 0.05
      waveflow denoise spoken/ -o clean/ --model waveglow/ --bias silence
    """
    from waveflow.audio.io import check_audio_name, read_audio, write_audio
    from waveflow.files import AUDIO_SUFFIXES

    if noise is not None and (loading.model is not None or bias is not None):
        raise ConfigError("--noise takes the place of a model's: drop --model and --bias")
    jobs = plan_jobs(sources, out, AUDIO_SUFFIXES, ".wav", force)
    if jobs.names is None:
        check_audio_name(jobs.out, float32)
    denoiser_at: Callable[[int], Denoiser]
    if noise is None:
        wanted_rate, denoiser_at = _of_model(loading.load(), bias)
    else:
        options.set_threads(loading.threads)
        wanted_rate, denoiser_at = None, _of_noise(noise)
    if strength is None:
        strength = _MODEL_STRENGTH if noise is None else _NOISE_STRENGTH

    import numpy as np
    import torch

    def work(path: Path, target: Path) -> str:
        recording, rate, changes = read_audio(path, wanted_rate)
        note_about(path, changes)
        denoised = denoiser_at(rate)(torch.from_numpy(recording), strength).numpy()
        if np.abs(denoised - recording).max() < _INAUDIBLE:
            nothing = "nothing to hear was removed; --noise takes a recording of its noise"
            note_about(path, [nothing])
        write_audio(target, denoised, rate, float32)
        return seconds(len(denoised), rate)

    run_jobs(jobs, work)


def _of_model(vocoder: "Vocoder", bias: Bias | None) -> tuple[int, Callable[[int], "Denoiser"]]:
    """The model's sample rate, and a function of any rate that returns its denoiser."""
    denoiser = vocoder.denoiser(None if bias is None else bias.value)
    return vocoder.sample_rate, lambda rate: denoiser


def _of_noise(path: Path) -> Callable[[int], "Denoiser"]:
    """A function of a sample rate that returns the denoiser for a recorded noise."""
    import torch

    from waveflow.audio.denoise import Denoiser, n_fft_at
    from waveflow.audio.io import read_audio, resample

    noise, noise_rate, changes = read_audio(path)
    note_about(path, changes)

    @lru_cache
    def denoiser_at(rate: int) -> Denoiser:
        samples = noise if rate == noise_rate else resample(noise, noise_rate, rate)
        with errors_of(path):
            return Denoiser.of_noise(torch.from_numpy(samples), n_fft_at(rate))

    denoiser_at(noise_rate)  # a noise that is too short is an error before the first recording
    return denoiser_at
