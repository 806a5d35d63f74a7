"""`waveflow evaluate`: measures the copy-synthesis of recordings."""

import warnings
from pathlib import Path
from typing import Annotated

import typer

from waveflow.cli import options
from waveflow.cli.console import counting, note, show, show_table
from waveflow.cli.jobs import note_left_out
from waveflow.processes import join_group, merge


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Recordings.")],
    loading: options.Loading,
    sampling: options.Sampling,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write the figures as JSON."),
    ] = None,
    ids: Annotated[
        Path | None,
        typer.Option("--ids", metavar="FILE", help="Only these files: names without suffix."),
    ] = None,
) -> None:
    """Copy-synthesises recordings and measures the copies.

    PESQ, STOI, log-mel distance, voicing and F0, DNSMOS, with and without mel
    refinement, beside Griffin-Lim; and the likelihood of the speech and of the
    model's own draws. Some figures need packages: pip install 'waveflow[eval]'.
    Figures whose package is missing are left out. Under torchrun the processes
    share the recordings, and --device cuda gives each its own GPU.

    \b
    Examples:
      waveflow evaluate recordings/
      waveflow evaluate kathleen/wavs --ids kathleen/val.txt --json figures.json
    """
    from waveflow.audio.io import find_files
    from waveflow.data.corpus import select_ids
    from waveflow.files import AUDIO_SUFFIXES, output_path

    names, left_out = find_files(folder, AUDIO_SUFFIXES)
    files = [folder / name for name in names]
    if ids is not None:
        files = select_ids(files, ids)
    if json_file is not None:
        options.check_writable(json_file)
    sample = sampling.sampling()
    group = join_group()
    vocoder = loading.load()

    from waveflow.engine.vocoder import VocoderWarning
    from waveflow.metrics.copies import measure_clips
    from waveflow.metrics.evaluation import CLIPS, summarise
    from waveflow.model_files import LOG_LIKELIHOOD, LOWER_BOUND

    with counting("clips", group) as progress, warnings.catch_warnings():
        # One line for each clipped copy would drown the table.
        warnings.simplefilter("ignore", VocoderWarning)
        # STOI of a short clip, which counts as not measured.
        warnings.filterwarnings("ignore", "Not enough STFT frames")
        clips = measure_clips(vocoder, group.share(files), sample, progress)
    shares = group.gather("clips", CLIPS.dump_python(clips))
    if shares is None:
        return
    clips = CLIPS.validate_python(merge(shares))
    rate, is_bound = vocoder.sample_rate, vocoder.is_bound
    result = summarise(clips, rate, sampling.seed, sampling.sigma, is_bound)
    if json_file is not None:
        with output_path(json_file) as temporary:
            temporary.write_text(result.to_json() + "\n")
    show(f"{result.n_clips} clips, {result.seconds:.0f} s")
    show_table(result.table(), n_left=1)
    show(
        f"{LOWER_BOUND if result.is_bound else LOG_LIKELIHOOD}, nats per sample: "
        f"speech {result.log_prob_speech:.4f}, own draws at sigma 1 {result.log_prob_draw:.4f}"
    )
    if result.draw_correlation is not None:
        show(f"correlation of two draws: {result.draw_correlation:.3f}")
    if result.missing:
        note(f"left out, their packages are missing: {', '.join(result.missing)}")
    note_left_out(left_out)
    for bad in result.bad_files:
        note(bad.message)
    if result.bad_files:
        raise typer.Exit(1 if any(bad.is_ours for bad in result.bad_files) else 2)
