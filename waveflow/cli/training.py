"""`waveflow prepare` and `train`: recordings to a cache, a cache to a model."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from waveflow.cli import options
from waveflow.cli.console import counting, note, progress_bar
from waveflow.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from waveflow.audio.mel import MelConfig
    from waveflow.data.cache import TrainingCache
    from waveflow.data.prepare import PrepareReport
    from waveflow.training.trainer import Progress


def prepare(
    corpora: Annotated[
        list[Path],
        typer.Argument(
            metavar="CORPUS", help="Folders in LJSpeech's layout, or of audio files alone."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="CACHE", help="The cache's folder; one is replaced."),
    ],
    mel: Annotated[
        options.MelPreset, typer.Option("--mel", help="Its sample rate and hop are the cache's.")
    ] = options.MelPreset.hifigan,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, metavar="N", help="Processes. Without it: one per core."),
    ] = None,
) -> None:
    """Recordings to a training cache: resampled audio and its F0.

    A corpus is a folder with metadata.csv (lines ID|text), wavs/ and, if you like,
    val.txt (ids to keep out of training); or just a folder of audio files. Files
    that cannot be used are left out and listed.

    \b
    Examples:
      waveflow prepare LJSpeech-1.1 -o data/lj
      waveflow prepare kathleen nathalie -o data/two --workers 4
    """
    from waveflow.audio.mel import MEL_PRESETS

    report = _prepare(corpora, out, MEL_PRESETS[mel], workers)
    print(f"{out}: {_amounts(report)}")
    for line in report.notes:
        print(line)
    if report.skipped:
        print(f"{len(report.skipped)} files left out:")
    for line in report.skipped:
        print(f"  {line}")


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A .toml file.")],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="RUN", help="The run's folder; it is made."),
    ],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            metavar="CORPUS|CACHE",
            help="A cache, or a corpus; a corpus can be followed by more, each with --data.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in RUN, with its recipe.")
    ] = False,
    init: Annotated[
        str | None,
        typer.Option("--init", metavar="NAME|PATH", help="Start from this model's weights."),
    ] = None,
    max_minutes: Annotated[
        float, typer.Option("--max-minutes", min=0, metavar="N", help="Stop after N minutes.")
    ] = math.inf,
    device: options.Device = "cpu",
) -> None:
    """Trains a model.

    Corpora are prepared into RUN/cache first, which --resume uses again. RUN keeps
    the last and the best checkpoint, metrics.csv, and curves for TensorBoard; as a
    --model it is its best checkpoint.

    \b
    Examples:
      waveflow train recipes/ljspeech/frameglow.toml \\
          --data LJSpeech-1.1 --out runs/x
      waveflow train recipe.toml --data kathleen --data nathalie --out runs/y
      waveflow train recipe.toml --out runs/y --resume --max-minutes 60
      waveflow train recipe.toml --data data/lj --out runs/z --init runs/y
    """
    from waveflow.training.config import read_recipe

    if resume and init is not None:
        raise ConfigError("--init starts a run and --resume goes on with one: give one of them")
    # Before the data are prepared: that takes long and would replace the run's cache.
    _check_run(out, resume)
    settings = read_recipe(recipe)
    options.check_device(device)
    start = None if init is None else _weights(init)
    cache = _training_cache(data or [], out / "cache", settings.mel, resume)

    from waveflow.training.trainer import Trainer

    cache.verify()
    trainer = Trainer(settings, cache, out, device, start, resume, _described(cache, init))
    logging.getLogger("waveflow").setLevel(logging.INFO)
    with _training_bar(settings.train.steps) as report:
        trainer.run(max_minutes, report)
    best = "" if trainer.best is None else f", best validation log-likelihood {trainer.best:.4f}"
    print(f"{out}: {trainer.step} steps, {trainer.minutes:.1f} minutes{best}")


def _check_run(out: Path, resume: bool) -> None:
    from waveflow.checkpoint import RUN_POINTER

    has_run = (out / RUN_POINTER).is_file()
    if has_run and not resume:
        raise ConfigError(f"{out} holds a run: go on with it (--resume) or name another folder")
    if resume and not has_run:
        raise CheckpointError(f"nothing to resume in {out}: it holds no checkpoint")


def _training_cache(data: list[Path], own: Path, mel: "MelConfig", resume: bool) -> "TrainingCache":
    """The cache that is given, or the run's own, made from the corpora where it has none yet."""
    from waveflow.data.cache import MANIFEST_FILE, TrainingCache

    for path in data:
        if not path.exists():
            raise DataError(f"--data {path}: no such folder")
    caches = [path for path in data if (path / MANIFEST_FILE).is_file()]
    if caches and len(data) > 1:
        raise ConfigError(f"{caches[0]} is a cache: give one cache, or corpora alone, as --data")
    if caches:
        return TrainingCache(caches[0])
    if resume and (own / MANIFEST_FILE).is_file():
        if data:
            note(f"the run goes on with {own}, made from its corpora when it began")
    elif data:
        _note_report(_prepare(data, own, mel))
    else:
        raise ConfigError("no training data: give a corpus or a cache with --data")
    return TrainingCache(own)


def _prepare(
    corpora: list[Path], out: Path, mel: "MelConfig", workers: int | None = None
) -> "PrepareReport":
    from waveflow.data.prepare import prepare as prepare_cache

    with counting("preparing") as progress:
        return prepare_cache(corpora, out, mel, progress, workers)


def _amounts(report: "PrepareReport") -> str:
    return (
        f"{report.train_clips} clips ({report.train_hours:.2f} hours) for training, "
        f"{report.val_clips} ({report.val_hours:.2f} hours) for validation"
    )


def _note_report(report: "PrepareReport") -> None:
    note(f"prepared {_amounts(report)}")
    for line in (*report.notes, *report.skipped):
        note(line)


def _weights(init: str) -> tuple[Path, dict[str, "Tensor"]]:
    from waveflow.checkpoint import load_checkpoint
    from waveflow.pretrained import find_model

    folder = find_model(init)
    return folder, load_checkpoint(folder)[1].state_dict()


def _described(cache: "TrainingCache", init: str | None) -> str:
    """The data in words, for the checkpoint's provenance."""
    names = dict.fromkeys(clip.corpus for clip in cache.clips("train"))
    described = f"{', '.join(names)} ({cache.hours('train'):.2f} hours)"
    if init is None:
        return described
    before = options.read_config(init).provenance.data or "data not stated"
    return f"{described}, started from {init}: {before}"


@contextmanager
def _training_bar(steps: int) -> "Iterator[Callable[[Progress], None]]":
    from rich.progress import TextColumn

    with progress_bar(TextColumn("{task.fields[values]}")) as bar:
        task = bar.add_task("step", total=steps, values="")
        yield lambda report: bar.update(task, completed=report.step, values=_values(report))


def _values(report: "Progress") -> str:
    """Likelihood (or the pitch head's loss), speed and time left, in few characters."""
    if "log_likelihood" in report.values:
        value = f"log p {report.values['log_likelihood']:.3f}"
    else:
        value = f"pitch loss {report.values['pitch_loss']:.3f}"
    hours, minutes = divmod(max(0, round(report.minutes_left)), 60)
    return f"{value}, {report.audio_seconds_per_second:.0f} s/s, {hours}:{minutes:02d} left"
