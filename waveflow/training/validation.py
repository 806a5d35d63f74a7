"""Validation: the likelihood of speech that was held out and of own draws, and what makes it up."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import NormalDist
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from waveflow.audio.dequantise import dequantise
from waveflow.bijections import Inverse
from waveflow.bijections.base import Bijection
from waveflow.data.cache import TrainingCache, given_or_computed
from waveflow.errors import ConfigError
from waveflow.flow import Flow
from waveflow.objective import ScoreOf
from waveflow.training.distributed import all_sum, in_any, rank, world_size

N_MOMENTS = 4
# Of all clips together, where a flow draws sample by sample: half a minute for a WaveNet.
SEQUENTIAL_SAMPLES = 2**14


class LatentStatistics(NamedTuple):
    """Statistics of all values of z. Those of N(0, 1) are 0, 1 and 3.

    With a standard deviation other than 1 a scale alone would raise the likelihood; this happens
    on speech unlike that of the training. A kurtosis above 3 means that some values are still
    wider than others, or have heavy tails: the flow has not explained them.
    """

    mean: float
    standard_deviation: float
    kurtosis: float


class Validation(NamedTuple):
    """The result of a validation. Likelihoods are in nats per audio sample.

    Attributes:
        measure: the name of what is measured, `Flow.measure`.
        log_likelihood: its mean over all validation audio.
        interval: half the width of its 95 % confidence interval for other clips of the same kind;
            None with one clip. It does not tell two models apart: on the same clips their
            difference is known far better.
        draw_log_likelihood: of a draw at sigma 1 for each clip, or of its beginning where a flow
            draws sample by sample. It equals `log_likelihood` if draws have the distribution of
            speech.
        latent: statistics of the z of speech; None where a phase's score is measured.
        log_dets: by step, its part of the log-likelihood of speech, nats per audio sample.
        speech, example: the first clip (T,), and its draw or the beginning of it.
    """

    measure: str
    log_likelihood: float
    interval: float | None
    draw_log_likelihood: float
    latent: LatentStatistics | None
    log_dets: dict[str, float]
    speech: Tensor
    example: Tensor


class ValidationStopped(Exception):
    """A validation was asked to stop, and has no result."""


def validate(
    flow: Flow,
    cache: TrainingCache,
    spectrogram: Callable[[Tensor], Tensor],
    device: torch.device,
    report: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
    score: ScoreOf | None = None,
) -> Validation:
    """log p of every validation clip, dequantised with a fixed seed, and of a draw at sigma 1.

    The arguments are those of `score_clips`.
    """
    scores, speech, draw = score_clips(flow, cache, spectrogram, device, report, stop, score)
    return summarise(scores, flow, speech, draw)


@torch.inference_mode()
def score_clips(
    flow: Flow,
    cache: TrainingCache,
    spectrogram: Callable[[Tensor], Tensor],
    device: torch.device,
    report: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
    score: ScoreOf | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums that make up a validation, (clips, columns) float64, on the CPU.

    The columns are audio samples, log p of speech, log p of the draw, the power sums of z and
    the log-determinant of every step. With a `score` its value stands for log p of speech, and
    the draw's log p is the last column. Each process fills the rows of its own clips and leaves
    zeros in the others. So the sum of the tables is exactly the table of one process.

    Args:
        spectrogram: makes the mel of audio, for a cache without mels.
        report: called with the clips done and those in all, before each clip.
        stop: asked before each clip, in all processes.
        score: what is measured instead of log p (`Phase.score`).

    Returns:
        The table of all processes, then the first clip (T,) and its draw, in rank 0.

    Raises:
        ValidationStopped: `stop` returned True in one process; it is raised in all.
    """
    steps = learned_steps(flow.bijection)
    shape = len(cache.clips("val")), 3 if score else 3 + N_MOMENTS + len(steps)
    scores = torch.zeros(shape, dtype=torch.float64)
    example = torch.zeros(0), torch.zeros(0)
    for index, (clip, samples, given) in enumerate(cache.val_clips()):
        if index % world_size() == 0:
            report(index, len(scores))
            if in_any(stop())[0]:
                raise ValidationStopped
        if index % world_size() != rank():
            continue
        length = clip.frames * cache.hop_length
        audio = dequantise(samples, index)[:length].to(device)
        mel = given_or_computed(given, audio, spectrogram)[None, :, : clip.frames]
        noise = flow.noise(clip.frames, [0]).to(device)
        scores[index, 0] = length
        if score is not None:
            value, draw_log_prob, draw = score(flow, mel, noise)
            scores[index, 1:] = torch.cat([value, draw_log_prob]) * length
        else:
            n_clips = len(scores)
            scores[index, 1:], draw = _likelihoods(flow, steps, audio[None], mel, noise, n_clips)
        if index == 0:
            example = audio.cpu(), draw[0].cpu()
    return all_sum(scores), *example


def _likelihoods(
    flow: Flow,
    steps: dict[str, Bijection],
    audio: Tensor,
    mel: Tensor,
    noise: Tensor,
    n_clips: int,
) -> tuple[Tensor, Tensor]:
    """The columns of a clip (1, T) after the first, float64, and its draw (1, at most T)."""
    length = audio.shape[1]
    fitted = flow.fitted(audio, mel)
    with record_step_log_dets(steps) as log_dets:
        cond = fitted.cond.crop(length // flow.channels)
        log_prob, z = flow.log_prob(audio, cond, fitted.log_prob)
    n_drawn = _n_drawn(flow, noise.shape[2], n_clips)
    cond = flow.condition(mel).crop(n_drawn)
    draw, _ = flow.bijection.inverse(noise[:, :, :n_drawn], cond)
    draw_log_prob = flow(draw[:, 0], mel)
    log_probs = torch.cat([log_prob, draw_log_prob]).double() * length
    parts = [log_dets[name].double() for name in steps]
    return torch.cat([log_probs, power_sums(z), *parts]), draw[:, 0]


def _n_drawn(flow: Flow, n_positions: int, n_clips: int) -> int:
    """Positions to draw of a clip: all, or the first ones of a flow that draws one by one."""
    try:
        if flow.bijection.inverse_context.left < math.inf:
            return n_positions
    except ConfigError:  # it declares none, and will not stream
        return n_positions
    per_frame = flow.hop_length // flow.channels
    n_frames = max(1, SEQUENTIAL_SAMPLES // (n_clips * flow.hop_length))
    return min(n_positions, n_frames * per_frame)


def summarise(scores: Tensor, flow: Flow, speech: Tensor, draw: Tensor) -> Validation:
    """The Validation of a table of `score_clips` for all clips, and of an example (T,) twice."""
    n_samples = scores[:, 0].sum().item()
    n_values = n_samples * flow.latent_channels / flow.channels
    sums = scores.sum(0)
    means = (sums / n_samples).tolist()
    moments, log_dets = sums[3 : 3 + N_MOMENTS], means[3 + N_MOMENTS :]
    steps = learned_steps(flow.bijection) if len(moments) else []
    return Validation(
        measure=flow.measure,
        log_likelihood=means[1],
        interval=ratio_interval(scores[:, 1], scores[:, 0]),
        draw_log_likelihood=means[2],
        latent=latent_statistics(moments, n_values) if len(moments) else None,
        log_dets=dict(zip(steps, log_dets, strict=True)),
        speech=speech,
        example=draw,
    )


def power_sums(z: Tensor) -> Tensor:
    """The sums of z, z^2, z^3 and z^4 over all values, (4,) float64."""
    z = z.double()
    return torch.stack([z.pow(k).sum() for k in range(1, N_MOMENTS + 1)])


def latent_statistics(sums: Tensor, n_values: float) -> LatentStatistics:
    """Statistics of `n_values` values from their `power_sums` (4,), which add up over tensors.

    Central moments are polynomials of the raw ones. This loses no digits here, because the sums
    are float64 and z is of order one.
    """
    mean, square, cube, fourth = (sums / n_values).tolist()
    variance = square - mean**2
    centred = fourth - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4
    kurtosis = centred / variance**2 if variance > 0 else math.nan
    return LatentStatistics(mean, math.sqrt(max(variance, 0.0)), kurtosis)


def learned_steps(bijection: Bijection) -> dict[str, Bijection]:
    """The innermost steps with weights or a map of their own, in the order of the flow, by name.

    A name is a number and the type: "03_coupling".
    """
    steps: list[Bijection] = []

    def has_volume(module: nn.Module) -> TypeGuard[Bijection]:
        learned = next(module.parameters(), None) is not None or hasattr(module, "map")
        return isinstance(module, Bijection) and learned

    def visit(module: nn.Module) -> None:
        # An Inverse runs its inner step backwards; only its own result has the sign of the path.
        parts = list(module.modules())[1:]
        innermost = isinstance(module, Inverse) or not any(map(has_volume, parts))
        if has_volume(module) and innermost:
            steps.append(module)
        else:
            for child in module.children():
                visit(child)

    visit(bijection)
    return {f"{i:02d}_{type(step).__name__.lower()}": step for i, step in enumerate(steps, 1)}


@contextmanager
def record_step_log_dets(steps: dict[str, Bijection]) -> Iterator[dict[str, Tensor]]:
    """Collects, while it is open, the log-determinant (B,) of each step's forward pass."""
    log_dets: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(module: Bijection, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            log_dets[name] = output[1].detach()

        return hook

    handles = [step.register_forward_hook(record(name)) for name, step in steps.items()]
    try:
        yield log_dets
    finally:
        for handle in handles:
            handle.remove()


def ratio_interval(sums: Tensor, weights: Tensor) -> float | None:
    """Half a 95 % interval of sum(sums) / sum(weights) over clips (ratio estimator).

    For clips of one length it is the ordinary interval of a mean.

    Reference: Cochran 1977, chapter 6.
    """
    n_clips = len(sums)
    if n_clips < 2:
        return None
    residuals = sums - weights * (sums.sum() / weights.sum())
    variance = residuals.square().sum() * n_clips / (n_clips - 1)
    return _student_95(n_clips - 1) * (variance.sqrt() / weights.sum()).item()


def _student_95(degrees: int) -> float:
    """The 97.5 % point of Student's t, by an expansion.

    Within 0.1 % from 5 degrees of freedom on, 1 % at 3.

    Reference: Abramowitz, Stegun 1964, 26.7.5.
    """
    z = NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))
