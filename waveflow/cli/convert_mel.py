"""`waveflow convert-mel`: mels of one convention in another one."""

from pathlib import Path
from typing import Annotated

import typer

from waveflow.cli import options
from waveflow.cli.jobs import errors_of, note_about, plan_jobs, run_jobs
from waveflow.errors import ConfigError


def convert_mel(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="MEL|FOLDER...", help="A mel, several, or a folder of them."),
    ],
    out: Annotated[
        str,
        typer.Option(
            "-o", "--out", metavar="OUT", help="A .npy, .npz or .pt file; or a folder, for many."
        ),
    ],
    source: Annotated[
        str,
        typer.Option("--from", metavar="NAME|auto|FILE", help="What the mels are in, as vocode's."),
    ],
    target: Annotated[
        str, typer.Option("--to", metavar="NAME|FILE", help="What they become.")
    ] = "native",
    model: options.Model = None,
    time_major: options.TimeMajorOption = options.TimeMajor.no,
    lossy: options.Lossy = False,
    force: options.Force = False,
) -> None:
    """Mels of one convention to another one: by default, to the model's own.

    Base, decibels, floor, scale and area norm are converted exactly. Another sample
    rate, hop, band edge or power is refused, unless --lossy allows to interpolate.
    A centred mel stays centred: `vocode --convention` moves the speech in its place.
    The output is (bands, frames).

    \b
    Examples:
      waveflow convert-mel mel.npy -o own.npy --from coqui-log
      waveflow convert-mel mels/ -o native/ --from auto --time-major auto
      waveflow convert-mel mel.npy -o nemo.npy --from hifigan --to nemo-fastpitch
    """
    from waveflow.audio.io import MEL_SUFFIXES, check_mel_name, read_mel, write_mel
    from waveflow.audio.mel_names import AUTO, check_convention, convention_named
    from waveflow.model_files import read_card
    from waveflow.pretrained import model_folder

    for name in (source, target):
        check_convention(name)
    if target == AUTO:
        raise ConfigError("--to auto: only --from can be told by a mel's values; name the target")
    jobs = plan_jobs(sources, out, MEL_SUFFIXES, ".npy", force)
    if jobs.names is None:
        check_mel_name(jobs.out)
    own = read_card(model_folder(model)).mel
    wanted = convention_named(target, own)
    given = own if source == AUTO else convention_named(source, own)

    from waveflow.engine.incoming import IncomingMels
    from waveflow.engine.options import SynthesisOptions

    turned = options.axes(time_major)
    told = SynthesisOptions(convention=AUTO, time_major=turned, lossy=lossy)
    named = SynthesisOptions(convention=given, lossy=lossy)

    def work(path: Path, target_path: Path) -> str:
        with errors_of(path):
            mel = read_mel(path)
            notes = []
            if source == AUTO:  # what is told is a scale of the model's own mel
                incoming = IncomingMels(own, told)
                mel, _, _ = incoming.take(mel)
                notes += incoming.notes
            settings = named if source == AUTO else named.changed({"time_major": turned})
            incoming = IncomingMels(wanted, settings)
            batch, _, _ = incoming.take(mel)
        if incoming.delay_samples:
            hops = incoming.delay_samples / wanted.hop_length
            notes.append(f"its frames lie {hops:+g} hops from where {target} has them")
        note_about(path, notes)
        write_mel(target_path, batch[0])
        return f"{batch.shape[1]} bands, {batch.shape[2]} frames"

    run_jobs(jobs, work)
