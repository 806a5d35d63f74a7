"""`waveflow compare`: trains models alike and prints one table of them."""

import logging
import math
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from waveflow.cli import options
from waveflow.cli.console import (
    NoteHandler,
    fault_line,
    faults_are_shown,
    note,
    progress_bar,
    show,
    show_faults,
    show_table,
)
from waveflow.cli.train import described, own_folder, training_data, until_sigterm
from waveflow.door import read_plain
from waveflow.errors import ConfigError, WaveflowError
from waveflow.files import atomic_path
from waveflow.limits import DOCUMENT_BYTES
from waveflow.pretrained import zoo_models, zoo_recipe
from waveflow.processes import check_alone

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from waveflow.training.compare import Goal, Job, Result
    from waveflow.training.compare_table import Row
    from waveflow.training.config import Recipe
    from waveflow.training.loop import Progress

# In the folder of each run: what was measured of it.
RESULT_FILE = "comparison.json"
# Of each training, where stderr is no terminal.
_LINES = 10


def compare(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help=f"Models of the zoo: {', '.join(zoo_models())}."),
    ] = None,
    data: options.Data = None,
    recipes: Annotated[
        list[Path] | None,
        typer.Option(
            "--recipes",
            metavar="FILE",
            help="A recipe of yours, a row named as the file; may be repeated. A type of your own "
            "must be imported first (docs/tutorial/08_build_your_own.md).",
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", metavar="N", help="Train each for N minutes,")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", help="or for N optimizer steps,")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", metavar="N", help="or on N seconds of audio.")
    ] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FOLDER", help="Of the runs and the table.")
    ] = Path("runs/compare"),
    seed: Annotated[
        int,
        typer.Option(
            "--seed", min=0, max=2**32 - 1, metavar="N", help="Of weights, data order and noise."
        ),
    ] = 0,
    device: options.Device = "cpu",
) -> None:
    """Trains models alike and prints one table of them.

    All see the same segments of the same data for as long, each in a process of its
    own, and are scored on the same held speech. Differences to the first
    model are paired: their interval tells two models apart, that of a mean does not.
    A likelihood with ≥ is a lower bound. Two densities that need no training close the
    table: a Gaussian of fixed variance, and linear prediction.

    FOLDER gets compare.csv, compare.md and compare.png (extra `plot`), and a run
    for each model: FOLDER/glow is a --model. Corpora are prepared into FOLDER/cache.
    The same command again goes on where it was stopped and skips what is done; with
    more minutes it trains on.

    \b
    Examples:
      waveflow compare nice glow wavenet --minutes 1 --data LJSpeech-1.1
      waveflow compare maf iaf --steps 500 --data data/lj -o runs/maf-iaf
      waveflow compare glow --recipes mine.toml --seconds 600 --data data/lj
    """
    check_alone("a comparison")
    amount = _amount(minutes, steps, seconds)
    files = _files(models or [], recipes or [])

    from waveflow.training.config import read_recipe

    settings = {name: read_recipe(path) for name, path in files.items()}
    _check_alike(settings)
    options.check_device(device)

    from waveflow.data.cache import TrainingCache
    from waveflow.training.compare import Job, for_comparison, references
    from waveflow.training.compare_table import Row

    first = next(iter(settings.values()))
    goal = _goal(amount, first)
    with own_folder(out):
        folder = training_data(data or [], out / "cache", first.mel, resume=True)
        cache = TrainingCache(folder)
        known = references(cache, first)
        jobs = [
            Job(name, for_comparison(r, goal, seed), goal, folder, out / name, device,
                described(cache, None))
            for name, r in settings.items()
        ]  # fmt: skip
        rows, faults = [], 0
        for number, job in enumerate(jobs, start=1):
            row, is_fault = _row(job, f"{job.name}, {number} of {len(jobs)}")
            rows.append(row)
            faults += is_fault
        rows += [Row(result.name, result) for result in known]
        _write(out, rows, jobs, cache.sample_rate)
    if any(row.failure for row in rows):
        raise typer.Exit(1 if faults else 2)


def _amount(minutes: float | None, steps: int | None, seconds: float | None) -> tuple[str, float]:
    """The one option that says how long to train, and its value."""
    given = {"--minutes": minutes, "--steps": steps, "--seconds": seconds}
    amounts = [(name, value) for name, value in given.items() if value is not None]
    if len(amounts) != 1:
        raise ConfigError("say how long to train each model: --minutes, --steps or --seconds")
    name, value = amounts[0]
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} {value:g}: give a number above 0")
    return name, value


def _files(models: list[str], recipes: list[Path]) -> dict[str, Path]:
    """The recipe of each row, by the row's name."""
    files: dict[str, Path] = {}
    named = [(name, zoo_recipe(name)) for name in models] + [(path.stem, path) for path in recipes]
    for name, path in named:
        if name in files:
            raise ConfigError(f"two models are named {name!r}: give each once, or rename a recipe")
        files[name] = path
    if not files:
        raise ConfigError("nothing to compare: name models, such as nice glow, or give --recipes")
    return files


def _check_alike(settings: "dict[str, Recipe]") -> None:
    """Raises ConfigError if the recipes would not train on the same segments."""
    (first, one), *others = settings.items()
    for name, other in others:
        if other.mel != one.mel:
            raise ConfigError(
                f"the mel of {name} is not that of {first}: models are compared on the same mels"
            )
        for field in ("batch_size", "segment_frames", "gain_range"):
            own, wanted = getattr(other.train, field), getattr(one.train, field)
            if own != wanted:
                raise ConfigError(
                    f"{field} of {name} is {own}, that of {first} is {wanted}: models are "
                    "compared on the same segments, so give one value in both recipes"
                )


def _goal(amount: tuple[str, float], recipe: "Recipe") -> "Goal":
    from waveflow.training.compare import Goal
    from waveflow.training.config import MOST_STEPS

    name, value = amount
    if name == "--minutes":
        return Goal(minutes=value)
    n_steps = value if name == "--steps" else value / _step_seconds(recipe)
    if n_steps > MOST_STEPS:
        raise ConfigError(f"{name} {value:g}: that is more than {MOST_STEPS} steps")
    return Goal(steps=math.ceil(n_steps))


def _step_seconds(recipe: "Recipe") -> float:
    frames = recipe.train.batch_size * recipe.train.segment_frames
    return frames * recipe.mel.hop_length / recipe.mel.sample_rate


def _row(job: "Job", title: str) -> "tuple[Row, bool]":
    """The row of a job, measured now unless it is there; and whether it failed by our fault."""
    from waveflow.training.compare import Result
    from waveflow.training.compare_table import Row

    file = job.out / RESULT_FILE
    with suppress(OSError, ValueError, ConfigError):
        text = read_plain(file, DOCUMENT_BYTES, ConfigError, job.out)
        known = Result.model_validate_json(text)
        if known.key == job.key():
            return Row(job.name, known), False
    result, failure, is_fault = _in_own_process(job, title)
    if result is not None:
        with atomic_path(file) as temporary:
            temporary.write_text(result.model_dump_json(indent=1) + "\n")
        return Row(job.name, result), False
    note(f"{job.name}: {failure}")
    return Row(job.name, None, failure), is_fault


def _in_own_process(job: "Job", title: str) -> "tuple[Result | None, str, bool]":
    """The result of a job; or None, why there is none, and whether that is our fault.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM. The run was saved.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(job, title, sender, faults_are_shown()))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    process.start()
    sender.close()  # so that the end of the process is the end of the pipe
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return None, f"its process died (exit status {process.exitcode})", True
    finally:
        if process.is_alive():
            process.terminate()  # it saves first
        process.join()
        signal.signal(signal.SIGTERM, before)


def _measure(job: "Job", title: str, sender: "Connection", faults_shown: bool) -> None:
    """The process of a job: sends its result, or why there is none."""
    show_faults(faults_shown)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # our parent hears it, and sends SIGTERM
    logging.getLogger("waveflow").handlers = [NoteHandler()]
    with until_sigterm() as stop:
        try:
            from waveflow.training.compare import measure

            with _bar(job, title) as report:
                result = measure(job, report, stop)
            sender.send((result, "" if result else "stopped", False))
        except WaveflowError as error:
            sender.send((None, " ".join(str(error).splitlines()), False))
        except Exception as error:
            sender.send((None, fault_line(error), True))


@contextmanager
def _bar(job: "Job", title: str) -> "Iterator[Callable[[Progress], None]]":
    """Yields a function that shows a step; without a terminal it prints a line now and then."""
    from rich.progress import TextColumn, TimeRemainingColumn

    with progress_bar(TextColumn("{task.fields[speed]}"), TimeRemainingColumn()) as bar:
        task = bar.add_task(title, total=1.0, speed="")
        printed = -1

        def show_step(report: "Progress") -> None:
            nonlocal printed
            done = report.step / job.goal.steps
            if job.goal.minutes < math.inf:
                done = 1 - report.minutes_left / job.goal.minutes
            speed = f"{report.audio_seconds_per_second:.3g} s of audio a second"
            bar.update(task, completed=done, speed=speed)
            if bar.disable and int(done * _LINES) > printed:
                printed = int(done * _LINES)
                note(f"{title}: {done:.0%}, step {report.step}, {speed}")

        yield show_step


def _write(out: Path, rows: "list[Row]", jobs: "list[Job]", sample_rate: int) -> None:
    """Prints the table, and writes it and the picture."""
    from waveflow.training import compare_table as table
    from waveflow.training.machine import machine

    first = jobs[0]
    hardware = machine(first.recipe.train.threads, first.device)
    notes = table.notes(rows, first, sample_rate)
    show(hardware)
    show_table(table.text_table(rows), n_left=1)
    for line in notes:
        show(line)
    table.write_csv(out / "compare.csv", rows, hardware)
    table.write_markdown(out / "compare.md", rows, hardware, notes)
    runs = {job.name: job.out for job in jobs}
    try:
        table.write_picture(out / "compare.png", runs, hardware)
    except ImportError:
        note("no compare.png, matplotlib is missing: pip install 'waveflow[plot]'")
