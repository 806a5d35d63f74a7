"""`waveflow bench`: how much faster than its plain path the engine runs a model here."""

import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, cast

import typer

from waveflow.cli import options
from waveflow.cli.console import counting, note, show_table
from waveflow.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from waveflow.engine.decoder import Precision
    from waveflow.engine.vocoder import Vocoder

PLAIN = "plain"


def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Models that ship, or folders of a checkpoint or run. Without it: the default.",
        ),
    ] = None,
    precision: Annotated[
        list[options.PrecisionName] | None,
        typer.Option("--precision", help="Of the engine; may be repeated. Without it: float32."),
    ] = None,
    seconds: Annotated[
        list[float] | None,
        typer.Option(
            "--seconds",
            min=0.05,
            max=600,
            metavar="X",
            help="Length of the audio; may be repeated. Without it: 1.",
        ),
    ] = None,
    threads: Annotated[
        int, typer.Option("--threads", min=1, max=1024, metavar="N", help="CPU threads.")
    ] = 1,
    device: options.Device = "cpu",
    runs: Annotated[
        int, typer.Option("--runs", min=1, metavar="N", help="Rounds, after one to warm up.")
    ] = 5,
    verify: options.Verify = True,
) -> None:
    """Speed of a model's engine beside its plain path, in each precision.

    The plain path is eager float32 with weight norm folded. All paths of a model take
    turns in one process. "x real time" is the median over the rounds; "x plain" the
    median and quartiles of how many times as fast as the plain path a path is within
    a round; "SNR" compares its draw with the plain path's for the same noise. With
    one thread the clock is the CPU's.

    \b
    Examples:
      waveflow bench
      waveflow bench runs/x --precision float32 --precision int8 --seconds 4
    """
    precisions = [p.value for p in precision or (options.PrecisionName.float32,)]
    if options.PrecisionName.auto in precisions:
        raise ConfigError("--precision auto: name the precisions, such as float32 and bfloat16")
    options.set_threads(threads)
    options.check_device(device)
    rows: list[Sequence[str]] = [("model", "path", "audio", "x real time", "x plain", "SNR dB")]
    with counting("calls") as progress:
        for name in dict.fromkeys(models or (None,)):
            paths = load_paths(name, precisions, device, verify)
            for length in seconds or (1.0,):
                rows += compare(name, paths, length, runs, progress)
    show_table(rows)


def load_paths(
    name: str | None, precisions: Sequence[str], device: str, verify: bool
) -> "dict[str, Vocoder]":
    """The plain path, and the engine in each precision that can run here."""
    from waveflow.engine.cost import plain_path
    from waveflow.engine.vocoder import load

    paths = {PLAIN: plain_path(load(name, verify, device))}
    for precision in dict.fromkeys(precisions):
        vocoder = load(name, verify, device, cast("Precision", precision))
        try:
            _ = vocoder.decoder
        except ConfigError as error:
            note(f"left out: engine {precision}: {error}")
        else:
            paths[f"engine {precision}"] = vocoder
    return paths


def compare(
    name: str | None,
    paths: "Mapping[str, Vocoder]",
    seconds: float,
    runs: int,
    progress: Callable[[int, int], None],
) -> list[Sequence[str]]:
    """A row of the table for each path of a model, at one length of audio."""
    import torch

    from waveflow.engine.cost import clip_mel, speed_ratio, take_turns, timed
    from waveflow.engine.vocoder import VocoderWarning
    from waveflow.metrics.spectral import signal_to_noise_db
    from waveflow.pretrained import DEFAULT_MODEL

    plain = paths[PLAIN]
    n_frames = max(1, round(seconds * plain.sample_rate / plain.hop_length))
    mel = clip_mel(plain, n_frames)
    audio_seconds = n_frames * plain.hop_length / plain.sample_rate

    def synthesis(vocoder: "Vocoder") -> "Tensor":
        # Copied, or an accelerator would still be at work when the clock is read.
        return vocoder(mel).cpu()

    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", VocoderWarning)
        works = {
            path: timed(partial(synthesis, vocoder), str(plain.device))
            for path, vocoder in paths.items()
        }
        times = take_turns(works, runs, progress)
        draws = {path: vocoder.draw(mel) for path, vocoder in paths.items()}
    rows: list[Sequence[str]] = []
    for path, own in times.items():
        cells = ("1", "")
        if path != PLAIN:
            snr_db = signal_to_noise_db(draws[PLAIN], draws[path])
            cells = (str(speed_ratio(times[PLAIN], own)), f"{snr_db:.0f}")
        speed = short(audio_seconds / statistics.median(own))
        rows.append((name or DEFAULT_MODEL, path, f"{seconds:g} s", speed, *cells))
    return rows


def short(value: float) -> str:
    """Three digits, never with an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
