"""Copy-synthesis of recordings and its figures, beside baselines without a network."""

import importlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter
from torch import Tensor
from torch.nn import functional

from waveflow.audio.dequantise import dequantise
from waveflow.audio.io import read_audio
from waveflow.audio.mel import MelConfig, MelSpectrogram
from waveflow.audio.refine import MelRefinement
from waveflow.errors import AudioError, DataError, WaveflowError
from waveflow.metrics.griffin_lim import griffin_lim, least_squares_magnitude, smooth_magnitude
from waveflow.metrics.pitch import voicing
from waveflow.metrics.quality import FloatArray, dnsmos, pesq_wb, stoi
from waveflow.metrics.spectral import draw_correlation, log_mel_l1

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger(__name__)

DEQUANTISE_SEED = 0
RECORDING = "recording"


class CopySynthesis(Protocol):
    """What is needed of a vocoder here; `waveflow.Vocoder` has it."""

    mel_config: MelConfig
    sample_rate: int
    refine_steps: int
    refinement: MelRefinement

    def __call__(
        self, mel: Tensor, /, *, sigma: float | None, seed: int, refine: int | None
    ) -> Tensor: ...

    def draw(self, mel: Tensor, /, *, sigma: float | None, seed: int) -> Tensor: ...

    def resynth(
        self, audio: Tensor, /, *, sigma: float | None, seed: int, refine: int | None
    ) -> Tensor: ...

    def mel(self, audio: Tensor, /) -> Tensor: ...

    def log_prob(self, audio: Tensor, mel: Tensor, /) -> Tensor: ...


class Metric(NamedTuple):
    """How a figure is measured.

    Attributes:
        columns: Names of the figures that it gives.
        measure: (reference (T,), copy (T,), sample rate, mel) to those figures.
        package: Module that it needs, if it is an optional one.
        needs_reference: Whether it compares, so that it says nothing of the recording itself.
    """

    columns: tuple[str, ...]
    measure: Callable[[FloatArray, FloatArray, int, MelSpectrogram], Sequence[float]]
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
    """One system's figures.

    Attributes:
        name: What was measured.
        scores: Mean over clips by column; None where no clip could be measured.
        failed: By column, how many clips could not be measured (NaN) and are not in the mean.
    """

    name: str
    scores: dict[str, float | None]
    failed: dict[str, int]


class BadFile(_Result):
    """A file that could not be read, and why."""

    path: str
    message: str


class Clip(_Result):
    """What was measured of one recording.

    Attributes:
        n_samples: Its length at the model's rate.
        figures: By system and column; NaN where a metric could not judge it.
        log_prob_speech, log_prob_draw, draw_correlation: As in `Evaluation`; the last may be NaN.
        changes: What reading did to it, in words.
    """

    n_samples: int
    figures: dict[str, dict[str, float]]
    log_prob_speech: float
    log_prob_draw: float
    draw_correlation: float
    changes: tuple[str, ...]


# To and from plain values, for the way from one process to another.
CLIPS = TypeAdapter(list[Clip | BadFile])


class Evaluation(_Result):
    """Result of `evaluate`. Means are over clips, each counting once; likelihoods over samples.

    Attributes:
        n_clips: Clips measured.
        seconds: Their duration.
        seed: Of the draws and of Griffin-Lim's first phase.
        sigma: Of the draws; None is the model's own.
        rows: Systems compared.
        log_prob_speech: Mean log-likelihood of the dequantised recordings, nats per audio sample.
        log_prob_draw: The same of the model's own draws (not refined) under the same mels. Far
            above `log_prob_speech` means that draws are no samples of the density.
        draw_correlation: Pearson correlation of two draws of one mel; near 1, noise is ignored.
        missing: Columns left out because a package is not installed.
        bad_files: Files left out.
    """

    n_clips: int
    seconds: float
    seed: int
    sigma: float | None
    rows: tuple[Row, ...]
    log_prob_speech: float
    log_prob_draw: float
    draw_correlation: float | None
    missing: tuple[str, ...]
    bad_files: tuple[BadFile, ...]

    def to_json(self) -> str:
        """The fields as indented JSON."""
        return self.model_dump_json(indent=2)

    def table(self) -> "Table":
        """The rows as a table for a terminal."""
        from rich.table import Table

        columns = [column for column in COLUMNS if column not in self.missing]
        table = Table(title=f"{self.n_clips} clips, {self.seconds:.0f} s")
        table.add_column("copy-synthesis by")
        for column in columns:
            table.add_column(column, justify="right")
        for row in self.rows:
            cells = (_format(row.scores.get(column), column) for column in columns)
            table.add_row(row.name, *cells)
        return table


def evaluate(
    vocoder: CopySynthesis,
    files: Iterable[Path],
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    sigma: float | None = None,
    refine: int | None = None,
) -> Evaluation:
    """Copy-synthesises recordings and measures the copies.

    Rows: the recordings (DNSMOS only), the model unrefined and at its own refinement, and
    Griffin-Lim with both inversions of `waveflow.metrics.griffin_lim`: 60 iterations, and 32
    followed by as many refinement steps as the model gets. A copy has its recording's length and
    is clipped to [-1, 1].

    Args:
        vocoder: The model.
        files: Recordings, in any format and rate that `read_audio` takes.
        seed: Of each draw, the same for each clip.
        progress: Called with (files done, files) after each file.
        sigma: Standard deviation of the noise; None for the model's own.
        refine: Refinement steps of the refined rows; None for the model's own.

    Raises:
        AudioError: If there is no file, or none can be read.
    """
    clips = measure_clips(vocoder, list(files), seed, progress, sigma, refine)
    return summarise(clips, vocoder.sample_rate, seed, sigma)


def measure_clips(
    vocoder: CopySynthesis,
    files: Sequence[Path],
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    sigma: float | None = None,
    refine: int | None = None,
) -> list[Clip | BadFile]:
    """The first half of `evaluate`, with its arguments: of several processes, each may do a part.

    A clip's figures do not depend on the others.
    """
    metrics = [metric for metric in METRICS if _is_installed(metric.package)]
    clips: list[Clip | BadFile] = []
    for done, path in enumerate(files, start=1):
        try:
            audio, _, changes = read_audio(path, vocoder.sample_rate)
        except (WaveflowError, OSError) as error:
            clips.append(BadFile(path=str(path), message=str(error)))
        else:
            made = copies(vocoder, audio, seed, sigma, refine)
            speech, draw, correlation = _likelihoods(vocoder, audio, seed, sigma)
            clips.append(
                Clip(
                    n_samples=len(audio),
                    figures={
                        name: _measure(_judges(metrics, name), audio, copy, vocoder.mel_config)
                        for name, copy in made.items()
                    },
                    log_prob_speech=speech,
                    log_prob_draw=draw,
                    draw_correlation=correlation,
                    changes=tuple(changes),
                )
            )
        if progress:
            progress(done, len(files))
    return clips


def summarise(
    results: Sequence[Clip | BadFile], sample_rate: int, seed: int, sigma: float | None
) -> Evaluation:
    """The second half of `evaluate`: means over clips.

    Args:
        results: Of `measure_clips`, of all files.
        sample_rate: Of the model, in Hz.
        seed, sigma: As they were given to `measure_clips`.

    Raises:
        AudioError: If no file could be read.
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
        draw_correlation=_nan_mean(clip.draw_correlation for clip in clips),
        missing=tuple(column for column in COLUMNS if column not in measured),
        bad_files=bad_files,
    )


def select_ids(files: Sequence[Path], ids_file: Path) -> list[Path]:
    """The files whose names without suffix stand in a list, one a line, such as val.txt.

    Raises:
        DataError: If the list cannot be read, or names a file that is not there.
    """
    try:
        ids = ids_file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{ids_file} cannot be read as a list of ids: {error}") from error
    by_id = {path.stem: path for path in files}
    if absent := [name for name in ids if name not in by_id]:
        raise DataError(
            f"{ids_file} names {len(absent)} clips that are not there: {absent[0]}, ..."
        )
    return [by_id[name] for name in ids]


def copies(
    vocoder: CopySynthesis,
    audio: FloatArray,
    seed: int = 0,
    sigma: float | None = None,
    refine: int | None = None,
) -> Mapping[str, FloatArray]:
    """The recording (T,) and its copies (T,), clipped to [-1, 1], by the names of the rows.

    Args: as `evaluate`.
    """
    recording = torch.from_numpy(audio)
    mel = _padded_mel(vocoder, recording)
    steps = vocoder.refine_steps if refine is None else refine
    made = {RECORDING: recording}
    for model_steps in sorted({0, steps}):
        made[_with_refinement("model", model_steps)] = vocoder.resynth(
            recording, seed=seed, refine=model_steps, sigma=sigma
        )
    for label, inversion in (
        ("Griffin-Lim", least_squares_magnitude),
        ("smooth Griffin-Lim", smooth_magnitude),
    ):
        made[f"{label} 60"] = griffin_lim(mel, vocoder.mel_config, 60, seed, inversion)
        start = griffin_lim(mel, vocoder.mel_config, 32, seed, inversion)
        made[_with_refinement(f"{label} 32", steps)] = vocoder.refinement(
            start.to(mel.device)[None], mel[None], steps
        )[0]
    return {name: _finish(copy, len(audio)) for name, copy in made.items()}


def _with_refinement(name: str, steps: int) -> str:
    return f"{name} + {steps} steps"


def _padded_mel(vocoder: CopySynthesis, audio: Tensor) -> Tensor:
    """Mel of the audio extended by zeros to whole hops, as `resynth` takes it."""
    hop = vocoder.mel_config.hop_length
    padded = functional.pad(audio, (0, -len(audio) % hop))
    # Centred mels have one frame more than hops; a vocoder trims what it makes of it.
    return vocoder.mel(padded)


def _finish(copy: Tensor, n_samples: int) -> FloatArray:
    return copy.detach().cpu().float().numpy()[:n_samples].clip(-1.0, 1.0)


def _judges(metrics: Sequence[Metric], name: str) -> list[Metric]:
    """The metrics that have something to say of a copy, or of the recording itself."""
    return [metric for metric in metrics if name != RECORDING or not metric.needs_reference]


def _measure(
    metrics: Sequence[Metric], reference: FloatArray, copy: FloatArray, mel_config: MelConfig
) -> dict[str, float]:
    """Figures of one copy by column; NaN where a metric cannot judge this clip."""
    figures: dict[str, float] = {}
    for metric in metrics:
        try:
            values = metric.measure(
                reference, copy, mel_config.sample_rate, MelSpectrogram(mel_config)
            )
        # Foreign code with errors of its own kinds (PESQ: no utterance, too short): a clip that
        # one metric cannot judge must not end a long evaluation. It is counted and reported.
        except Exception as error:
            logger.warning("%s could not be measured: %s", ", ".join(metric.columns), error)
            values = [math.nan] * len(metric.columns)
        figures.update(zip(metric.columns, values, strict=True))
    return figures


class _Likelihoods(NamedTuple):
    speech: float
    draw: float
    correlation: float


def _likelihoods(
    vocoder: CopySynthesis, audio: FloatArray, seed: int, sigma: float | None
) -> _Likelihoods:
    """Log-likelihood of speech and of an unrefined draw, and the correlation of two draws."""
    recording = torch.from_numpy(audio)
    mel = _padded_mel(vocoder, recording)
    draw, other = (
        vocoder.draw(mel, sigma=sigma, seed=draw_seed).cpu() for draw_seed in (seed, seed + 1)
    )
    # The likelihood drops what is beyond the last whole hop, and needs one.
    missing = max(0, vocoder.mel_config.hop_length - len(recording))
    speech = functional.pad(dequantise(recording, DEQUANTISE_SEED), (0, missing))
    return _Likelihoods(
        float(vocoder.log_prob(speech[None], mel[None])),
        float(vocoder.log_prob(draw[None], mel[None])),
        draw_correlation(draw.numpy(), other.numpy()),
    )


def _is_installed(package: str | None) -> bool:
    try:
        return package is None or bool(importlib.import_module(package))
    except ImportError:
        return False


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
