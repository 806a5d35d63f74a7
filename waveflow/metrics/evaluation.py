"""The figures of an evaluation: how each is measured, their means over clips, their table."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter
from torch import Tensor

from waveflow.errors import AudioError
from waveflow.metrics.quality import FloatArray, dnsmos, pesq_wb, stoi
from waveflow.metrics.spectral import log_mel_l1
from waveflow.metrics.voicing import voicing

logger = logging.getLogger(__name__)

MelOf = Callable[[Tensor], Tensor]


class Metric(NamedTuple):
    """A way to measure copies.

    Attributes:
        columns: names of its figures.
        measure: function of (reference (T,), copy (T,), sample rate, mel of audio) that returns
            the figures.
        package: optional package that it imports, if any.
        needs_reference: whether it compares, so it cannot measure the recording itself.
    """

    columns: tuple[str, ...]
    measure: Callable[[FloatArray, FloatArray, int, MelOf], Sequence[float]]
    package: str | None = None
    needs_reference: bool = True


METRICS = (
    Metric(("PESQ-WB",), lambda ref, copy, rate, mel: (pesq_wb(ref, copy, rate),), "pesq"),
    Metric(("STOI",), lambda ref, copy, rate, mel: (stoi(ref, copy, rate),), "pystoi"),
    Metric(("log-mel L1",), lambda ref, copy, rate, mel: (log_mel_l1(ref, copy, mel),)),
    Metric(
        ("V/UV F1", "F0 error (cents)"),
        lambda ref, copy, rate, mel: voicing(ref, copy, rate),
        "pyworld",
    ),
    Metric(
        ("DNSMOS",),
        lambda ref, copy, rate, mel: (dnsmos(copy, rate),),
        "speechmos.dnsmos",
        needs_reference=False,
    ),
)
COLUMNS = tuple(column for metric in METRICS for column in metric.columns)


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Row(_Result):
    """Figures of one system.

    Attributes:
        name: the system.
        scores: mean over clips by column; None if no clip could be measured.
        failed: number of clips by column that could not be measured and are not in the mean.
    """

    name: str
    scores: dict[str, float | None]
    failed: dict[str, int]


class BadFile(_Result):
    """A file that was not measured.

    Attributes:
        path: the file.
        message: the reason.
        is_ours: whether the reason is a fault of ours, not of the file.
    """

    path: str
    message: str
    is_ours: bool = False


class Clip(_Result):
    """Figures of one recording.

    Attributes:
        n_samples: length at the model's rate.
        figures: figures by system and column; NaN where a metric could not judge the clip.
        log_prob_speech, log_prob_draw, draw_correlation: as in `Evaluation`; the last may be NaN.
        changes: changes on reading, in words.
    """

    n_samples: int
    figures: dict[str, dict[str, float]]
    log_prob_speech: float
    log_prob_draw: float
    draw_correlation: float
    changes: tuple[str, ...]


# Turns results into plain values and back, to send them to another process.
CLIPS = TypeAdapter(list[Clip | BadFile])


class Evaluation(_Result):
    """The result of an evaluation. Figures are means over clips, likelihoods means over samples.

    Attributes:
        n_clips: number of clips measured.
        seconds: their duration.
        seed: seed of the draws and of Griffin-Lim's first phase.
        sigma: standard deviation of the noise of copies; None for the model's own.
        rows: the systems compared.
        log_prob_speech: mean log-likelihood of the dequantised recordings, nats per audio sample.
        log_prob_draw: the same for the model's own draws at sigma 1, not refined, under the same
            mels. If it is far above `log_prob_speech`, draws are no samples of the density.
        is_bound: whether both are lower bounds (`Flow.is_bound`).
        draw_correlation: Pearson correlation of two such draws of one mel; near 1, noise is
            ignored.
        missing: columns left out because a package is not installed.
        bad_files: files left out.
    """

    n_clips: int
    seconds: float
    seed: int
    sigma: float | None
    rows: tuple[Row, ...]
    log_prob_speech: float
    log_prob_draw: float
    is_bound: bool
    draw_correlation: float | None
    missing: tuple[str, ...]
    bad_files: tuple[BadFile, ...]

    def to_json(self) -> str:
        """Returns the fields as indented JSON."""
        return self.model_dump_json(indent=2)

    def table(self) -> list[list[str]]:
        """Returns the rows as text, the names of the columns first."""
        columns = [column for column in COLUMNS if column not in self.missing]
        rows = [
            [row.name, *(_format(row.scores.get(column), column) for column in columns)]
            for row in self.rows
        ]
        return [["copy-synthesis by", *columns], *rows]


def summarise(
    results: Sequence[Clip | BadFile],
    sample_rate: int,
    seed: int,
    sigma: float | None,
    is_bound: bool,
) -> Evaluation:
    """Averages over clips: the second half of `evaluate`.

    Args:
        results: results of `measure_clips` for all files.
        sample_rate: sample rate of the model, in Hz.
        seed, sigma: options that `measure_clips` had.
        is_bound: of the model's flow.

    Raises:
        AudioError: no file could be read.
    """
    clips = [result for result in results if isinstance(result, Clip)]
    bad_files = tuple(result for result in results if isinstance(result, BadFile))
    if not clips:
        reason = bad_files[0].message if bad_files else "give wav or flac files"
        raise AudioError(f"no recording to evaluate: {reason}")
    changed = Counter(change for clip in clips for change in clip.changes)
    for change, n_files in changed.items():
        logger.warning("%s (%d files)", change, n_files)
    lengths = [clip.n_samples for clip in clips]
    log_prob_speech, log_prob_draw = np.average(
        [(clip.log_prob_speech, clip.log_prob_draw) for clip in clips], axis=0, weights=lengths
    )
    rows = [_row(name, [clip.figures[name] for clip in clips]) for name in clips[0].figures]
    measured = {column for row in rows for column in row.scores}
    return Evaluation(
        n_clips=len(clips),
        seconds=sum(lengths) / sample_rate,
        seed=seed,
        sigma=sigma,
        rows=tuple(rows),
        log_prob_speech=float(log_prob_speech),
        log_prob_draw=float(log_prob_draw),
        is_bound=is_bound,
        draw_correlation=_nan_mean(clip.draw_correlation for clip in clips),
        missing=tuple(column for column in COLUMNS if column not in measured),
        bad_files=bad_files,
    )


def _row(name: str, clips: Sequence[Mapping[str, float]]) -> Row:
    columns = {column: [clip[column] for clip in clips] for column in clips[0]}
    failed = {column: sum(map(math.isnan, values)) for column, values in columns.items()}
    return Row(
        name=name,
        scores={column: _nan_mean(values) for column, values in columns.items()},
        failed={column: count for column, count in failed.items() if count},
    )


def _nan_mean(values: Iterable[float]) -> float | None:
    finite = [value for value in values if not math.isnan(value)]
    return float(np.mean(finite)) if finite else None


def _format(value: float | None, column: str) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if "cents" in column else f"{value:.3f}"
