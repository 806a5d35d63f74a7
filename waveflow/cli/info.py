"""`waveflow info`: the models that ship, or the facts about one model or training cache."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from waveflow.cli import options
from waveflow.cli.console import note, show, show_table

if TYPE_CHECKING:
    from waveflow.audio.mel_config import MelConfig
    from waveflow.data.corpus import Split
    from waveflow.engine.vocoder import Vocoder
    from waveflow.model_files import ModelCard, Provenance


def info(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|CACHE",
            help="A model's name, here or on the Hugging Face Hub, or a checkpoint, run or cache "
            "folder.",
        ),
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

    Of a training cache: its clips, hours, corpora and sample rate.

    --speed times the copy-synthesis of a clip of 10 seconds: mel, draw and the
    model's refinement, on one CPU thread unless --threads says more. Loading is not
    timed. The result is the median of five runs.

    \b
    Examples:
      waveflow info
      waveflow info runs/x
      waveflow info data/lj
      waveflow info --speed
    """
    if model is None and not speed:
        _show_models(verify)
        return
    from waveflow.model_files import count_weights, read_card
    from waveflow.pretrained import model_folder

    if model is not None and (Path(model) / "f0.npy").is_file():
        _show_cache(Path(model))
        return
    folder = model_folder(model)
    card = read_card(folder, verify)
    _show_fact("model", f"{card.model.type}, {folder}")
    _show_fact("parameters", f"{count_weights(folder):,}")
    for name, value in _facts(card):
        _show_fact(name, value)
    # Everything above is read from the files. The rest needs torch and the network.
    vocoder = options.Loading(str(folder), threads=threads, verify=False).load()
    if speed:
        # First of all, since it also measures the first call.
        measured = _speed(vocoder, threads)
    _show_fact("multiply-adds", _cost(vocoder))
    if speed:
        _show_fact("speed", measured)


def _show_fact(name: str, value: str) -> None:
    show(f"{name:<16}{value}")


def _show_cache(folder: Path) -> None:
    from waveflow.data.cache import TrainingCache

    cache = TrainingCache(folder)
    _show_fact("training cache", str(folder))
    splits: dict[str, Split] = {"training": "train", "validation": "val"}
    for name, split in splits.items():
        clips = cache.clips(split)
        _show_fact(name, f"{len(clips)} clips, {cache.hours(split):.2f} hours")
    corpora = dict.fromkeys(clip.corpus for clip in cache.manifest.clips)
    _show_fact("corpora", ", ".join(corpora))
    given = cache.manifest.n_mels
    mels = "computed from the audio" if given is None else f"given, {given} bands"
    _show_fact("audio", f"{cache.sample_rate} Hz, hop {cache.hop_length}, mels {mels}")


def _show_models(verify: bool) -> None:
    from waveflow.model_files import count_weights, read_card
    from waveflow.pretrained import DEFAULT_MODEL, list_models, model_folder

    names = list_models()
    if not names:
        note("no model ships with this installation: train one, and give its folder as --model")
        return
    rows = [("model", "type", "parameters", "log-likelihood", "licence", "training data")]
    for name in names:
        folder = model_folder(name)
        card = read_card(folder, verify)
        row = (
            f"{name} (default)" if name == DEFAULT_MODEL else name,
            card.model.type,
            f"{count_weights(folder) / 1e6:.2f} M",
            _measured(card.provenance),
            card.provenance.licence or "not stated",
            card.provenance.data or "not stated",
        )
        rows.append(row)
    show_table(rows, n_left=len(rows[0]))


def _facts(card: "ModelCard") -> Iterator[tuple[str, str]]:
    from waveflow.model_files import LIKELIHOODS, LOG_LIKELIHOOD

    source, synthesis = card.provenance, card.synthesis
    yield "mel", _mel_words(card.mel)
    yield "synthesis", f"sigma {synthesis.sigma:g}, {synthesis.refine_steps} refinement steps"
    yield "training data", source.data or "not stated"
    yield "licence", source.licence or "not stated"
    stopped = f", all in the phase '{source.phase}': the flow is not trained yet"
    yield (
        "training",
        f"{source.steps:,} steps, {source.minutes:.0f} minutes{stopped if source.phase else ''}",
    )
    draws = "" if source.measure in LIKELIHOODS else f"{LOG_LIKELIHOOD} "
    yield (
        source.measure,
        f"{_number(source.log_likelihood)} on validation speech, "
        f"{draws}{_number(source.draw_log_likelihood)} on its own draws (nats per audio sample)",
    )


def _mel_words(mel: "MelConfig") -> str:
    from waveflow.audio.mel_config import MEL_PRESETS

    names = [name for name, preset in MEL_PRESETS.items() if preset == mel]
    return (
        f"{names[0] if names else 'its own settings'}: {mel.sample_rate} Hz, hop {mel.hop_length}, "
        f"{mel.n_mels} bands from {mel.f_min:g} to {mel.f_max_hz:g} Hz, n_fft {mel.n_fft}"
    )


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _measured(source: "Provenance") -> str:
    """The likelihood, or what was measured instead by its name."""
    from waveflow.model_files import LOG_LIKELIHOOD

    name = "" if source.measure == LOG_LIKELIHOOD else f" ({source.measure})"
    return _number(source.log_likelihood) + name


def _cost(vocoder: "Vocoder") -> str:
    from waveflow.engine.cost import macs_per_second

    billions = macs_per_second(vocoder) / 1e9
    return f"{billions:.3g} billion per second of audio (refinement not counted)"


def _speed(vocoder: "Vocoder", threads: int) -> str:
    from waveflow.engine.cost import measure_speed

    speed = measure_speed(vocoder, threads=threads)
    return (
        f"{speed.times_real_time:.1f} times real time on {speed.threads} CPU "
        f"thread{'s' if speed.threads > 1 else ''} ({speed.clip_seconds:.0f}-second clip, "
        f"{vocoder.refine_steps} refinement steps, median of {speed.runs}; "
        f"first call {speed.first_call_seconds:.2f} s)"
    )
