"""`waveflow doctor`: says which convention a mel is in."""

from pathlib import Path
from typing import Annotated

import typer

from waveflow.cli import options
from waveflow.cli.console import note, show, show_table
from waveflow.errors import WaveflowError

_ROWS = 5


def doctor(
    source: Annotated[
        Path, typer.Argument(metavar="MEL|FOLDER", help="A .npy, .npz or .pt file, or a folder.")
    ],
    loading: options.Loading,
) -> None:
    """Says which convention a mel of speech is most likely in.

    The values tell the scale: how much they move from frame to frame, their level,
    spectrum and floor. `behind` is how much worse they fit than the best, as a
    natural logarithm. Where the values leave several bands open, the model speaks
    each: `evidence` is minus the misfit of its speech (hundredths of log-mel L1,
    higher is better; 0.4 is much). Conventions with the same values, which differ in
    framing, floor or sample rate alone, share a row. For each file of a folder there
    is one line.

    \b
    Examples:
      waveflow doctor mel.npy
      waveflow doctor mels/ --model runs/x
    """
    from waveflow.audio.io import MEL_SUFFIXES, find_files, read_mel

    if not source.is_dir():
        mel = read_mel(source)
        vocoder = loading.load()
        from waveflow.engine.doctor import diagnose, turned

        mel, words = turned(mel, vocoder.mel_config)
        show(f"{source}: {words}, {mel.min():.3g} to {mel.max():.3g}")
        rows = [("convention", "behind", "evidence")]
        for found in diagnose(vocoder, mel)[:_ROWS]:
            evidence = "-" if found.evidence is None else f"{found.evidence:.3f}"
            rows.append((" = ".join(found.names), f"{found.behind:.1f}", evidence))
        show_table(rows, n_left=1)
        return
    names, _ = find_files(source, MEL_SUFFIXES)
    vocoder = loading.load()
    from waveflow.engine.doctor import diagnose, turned

    n_bad = 0
    for name in names:
        try:
            mel, words = turned(read_mel(source / name), vocoder.mel_config)
            best = diagnose(vocoder, mel)[0]
        except WaveflowError as error:
            note(f"{source / name}: {error}")
            n_bad += 1
            continue
        show(f"{source / name}: {words}, {' = '.join(best.names)}")
    if n_bad:
        raise typer.Exit(2)
