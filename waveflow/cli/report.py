"""`waveflow evaluate` and `info`: figures of a model."""

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from waveflow.cli import options
from waveflow.cli.console import note
from waveflow.cli.shards import join_group, local_device, merge

if TYPE_CHECKING:
    from rich.table import Table

    from waveflow.audio.mel import MelConfig
    from waveflow.engine.vocoder import Vocoder

# Wide enough for all figures; a terminal's own width is taken where there is one.
PAGE_WIDTH = 120


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Recordings.")],
    model: options.Model = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write the figures as JSON."),
    ] = None,
    ids: Annotated[
        Path | None,
        typer.Option("--ids", metavar="FILE", help="Only these files: names without suffix."),
    ] = None,
    seed: options.Seed = 0,
    sigma: options.Sigma = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    verify: options.Verify = True,
) -> None:
    """Copy-synthesises recordings and measures the copies.

    PESQ, STOI, log-mel distance, voicing and F0, DNSMOS, with and without mel
    refinement, beside Griffin-Lim; and the likelihood of the speech and of the
    model's own draws. Figures need packages: pip install 'waveflow[eval]'; one
    whose package is missing is left out. The processes of a torchrun share the
    recordings, each with a GPU of its own for --device cuda.

    \b
    Examples:
      waveflow evaluate recordings/
      waveflow evaluate kathleen/wavs --ids kathleen/val.txt --json figures.json
    """
    from waveflow.audio.io import AUDIO_SUFFIXES, atomic_path, list_inputs
    from waveflow.engine.vocoder import VocoderWarning
    from waveflow.metrics.evaluate import CLIPS, measure_clips, select_ids, summarise

    files = list_inputs(folder, AUDIO_SUFFIXES)
    if ids is not None:
        files = select_ids(files, ids)
    if json_file is not None:
        options.check_writable(json_file)
    group = join_group()
    vocoder = options.load_vocoder(model, local_device(device), threads, verify)
    with group.counting("clips") as progress, warnings.catch_warnings():
        # One line for each clipped copy would drown the table.
        warnings.simplefilter("ignore", VocoderWarning)
        clips = measure_clips(vocoder, group.share(files), seed, progress, sigma)
    shares = group.gather("clips", CLIPS.dump_python(clips))
    if shares is None:
        return
    result = summarise(CLIPS.validate_python(merge(shares)), vocoder.sample_rate, seed, sigma)
    if json_file is not None:
        with atomic_path(json_file) as temporary:
            temporary.write_text(result.to_json() + "\n")
    _print_table(result.table())
    print(
        f"log-likelihood, nats per sample: speech {result.log_prob_speech:.4f}, "
        f"own draws {result.log_prob_draw:.4f}"
    )
    if result.draw_correlation is not None:
        print(f"correlation of two draws: {result.draw_correlation:.3f}")
    if result.missing:
        note(f"left out, their packages are missing: {', '.join(result.missing)}")
    for bad in result.bad_files:
        note(bad.message)
    if result.bad_files:
        raise typer.Exit(2)


def info(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A model's name, or a checkpoint or run folder."),
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Measure the speed of MODEL, or of the default.")
    ] = False,
    threads: Annotated[
        int,
        typer.Option("--threads", min=1, max=1024, metavar="N", help="CPU threads for --speed."),
    ] = 1,
    verify: options.Verify = True,
) -> None:
    """The models that ship, or one model: its size, mel settings, data, likelihood.

    --speed times the copy-synthesis of a clip of 10 seconds: mel, draw and the
    model's refinement, on one CPU thread unless --threads says more. The model is
    loaded before, and the median of five runs is printed.

    \b
    Examples:
      waveflow info
      waveflow info runs/x
      waveflow info --speed
    """
    if model is None and not speed:
        _list_models()
        return
    vocoder = options.load_vocoder(model, threads=threads, verify=verify)
    # Measured before anything else has warmed the model up, for the time of the first call.
    measured = _speed(vocoder, threads) if speed else None
    for name, value in _facts(vocoder, model).items():
        print(f"{name:<16}{value}")
    if measured is not None:
        print(f"{'speed':<16}{measured}")


def _list_models() -> None:
    from rich.table import Table

    from waveflow.engine.cost import count_parameters
    from waveflow.engine.vocoder import load
    from waveflow.pretrained import DEFAULT_MODEL, list_models

    names = list_models()
    if not names:
        note("no model ships with this installation: train one, and give its folder as --model")
        return
    table = Table("model", "type", "parameters", "log-likelihood", "licence", "training data")
    for name in names:
        vocoder = load(name)
        source = vocoder.config.provenance
        table.add_row(
            f"{name} (default)" if name == DEFAULT_MODEL else name,
            vocoder.config.model.type,
            f"{count_parameters(vocoder.flow) / 1e6:.2f} M",
            _number(source.log_likelihood),
            source.licence or "not stated",
            source.data or "not stated",
        )
    _print_table(table)


def _facts(vocoder: "Vocoder", model: str | None) -> dict[str, str]:
    from waveflow.checkpoint import resolve_run
    from waveflow.engine.cost import count_parameters, macs_per_second
    from waveflow.pretrained import model_folder

    config = vocoder.config
    source, synthesis = config.provenance, config.synthesis
    return {
        "model": f"{config.model.type}, {resolve_run(model_folder(model), 'best')}",
        "parameters": f"{count_parameters(vocoder.flow):,}",
        "multiply-adds": (
            f"{macs_per_second(vocoder) / 1e9:.3g} billion per second of audio "
            "(refinement not counted)"
        ),
        "mel": _mel_words(config.mel),
        "synthesis": f"sigma {synthesis.sigma:g}, {synthesis.refine_steps} refinement steps",
        "training data": source.data or "not stated",
        "licence": source.licence or "not stated",
        "training": f"{source.steps:,} steps, {source.minutes:.0f} minutes",
        "log-likelihood": (
            f"{_number(source.log_likelihood)} on validation speech, "
            f"{_number(source.draw_log_likelihood)} on its own draws (nats per audio sample)"
        ),
    }


def _speed(vocoder: "Vocoder", threads: int) -> str:
    from waveflow.engine.cost import measure_speed

    speed = measure_speed(vocoder, threads=threads)
    return (
        f"{speed.times_real_time:.1f} times real time on {speed.threads} CPU "
        f"thread{'s' if speed.threads > 1 else ''} ({speed.clip_seconds:.0f}-second clip, "
        f"{vocoder.refine_steps} refinement steps, median of {speed.runs}; "
        f"first call {speed.first_call_seconds:.2f} s)"
    )


def _mel_words(mel: "MelConfig") -> str:
    from waveflow.audio.mel import MEL_PRESETS

    names = [name for name, preset in MEL_PRESETS.items() if preset == mel]
    return (
        f"{names[0] if names else 'its own settings'}: {mel.sample_rate} Hz, hop {mel.hop_length}, "
        f"{mel.n_mels} bands from {mel.f_min:g} to {mel.f_max_hz:g} Hz, n_fft {mel.n_fft}"
    )


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _print_table(table: "Table") -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else PAGE_WIDTH).print(table)
