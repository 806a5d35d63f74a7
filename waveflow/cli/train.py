"""`waveflow train`: trains a model."""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from waveflow.cli import options
from waveflow.cli.console import note, progress_bar, show
from waveflow.cli.prepare import make_cache, note_report
from waveflow.errors import ConfigError, DataError
from waveflow.files import lock
from waveflow.processes import local_device, own_place, was_restarted

if TYPE_CHECKING:
    from waveflow.audio.mel_config import MelConfig
    from waveflow.checkpoint import ModelConfig
    from waveflow.data.cache import TrainingCache
    from waveflow.training.config import Recipe
    from waveflow.training.loop import Progress


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A .toml file.")],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="RUN", help="The run's folder; it is made."),
    ],
    data: options.Data = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the run in RUN, or start it if it has no checkpoint yet."
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

    Corpora are first prepared into RUN/cache, which --resume uses again. RUN keeps
    the last two and the best checkpoint, metrics.csv, and curves for TensorBoard.
    Given as a --model, RUN stands for its best checkpoint. SIGTERM saves and ends.
    --resume passes over damaged checkpoints, and takes the recipe of the run; its
    steps, patience and learning_rate may be others. A run that diverges ends with
    an error and keeps its good checkpoints, to go on at a lower learning_rate.

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
    from waveflow.model_files import run_checkpoints
    from waveflow.pretrained import model_folder

    resume = resume or was_restarted()

    def holds_run() -> bool:
        found = bool(run_checkpoints(out))
        if found and not resume:
            raise ConfigError(f"{out} holds a run: go on with it (--resume) or name another folder")
        return found

    # Checked before the data are prepared, which takes long and would replace the run's cache.
    begun = holds_run()
    if begun:
        init = None  # the run has begun from it
    start = None if init is None else model_folder(init)

    from waveflow.training.config import read_recipe

    settings = read_recipe(recipe)
    if settings.train.teacher and not begun:
        model_folder(settings.train.teacher)
    device = local_device(device)
    options.check_device(device)

    from waveflow.checkpoint import load_checkpoint
    from waveflow.data.cache import TrainingCache
    from waveflow.training.distributed import is_main, on_main, process_group
    from waveflow.training.loop import Trainer

    before, weights = None, None
    if start is not None:
        before, flow = load_checkpoint(start)
        weights = start, flow.state_dict()

    with own_folder(out), process_group(device):
        main, logger = is_main(), logging.getLogger("waveflow")
        # All processes would log the same, so rank 0 does it.
        logger.setLevel(logging.WARNING if main else logging.ERROR)
        on_main(holds_run)  # another process may have trained meanwhile
        folder = on_main(lambda: training_data(data or [], out / "cache", settings.mel, resume))
        cache = TrainingCache(folder)
        with until_sigterm() as stop:
            words = described(cache, init)
            if main and before is not None:
                note_other_settings(str(init), before, settings)
            trainer = Trainer(settings, cache, out, device, weights, resume, words)
            if main:
                logger.setLevel(logging.INFO)
            with _training_bar(max_minutes, visible=main) as (report, report_clip):
                trainer.run(max_minutes, report, stop, report_clip)
    if main:
        best = trainer.best
        score = "" if best is None else f", best validation {trainer.flow.measure} {best:.4f}"
        if trainer.before is not None:
            score += f" ({trainer.before:.4f} before)"
        show(f"{out}: {trainer.step} steps, {trainer.minutes:.1f} minutes{score}")


@contextmanager
def own_folder(out: Path) -> Iterator[None]:
    """Makes the run's folder and keeps other processes out of it; rank 0 does so for all.

    A folder in which nothing was written does not stay.
    """
    from waveflow.training.run_folder import LOCK

    if own_place()[0] > 0:
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write the run {out}: {error.strerror}") from error
    try:
        with lock(out / LOCK, f"the run {out}"):
            yield
    finally:
        with suppress(OSError):
            out.rmdir()


@contextmanager
def until_sigterm() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGTERM was received: a scheduler wants the machine."""
    received = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield received.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def training_data(data: list[Path], own: Path, mel: "MelConfig", resume: bool) -> Path:
    """Returns the cache that is given, or the run's own, which is made from the corpora if missing.

    A cache gets its name when it is complete, so one that exists need not be made again.
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


def note_other_settings(init: str, before: "ModelConfig", now: "Recipe") -> None:
    """Says where a recipe differs from the model whose weights it starts from.

    Weights of other shapes are refused afterwards. All other settings they take in silence.
    """
    for part in ("model", "mel"):
        was, is_now = getattr(before, part).model_dump(), getattr(now, part).model_dump()
        for name, value in is_now.items():
            if name in was and value != was[name]:
                note(f"--init {init} was trained with {part}.{name} {was[name]}, not {value}")


def described(cache: "TrainingCache", init: str | None) -> str:
    """Describes the data in words, for the checkpoint's provenance."""
    names = dict.fromkeys(clip.corpus for clip in cache.clips("train"))
    described = f"{', '.join(names)} ({cache.hours('train'):.2f} hours)"
    if init is None:
        return described

    from waveflow.model_files import read_card
    from waveflow.pretrained import model_folder

    before = read_card(model_folder(init)).provenance.data or "data not stated"
    return f"{described}, started from {init}: {before}"


@contextmanager
def _training_bar(
    max_minutes: float, visible: bool
) -> "Iterator[tuple[Callable[[Progress], None], Callable[[int, int], None]]]":
    """Yields functions that show a step, and a clip of a validation.

    They move a bar, which is full when the run ends, by its steps or by the clock. Without a
    terminal they print a line now and then.
    """
    if not visible:
        yield (lambda report: None), (lambda done, total: None)
        return
    from rich.progress import TextColumn

    from waveflow.training.loop import LOG_EVERY

    with progress_bar(TextColumn("{task.fields[values]}")) as bar:
        task = bar.add_task("begins", total=1.0, values="")
        begin = time.monotonic()

        def show_step(report: "Progress") -> None:
            where, values = _where(report), _values(report, max_minutes)
            if bar.disable:
                if report.step % LOG_EVERY == 0:
                    note(f"{where}, {values}")
                return
            elapsed = (time.monotonic() - begin) / 60
            done = elapsed / max(elapsed + report.minutes_left, 1e-9)
            bar.update(task, description=where, completed=done, values=values)

        def show_clip(done: int, total: int) -> None:
            bar.update(task, description=f"validating {done + 1}/{total}", values="")

        yield show_step, show_clip


def _where(report: "Progress") -> str:
    """The step, of the run or of the model's own first phase."""
    phase = f"{report.phase}, " if report.phase else ""
    return f"{phase}step {report.phase_step} of {report.phase_steps}"


def _values(report: "Progress", max_minutes: float) -> str:
    """The first term (mostly the likelihood), the speed, and what will end the run and when."""
    name, first = next(iter(report.values.items()))
    name = {"log_likelihood": "log p"}.get(name, name.replace("_", " "))
    speed = f"{report.audio_seconds_per_second:.3g} s of audio a second"
    limit = "the last step" if report.limit == "steps" else f"--max-minutes {max_minutes:g}"
    if report.phase and report.limit == "steps":
        limit = "the end of this phase"
    hours, minutes = divmod(max(0, math.ceil(report.minutes_left)), 60)
    left = f"{hours} h {minutes} min" if hours else f"{minutes} min"
    return f"{name} {first:.3f}, {speed}, {left} to {limit}"
