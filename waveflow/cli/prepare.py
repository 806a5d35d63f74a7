"""`waveflow prepare`: recordings to a training cache."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from waveflow.cli.console import note
from waveflow.cli.shards import ALONE, Group, join_group
from waveflow.errors import ConfigError

if TYPE_CHECKING:
    from waveflow.audio.mel import MelConfig
    from waveflow.data.prepare import PrepareReport


def prepare(
    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="CACHE", help="The cache's folder; one is replaced."),
    ],
    corpora: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="CORPUS",
            help="Folders in LJSpeech's layout or of audio files alone, or archives of such.",
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
            metavar="NAME|RECIPE",
            help="hifigan, nvidia, or a recipe's file: its sample rate and hop are the cache's.",
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
            help="Processes. Without it: one per core, and one alone under torchrun.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also read again what is done already.")
    ] = False,
) -> None:
    """Recordings to a training cache: resampled audio and its F0.

    A corpus is a folder with metadata.csv (lines ID|text), wavs/ and, if you like,
    val.txt (ids to keep out of training); or just a folder of audio files, with
    folders in it or not. An archive (.tar.bz2, .tar.gz, .zip) is unpacked beside
    CACHE. Files that cannot be used are left out and listed, there and in
    CACHE/report.json. A run that was interrupted goes on where it stopped, and
    torchrun shares the work over its processes.

    With --mels (bands, frames; natural logarithms; aligned with the recordings), a
    clip whose mel is missing, or off by more than 3 frames, is left out and listed.

    \b
    Examples:
      waveflow prepare LJSpeech-1.1.tar.bz2 -o data/lj
      waveflow prepare kathleen nathalie -o data/two --workers 4
      waveflow prepare recordings -o data/24k --mel recipe.toml
      waveflow prepare LJSpeech-1.1 -o data/tuned --mels tacotron-mels
      torchrun --nproc-per-node 8 -m waveflow prepare VCTK -o data/vctk
    """
    settings = _mel_settings(mel)
    group = join_group()
    corpora = list(corpora or [])
    if download:
        from waveflow.data.archives import download_ljspeech

        corpora.append(download_ljspeech(out.absolute().parent, is_first=group.rank == 0))
    if not corpora:
        raise ConfigError("nothing to prepare: name a CORPUS, or give --download for LJSpeech-1.1")
    if workers is None and group.world_size > 1:
        workers = 1
    if group.rank:
        from waveflow.data.prepare import prepare_shard

        kept = prepare_shard(corpora, out, settings, group[:2], workers, force, mels)
        group.gather("prepare", kept)
        return
    report = make_cache(corpora, out, settings, workers, force, group, mels)
    for line in (f"{out}: {report.amounts()}", *report.lines()):
        print(line)


def make_cache(
    corpora: list[Path],
    out: Path,
    mel: "MelConfig",
    workers: int | None = None,
    force: bool = False,
    group: Group = ALONE,
    mels: Path | None = None,
) -> "PrepareReport":
    """`waveflow.data.prepare.prepare` with a progress bar, as rank 0 of a group."""
    from waveflow.data.prepare import prepare as prepare_cache

    def wait() -> int:
        return sum(group.gather("prepare", 0) or [])

    with group.counting("preparing") as progress:
        return prepare_cache(
            corpora, out, mel, progress, workers, force, group.world_size, wait, mels
        )


def note_report(report: "PrepareReport") -> None:
    """The report as notes on stderr."""
    for line in (f"prepared {report.amounts()}", *report.lines()):
        note(line)


def _mel_settings(name: str) -> "MelConfig":
    from waveflow.audio.mel import MEL_PRESETS

    if name in MEL_PRESETS:
        return MEL_PRESETS[name]
    if not Path(name).is_file():
        raise ConfigError(
            f"--mel {name}: neither one of {', '.join(MEL_PRESETS)} nor the file of a recipe"
        )
    from waveflow.training.config import read_recipe

    return read_recipe(Path(name)).mel
