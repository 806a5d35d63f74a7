"""Copy-synthesis of recordings, measured beside baselines without a network."""

import importlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from waveflow.audio.dequantise import dequantise
from waveflow.audio.io import read_audio
from waveflow.audio.mel import MelConfig
from waveflow.audio.refine import MelRefinement
from waveflow.engine.options import OWN_OPTIONS, SynthesisOptions
from waveflow.errors import ConfigError, WaveflowError, fault
from waveflow.metrics.evaluation import (
    METRICS,
    BadFile,
    Clip,
    Evaluation,
    Metric,
    summarise,
)
from waveflow.metrics.griffin_lim import griffin_lim, least_squares_magnitude, smooth_magnitude
from waveflow.metrics.quality import FloatArray
from waveflow.metrics.spectral import draw_correlation

logger = logging.getLogger(__name__)

DEQUANTISE_SEED = 0
RECORDING = "recording"


class CopySynthesis(Protocol):
    """The part of `waveflow.Vocoder` that is measured here."""

    mel_config: MelConfig
    sample_rate: int
    refine_steps: int
    refinement: MelRefinement

    @property
    def is_bound(self) -> bool: ...

    def resynth(self, audio: Tensor, /, options: SynthesisOptions) -> Tensor: ...

    def draw(self, mel: Tensor, /, options: SynthesisOptions) -> Tensor: ...

    def mel(self, audio: Tensor, /) -> Tensor: ...

    def log_prob(self, audio: Tensor, mel: Tensor, /) -> Tensor: ...


def evaluate(
    vocoder: CopySynthesis,
    files: Iterable[Path],
    options: SynthesisOptions = OWN_OPTIONS,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Copy-synthesises recordings and measures the copies.

    Rows: the recordings (DNSMOS only), the model without and with refinement, and Griffin-Lim with
    both inversions of `waveflow.metrics.griffin_lim`: 60 iterations, and 32 followed by as many
    refinement steps as the model gets. A copy has its recording's length and is clipped to [-1, 1].

    Args:
        vocoder: the model.
        files: recordings, in any format and rate that `read_audio` takes.
        options: how to sample; the seed is the same for each clip.
        progress: called with (files done, files) after each file.

    Raises:
        AudioError: there is no file, or none can be measured.
        ConfigError: the options are wrong.
    """
    clips = measure_clips(vocoder, list(files), options, progress)
    rate, is_bound = vocoder.sample_rate, vocoder.is_bound
    return summarise(clips, rate, _seed(options), options.sigma, is_bound)


def measure_clips(
    vocoder: CopySynthesis,
    files: Sequence[Path],
    options: SynthesisOptions = OWN_OPTIONS,
    progress: Callable[[int, int], None] | None = None,
) -> list[Clip | BadFile]:
    """Measures each clip: the first half of `evaluate`, with its arguments.

    Clips do not depend on each other, so several processes can measure a part each.
    """
    metrics = [metric for metric in METRICS if _is_installed(metric.package)]
    clips: list[Clip | BadFile] = []
    for done, path in enumerate(files, start=1):
        try:
            clips.append(_measure_clip(vocoder, path, metrics, options))
        except ConfigError:
            raise
        except (WaveflowError, OSError) as error:
            clips.append(BadFile(path=str(path), message=str(error)))
        except Exception as error:
            message = f"{path}: {fault(error)}"
            clips.append(BadFile(path=str(path), message=message, is_ours=True))
        if progress:
            progress(done, len(files))
    return clips


def _measure_clip(
    vocoder: CopySynthesis, path: Path, metrics: Sequence[Metric], options: SynthesisOptions
) -> Clip:
    audio, _, changes = read_audio(path, vocoder.sample_rate)
    speech, draw, correlation = _likelihoods(vocoder, audio, options)
    return Clip(
        n_samples=len(audio),
        figures={
            name: _measure(_judges(metrics, name), audio, copy, vocoder)
            for name, copy in copies(vocoder, audio, options).items()
        },
        log_prob_speech=speech,
        log_prob_draw=draw,
        draw_correlation=correlation,
        changes=tuple(changes),
    )


def copies(
    vocoder: CopySynthesis, audio: FloatArray, options: SynthesisOptions = OWN_OPTIONS
) -> Mapping[str, FloatArray]:
    """Returns the recording (T,) and its copies (T,), clipped to [-1, 1], by the names of the rows.

    Args: as `evaluate`.
    """
    recording = torch.from_numpy(audio)
    mel = _padded_mel(vocoder, recording)
    steps = vocoder.refine_steps if options.refine is None else options.refine
    made = {RECORDING: recording}
    for model_steps in sorted({0, steps}):
        made[_with_refinement("model", model_steps)] = vocoder.resynth(
            recording, options.changed({"refine": model_steps})
        )
    for label, inversion in (
        ("Griffin-Lim", least_squares_magnitude),
        ("smooth Griffin-Lim", smooth_magnitude),
    ):
        seed, config = _seed(options), vocoder.mel_config
        made[f"{label} 60"] = griffin_lim(mel, config, 60, seed, inversion)
        start = griffin_lim(mel, config, 32, seed, inversion)
        made[_with_refinement(f"{label} 32", steps)] = vocoder.refinement(
            start.to(mel.device)[None], mel[None], steps
        )[0]
    return {name: _finish(copy, len(audio)) for name, copy in made.items()}


def _seed(options: SynthesisOptions) -> int:
    """The one seed of all clips."""
    [seed] = options.seeds(1)
    return seed


def _with_refinement(name: str, steps: int) -> str:
    return f"{name} + {steps} steps"


def _padded_mel(vocoder: CopySynthesis, audio: Tensor) -> Tensor:
    """Mel of the audio extended by zeros to whole hops."""
    hop = vocoder.mel_config.hop_length
    # A centred mel has one frame more than hops; a vocoder makes audio for it, which is cut off.
    return vocoder.mel(functional.pad(audio, (0, -len(audio) % hop)))


def _finish(copy: Tensor, n_samples: int) -> FloatArray:
    return copy.detach().cpu().float().numpy()[:n_samples].clip(-1.0, 1.0)


def _judges(metrics: Sequence[Metric], name: str) -> list[Metric]:
    """The metrics that can measure a copy, or the recording itself."""
    return [metric for metric in metrics if name != RECORDING or not metric.needs_reference]


def _measure(
    metrics: Sequence[Metric], reference: FloatArray, copy: FloatArray, vocoder: CopySynthesis
) -> dict[str, float]:
    """Figures of one copy by column; NaN where a metric cannot judge this clip."""
    figures: dict[str, float] = {}
    for metric in metrics:
        try:
            values = metric.measure(reference, copy, vocoder.sample_rate, vocoder.mel)
        # Packages raise errors of their own kinds (PESQ: no utterance, too short). One clip that
        # a metric cannot judge must not end a long evaluation; it is counted and reported.
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
    vocoder: CopySynthesis, audio: FloatArray, options: SynthesisOptions
) -> _Likelihoods:
    """Log-likelihood of speech and of an unrefined draw, and the correlation of two draws.

    Both draws are made at sigma 1, because only these are samples of the density.
    """
    recording = torch.from_numpy(audio)
    mel = _padded_mel(vocoder, recording)
    seed = _seed(options)
    draw, other = (
        vocoder.draw(mel, SynthesisOptions(sigma=1.0, seed=seed + more)).cpu() for more in (0, 1)
    )
    # The likelihood uses whole hops only, and needs at least one.
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
