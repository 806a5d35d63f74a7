"""The table of `waveflow compare`: figures of all rows, as text, CSV, Markdown and a picture."""

import csv
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from waveflow.door import check_plain
from waveflow.files import output_path
from waveflow.training.compare import DRAW_SECONDS, GAUSSIAN, HELD_SECONDS, Job, Result
from waveflow.training.validation import ratio_interval

# Values that the loop logs beside the terms of a loss.
NO_TERMS = {"gradient_norm", "learning_rate", "waiting_share", "skipped"}
# What is known of a difference of two likelihoods, by which of them are lower bounds.
BOUNDS = {
    (False, False): "",
    (True, False): "lower",
    (False, True): "upper",
    (True, True): "of bounds",
}
# Points of a curve, each the mean of its share of the steps.
CURVE_POINTS = 40


class Estimate(NamedTuple):
    """A mean over held speech, nats per sample, and half its 95 % interval (None: one clip)."""

    mean: float
    interval: float | None

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.interval is None else f" ± {self.interval:.3f}")


class Row(NamedTuple):
    """A row: its result, or why there is none."""

    name: str
    result: Result | None
    failure: str = ""


def estimate(result: Result, first: Result | None = None) -> Estimate:
    """The mean log-likelihood of a row, or how much it lies above that of the first one.

    The difference is taken piece by piece: what is hard for one model is hard for the other. So
    its interval is far narrower than those of the two means.
    """
    sums = torch.tensor(result.log_probs, dtype=torch.float64)
    if first is not None:
        sums = sums - torch.tensor(first.log_probs, dtype=torch.float64)
    sizes = torch.tensor(result.n_samples, dtype=torch.float64)
    return Estimate((sums.sum() / sizes.sum()).item(), ratio_interval(sums, sizes))


def figures(row: Row, first: Row) -> dict[str, Any]:
    """The figures of a row by name; None where there is none."""
    result, reference = row.result, first.result
    values: dict[str, Any] = {"model": row.name, "status": row.failure or "done"}
    own = difference = None
    own_bound = difference_bound = ""
    if result is not None:
        own, own_bound = estimate(result), "lower" if result.is_bound else ""
        if reference is not None and row is not first:
            difference = estimate(result, reference)
            difference_bound = BOUNDS[result.is_bound, reference.is_bound]
    values["bound"], values["difference_bound"] = own_bound, difference_bound
    values["log_likelihood"], values["interval"] = own or (None, None)
    values["difference"], values["difference_interval"] = difference or (None, None)
    for name in (
        "draw_log_likelihood", "parameters", "macs_per_second", "samples_per_second",
        "audio_per_second", "peak_bytes", "steps", "minutes",
    ):  # fmt: skip
        values[name] = None if result is None else getattr(result, name)
    return values


def text_table(rows: Sequence[Row]) -> list[list[str]]:
    """The rows as text, the names of the columns first."""
    names = [
        "model", "parameters", "multiply-adds/s", "log-likelihood", f"above {rows[0].name}",
        "own draws", "samples/s drawn", "trained s/s", "steps", "memory, MB",
    ]  # fmt: skip
    return [names, *(_cells(figures(row, rows[0])) for row in rows)]


def _cells(values: dict[str, Any]) -> list[str]:
    marks = {"": "", "lower": "≥ ", "upper": "≤ ", "of bounds": "≈ "}

    def estimated(name: str, interval: str, bound: str) -> str:
        if values[name] is None:
            return "-"
        return f"{marks[bound]}{Estimate(values[name], values[interval])}"

    def number(name: str, unit: float, digits: str, suffix: str = "") -> str:
        value = values[name]
        return "-" if value is None else f"{value / unit:{digits}}{suffix}"

    likelihood = estimated("log_likelihood", "interval", values["bound"])
    draws = number("draw_log_likelihood", 1, ".3f")
    return [
        values["model"],
        number("parameters", 1, ",.0f"),
        number("macs_per_second", 1e9, ".3g", " G"),
        "failed" if values["status"] != "done" else likelihood,
        estimated("difference", "difference_interval", values["difference_bound"]),
        draws if draws == "-" else marks[values["bound"]] + draws,
        number("samples_per_second", 1, ",.0f"),
        number("audio_per_second", 1, ".3g"),
        number("steps", 1, ",.0f"),
        number("peak_bytes", 1e6, ".0f"),
    ]


def notes(rows: Sequence[Row], job: Job, sample_rate: int) -> list[str]:
    """What was measured on how much audio, and the failures."""
    config, goal = job.recipe.train, job.goal
    held = next(row.result for row in rows if row.result is not None).n_samples
    segment = config.segment_frames * job.recipe.mel.hop_length / sample_rate
    amount = f"{goal.steps} steps" if goal.minutes == math.inf else f"{goal.minutes:g} min"
    lines = [
        f"Training: {amount} of each model, {config.batch_size} segments of {segment:.2f} s a step,"
        f" seed {config.seed}; validations and measurements are not counted.",
        "Log-likelihood: nats per audio sample of the averaged weights, with its 95 % interval "
        f"over {len(held)} validation clips, up to {HELD_SECONDS:g} s of each, "
        f"{sum(held) / sample_rate:.1f} s in all; ≥ marks a lower bound.",
        f"Above {rows[0].name}: difference clip by clip. An interval without 0 tells two models "
        "apart.",
        f"Own draws: the same for a draw of {DRAW_SECONDS:g} s (or the shortest clip) for each "
        "clip.",
        f"Multiply-adds and samples/s: noise to audio, an item of {HELD_SECONDS:g} s (on one "
        "CPU thread by the CPU's clock); trained s/s: seconds of audio a second of training.",
        "Memory: growth of the training process's own memory beyond Python, torch and data.",
    ]
    means = {row.name: estimate(row.result).mean for row in rows if row.result is not None}
    trained = [row.name for row in rows if row.result is not None and row.result.steps is not None]
    if young := [name for name in trained if means[name] < means.get(GAUSSIAN, -math.inf)]:
        lines.append(f"Below the Gaussian, so not trained enough to say much: {', '.join(young)}.")
    return [*lines, *(f"{row.name} failed: {row.failure}" for row in rows if row.failure)]


def write_csv(path: Path, rows: Sequence[Row], machine: str) -> None:
    """Writes all figures, unrounded, after a comment that names the machine."""
    table = [figures(row, rows[0]) for row in rows]
    with output_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        file.write(f"# {machine}\n")
        writer = csv.DictWriter(file, table[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def write_markdown(path: Path, rows: Sequence[Row], machine: str, notes: Sequence[str]) -> None:
    """Writes the table, the machine above it and the notes below."""
    head, *body = ([cell.replace("|", "\\|") for cell in cells] for cells in text_table(rows))
    rule = ["---", *("---:" for _ in head[1:])]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, rule, *body)]
    with output_path(path) as temporary:
        text = "\n".join([machine, "", *lines, "", *(f"{note}\n" for note in notes)])
        temporary.write_text(text, encoding="utf-8")


def write_picture(path: Path, runs: dict[str, Path], machine: str) -> None:
    """Draws the likelihood of the training's segments against seconds of training.

    Args:
        runs: folders of runs by name. One without figures in its log is left out.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, folder in runs.items():
        seconds, values = training_curve(folder)
        if len(values):
            axes.plot(seconds, values, marker=".", label=name)
    axes.set(xlabel="seconds of training", ylabel="log-likelihood of segments, nats per sample")
    axes.set_title(machine, fontsize=8)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    with output_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def training_curve(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of training and likelihood of segments, from metrics.csv, some steps averaged.

    Steps that a resumed run repeated count once. A model with terms of its own is trained on
    minus its bound, their sum. A file that cannot be read, or not to its end, gives what it has.
    """
    steps: dict[int, tuple[float, dict[str, float]]] = {}
    path = folder / "metrics.csv"
    with suppress(OSError, ValueError, KeyError, TypeError, csv.Error):
        check_plain(path, folder)
        for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
            if row["kind"] == "train":
                step = int(row["step"])
                seconds, terms = steps.setdefault(step, (60 * float(row["minutes"]), {}))
                terms[row["name"]] = float(row["value"])
    points = []
    for _, (seconds, terms) in sorted(steps.items()):
        own = [value for name, value in terms.items() if name not in NO_TERMS]
        points.append((seconds, terms.get("log_likelihood", -math.fsum(own))))
    if not points:
        return np.zeros(0), np.zeros(0)
    parts = np.array_split(np.array(points), min(len(points), CURVE_POINTS))
    means = np.array([part.mean(0) for part in parts])
    return means[:, 0], means[:, 1]
