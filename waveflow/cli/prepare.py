"""`waveflow prepare`: makes a training cache from recordings."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from waveflow.cli.console import counting, note, show
from waveflow.errors import ConfigError
from waveflow.processes import ALONE, Group, join_group

if TYPE_CHECKING:
    from waveflow.audio.mel_config import MelConfig
    from waveflow.data.report import PrepareReport


def prepare(
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", metavar="CACHE", help="The cache's folder; an old cache is replaced."
        ),
    ],
    corpora: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="CORPUS",
            help="Folders of recordings, in LJSpeech's layout or any other, or archives of them.",
        ),
    ] = None,
    download: Annotated[
        bool,
        typer.Option("--download", help="LJSpeech-1.1, by torchaudio, to a folder beside CACHE."),
    ] = False,
    mel: Annotated[
        str,
        typer.Option(
            "--mel",
            "--preset",
            metavar="NAME|RECIPE",
            help="A preset such as hifigan, or a recipe's file: its sample rate and hop are the "
            "cache's.",
        ),
    ] = "hifigan",
    mels: Annotated[
        Path | None,
        typer.Option(
            "--mels",
            metavar="FOLDER",
            help="Train on an acoustic model's mels, FOLDER/ID.npy or .pt, one for each clip.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            metavar="N",
            help="Processes. Default: one per core; under torchrun the process alone.",
        ),
    ] = None,
    speed: Annotated[
        list[float] | None,
        typer.Option(
            "--speed",
            metavar="X",
            help="Train on all recordings at X times their speed as well: other voices. May be "
            "given more than once.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also read again what is done already.")
    ] = False,
) -> None:
    """Makes a training cache from recordings: resampled audio and its F0.

    A corpus is a folder with metadata.csv (lines ID|text), wavs/ and, if you like,
    val.txt (ids to keep out of training). A folder of audio files alone is one too;
    it may hold folders. An archive (.tar.bz2, .tar.gz, .zip) is unpacked beside
    CACHE. Files that cannot be used are left out and listed, on the screen and in
    CACHE/report.json. An interrupted run goes on where it stopped. Under torchrun
    the processes share the work.

    With --speed 1.12 each recording for training is there twice, the second time
    with pitch and formants 12 % higher. Below 1 the highest frequencies are empty,
    unless the recordings have a higher rate than the mel.

    With --mels (bands, frames; natural logarithms; aligned with the recordings), a
    clip whose mel is missing, or off by more than 3 frames, is left out and listed.

    \b
    Examples:
      waveflow prepare LJSpeech-1.1.tar.bz2 -o data/lj
      waveflow prepare kathleen nathalie -o data/two --workers 4 --speed 1.12
      waveflow prepare recordings -o data/24k --mel recipe.toml
      waveflow prepare LJSpeech-1.1 -o data/tuned --mels tacotron-mels
      torchrun --nproc-per-node 8 -m waveflow prepare VCTK -o data/vctk
    """
    if not corpora and not download:
        raise ConfigError("nothing to prepare: name a CORPUS, or give --download for LJSpeech-1.1")
    settings = _mel_settings(mel)
    group = join_group()
    corpora = list(corpora or [])
    if download:
        from waveflow.data.archives import download_ljspeech

        beside = out.absolute().parent
        corpora.append(group.main_first("download", lambda: download_ljspeech(beside)))
    if workers is None and group.world_size > 1:
        workers = 1
    report = make_cache(corpora, out, settings, workers, force, mels, group, speed or ())
    if group.rank == 0:
        for line in (f"{out}: {report.amounts()}", *report.lines()):
            show(line)
        if report.has_fault():
            raise typer.Exit(1)


def make_cache(
    corpora: list[Path],
    out: Path,
    mel: "MelConfig",
    workers: int | None = None,
    force: bool = False,
    mels: Path | None = None,
    group: Group = ALONE,
    speeds: Sequence[float] = (),
) -> "PrepareReport":
    """`waveflow.data.prepare.prepare` with a progress bar."""
    from waveflow.data.prepare import prepare as prepare_cache

    with counting("preparing", group) as progress:
        return prepare_cache(corpora, out, mel, progress, workers, force, mels, group, speeds)


def note_report(report: "PrepareReport") -> None:
    """Prints the report as notes."""
    for line in (f"prepared {report.amounts()}", *report.lines()):
        note(line)


def _mel_settings(name: str) -> "MelConfig":
    from waveflow.audio.mel_config import MEL_PRESETS

    if name in MEL_PRESETS:
        return MEL_PRESETS[name]
    if not Path(name).is_file():
        raise ConfigError(
            f"--mel {name}: neither one of {', '.join(MEL_PRESETS)} nor the file of a recipe"
        )
    from waveflow.training.config import read_recipe

    return read_recipe(Path(name)).mel
