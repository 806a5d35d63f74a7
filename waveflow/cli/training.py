"""`waveflow train`: a cache to a model."""

import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from waveflow.cli import options
from waveflow.cli.console import note, progress_bar
from waveflow.cli.prepare import make_cache, note_report
from waveflow.cli.shards import local_device
from waveflow.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from waveflow.audio.mel import MelConfig
    from waveflow.data.cache import TrainingCache
    from waveflow.training.loop import Progress


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
        bool,
        typer.Option(
            "--resume", help="Go on with the run in RUN; start it where it has no checkpoint yet."
        ),
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
    the last two and the best checkpoint, metrics.csv, and curves for TensorBoard; as
    a --model it is its best checkpoint. SIGTERM saves and ends; a damaged checkpoint
    is passed over by --resume.

    Under torchrun the processes share each batch, and --device cuda gives each its
    own GPU. A worker that torchrun starts again (--max-restarts) resumes by itself.

    \b
    Examples:
      waveflow train recipes/ljspeech/frameglow.toml \\
          --data LJSpeech-1.1 --out runs/x
      waveflow train recipe.toml --data kathleen --data nathalie --out runs/y
      waveflow train recipe.toml --out runs/y --resume --max-minutes 60
      waveflow train recipe.toml --data data/lj --out runs/z --init runs/y
      torchrun --nproc-per-node 8 --max-restarts 3 -m waveflow train \\
          recipe.toml --data data/lj --out runs/w --device cuda
    """
    from waveflow.checkpoint import run_checkpoints
    from waveflow.training.config import read_recipe
    from waveflow.training.distributed import (
        is_main,
        on_main,
        process_group,
        was_restarted,
    )

    resume = resume or was_restarted()
    # Before the data are prepared: that takes long and would replace the run's cache.
    if run_checkpoints(out):
        if not resume:
            raise ConfigError(f"{out} holds a run: go on with it (--resume) or name another folder")
        init = None  # the run has begun from it
    settings = read_recipe(recipe)
    device = local_device(device)
    options.check_device(device)
    start = None if init is None else _weights(init)

    from waveflow.data.cache import TrainingCache
    from waveflow.training.loop import Trainer

    with process_group(device):
        main, logger = is_main(), logging.getLogger("waveflow")
        # What all processes would say, one says.
        logger.setLevel(logging.WARNING if main else logging.ERROR)
        folder = on_main(lambda: _data(data or [], out / "cache", settings.mel, resume))
        cache = TrainingCache(folder)
        with _sigterm() as stop:
            trainer = Trainer(settings, cache, out, device, start, resume, _described(cache, init))
            if main:
                logger.setLevel(logging.INFO)
            with _training_bar(settings.train.steps, visible=main) as report:
                trainer.run(max_minutes, report, stop)
    if main:
        best = trainer.best
        score = "" if best is None else f", best validation log-likelihood {best:.4f}"
        if trainer.before is not None:
            score += f" ({trainer.before:.4f} before)"
        print(f"{out}: {trainer.step} steps, {trainer.minutes:.1f} minutes{score}")


@contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """Makes of SIGTERM, by which a scheduler takes the machine back, a question to ask."""
    received = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield received.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def _data(data: list[Path], own: Path, mel: "MelConfig", resume: bool) -> Path:
    """The cache that is given, or the run's own, made from the corpora where it has none yet.

    A cache is moved to its place when it is complete, so one that is there need not be made again.
    """
    from waveflow.data.cache import MANIFEST_FILE, TrainingCache

    for path in data:
        if not path.exists():
            raise DataError(f"--data {path}: no such folder")
    caches = [path for path in data if (path / MANIFEST_FILE).is_file()]
    if caches and len(data) > 1:
        raise ConfigError(f"{caches[0]} is a cache: give one cache, or corpora alone, as --data")
    if caches:
        own = caches[0]
    elif resume and (own / MANIFEST_FILE).is_file():
        if data:
            note(f"the run goes on with {own}, made from its corpora when it began")
    elif data:
        note_report(make_cache(data, own, mel))
    else:
        raise ConfigError("no training data: give a corpus or a cache with --data")
    TrainingCache(own).verify()
    return own


def _weights(init: str) -> tuple[Path, dict[str, "Tensor"]]:
    from waveflow.checkpoint import load_checkpoint
    from waveflow.pretrained import model_folder

    folder = model_folder(init)
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
def _training_bar(steps: int, visible: bool) -> "Iterator[Callable[[Progress], None]]":
    from rich.progress import TextColumn

    if not visible:
        yield lambda report: None
        return
    with progress_bar(TextColumn("{task.fields[values]}")) as bar:
        task = bar.add_task("step", total=steps, values="")
        yield lambda report: bar.update(task, completed=report.step, values=_values(report))


def _values(report: "Progress") -> str:
    """The first term (mostly the likelihood), speed and time left, in few characters."""
    name, first = next(iter(report.values.items()))
    name = {"log_likelihood": "log p"}.get(name, name.replace("_", " "))
    value = f"{name} {first:.3f}"
    hours, minutes = divmod(max(0, round(report.minutes_left)), 60)
    return f"{value}, {report.audio_seconds_per_second:.0f} s/s, {hours}:{minutes:02d} left"
