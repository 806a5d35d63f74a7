"""What `waveflow compare` measures of a model that it trains, and of densities without training."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from waveflow.audio.dequantise import STEP_16_BIT, dequantise
from waveflow.audio.mel import MelSpectrogram
from waveflow.checkpoint import resolve_run, run_checkpoints
from waveflow.data.cache import TrainingCache, given_or_computed
from waveflow.data.segments import SegmentSampler
from waveflow.engine.cost import count_parameters, macs_per_second, timed
from waveflow.engine.vocoder import Vocoder, load
from waveflow.errors import ConfigError, DataError, DivergedError
from waveflow.training.config import MOST_STEPS, Recipe
from waveflow.training.loop import Progress, Trainer

# Held speech: the middle of at most so many validation clips, spread over all of them.
HELD_CLIPS, HELD_SECONDS = 60, 1.0
# Of the draws whose likelihood is measured. Some models draw sample by sample.
DRAW_SECONDS = 0.25
# A speed is measured for at least so long.
TIMED_SECONDS = 1.0
PREDICTION_ORDER = 16
# A density without training, and its row.
GAUSSIAN = "Gaussian of fixed variance"
NEVER = 10**12


class Goal(NamedTuple):
    """When the training of every model ends, by the clock or by steps."""

    minutes: float = math.inf
    steps: int = MOST_STEPS


class Job(NamedTuple):
    """A model to train and measure.

    Attributes:
        name: of the row.
        recipe: of the training (`for_comparison`).
        goal: the end of the training.
        cache: folder of the data.
        out: folder of the run.
        device: of the training and of all measurements.
        data: the data in words.
    """

    name: str
    recipe: Recipe
    goal: Goal
    cache: Path
    out: Path
    device: str
    data: str = ""

    def key(self) -> str:
        """A hash of all that decides the row, apart from the machine."""
        data = TrainingCache(self.cache).manifest.sha256
        held = HELD_CLIPS, HELD_SECONDS, DRAW_SECONDS
        parts = self.recipe.model_dump_json(), self.goal, sorted(data.items()), held, self.device
        return hashlib.sha256(repr(parts).encode()).hexdigest()


class Result(BaseModel):
    """A row of the comparison; None is not measured.

    Attributes:
        name: of the row.
        key: `Job.key`.
        n_samples, log_probs: audio samples and log-likelihood in nats of each piece of held speech.
        is_bound: whether likelihoods are lower bounds.
        parameters: number of weights.
        macs_per_second: multiply-adds for a second of audio, noise to audio.
        draw_log_likelihood: of own draws, nats per sample.
        samples_per_second: speed of a draw of one item.
        audio_per_second: seconds of audio trained on for each second of training.
        peak_bytes: by which training raised the peak of the process's own memory.
        steps, minutes: of training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    name: str
    key: str = ""
    n_samples: tuple[int, ...]
    log_probs: tuple[float, ...]
    is_bound: bool = False
    parameters: int
    macs_per_second: float | None = None
    draw_log_likelihood: float | None = None
    samples_per_second: float | None = None
    audio_per_second: float | None = None
    peak_bytes: int | None = None
    steps: int | None = None
    minutes: float | None = None


def for_comparison(recipe: Recipe, goal: Goal, seed: int) -> Recipe:
    """The recipe with the seed and the end that all models share, and without validations.

    Validations would take their time from the minutes of training, from some models more.
    """
    update = {"steps": goal.steps, "seed": seed, "validate_every": NEVER, "patience": 0}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=update)})


def measure(
    job: Job,
    report: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> Result | None:
    """Trains a model to its goal, or goes on with its run, and measures it.

    Call it in a process of its own, whose memory is then that of one model.

    Args:
        report: called after each step.
        stop: called after each step; if it returns True, the run is saved and there is no result.

    Raises:
        DivergedError: the training or the model's likelihood is no longer finite.
        ConfigError: the run in `job.out` is another one, or was trained for longer.
    """
    cache, goal = TrainingCache(job.cache), job.goal
    _load_modules()
    before, peak = _memory("RssAnon"), 0
    resume = bool(run_checkpoints(job.out))
    trainer = Trainer(job.recipe, cache, job.out, job.device, None, resume, job.data)
    _check_not_beyond(trainer, job)

    def ended() -> bool:
        return trainer.step >= goal.steps or trainer.minutes >= goal.minutes

    def after_step(progress: Progress) -> None:
        nonlocal peak
        # Pages of the data that are in memory are not the model's.
        peak = max(peak, _memory("VmHWM") - _memory("RssFile"))
        report(progress)

    if not ended():
        # A run that is asked to stop ends without a validation.
        trainer.run(goal.minutes - trainer.minutes, after_step, lambda: stop() or ended())
    if stop():
        return None
    on_gpu = trainer.device.type == "cuda"
    grown = torch.cuda.max_memory_allocated(trainer.device) if on_gpu else max(0, peak - before)
    config, mel = job.recipe.train, job.recipe.mel
    step_seconds = config.batch_size * config.segment_frames * mel.hop_length / mel.sample_rate
    minutes = max(trainer.minutes, 1e-9)
    return _scored(job, cache).model_copy(
        update={
            "audio_per_second": trainer.step * step_seconds / (60 * minutes),
            "peak_bytes": grown or None,
            "steps": trainer.step,
            "minutes": trainer.minutes,
        }
    )


@torch.no_grad()  # torch's counter of operations does not work in inference mode
def _scored(job: Job, cache: TrainingCache) -> Result:
    """What is measured of the trained model, by its newest checkpoint."""
    vocoder = load(resolve_run(job.out, "last"), device=job.device)
    flow, seed = vocoder.flow, job.recipe.train.seed
    held = list(held_speech(cache, vocoder.mel_spectrogram, job.device))
    torch.manual_seed(seed)  # a bound is estimated from a draw
    log_probs = [flow(audio[None], mel[None]).item() * len(audio) for audio, mel in held]
    if not all(map(math.isfinite, log_probs)):
        raise DivergedError(f"{job.out}: the log-likelihood of held speech is not finite")
    mels = draw_mels(held, vocoder.sample_rate / vocoder.hop_length)
    draws = flow.sample(mels, seed=seed)
    return Result(
        name=job.name,
        key=job.key(),
        n_samples=tuple(len(audio) for audio, _ in held),
        log_probs=tuple(log_probs),
        is_bound=flow.is_bound,
        parameters=count_parameters(flow),
        macs_per_second=macs_per_second(vocoder),
        draw_log_likelihood=flow(draws, mels).mean().item(),
        samples_per_second=_samples_per_second(vocoder, held[0][1]),
    )


def held_speech(
    cache: TrainingCache, spectrogram: Callable[[Tensor], Tensor], device: str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """The speech that all models are scored on: audio (T,) and mel (M, F), T = F hop_length.

    Each is the middle of a validation clip, with the noise that validation adds to it.
    """
    every = -(-len(cache.clips("val")) // HELD_CLIPS)
    most = max(1, round(HELD_SECONDS * cache.sample_rate / cache.hop_length))
    for index, (clip, samples, given) in enumerate(cache.val_clips()):
        if index % every == 0:
            audio = dequantise(samples, index).to(device)
            mel = given_or_computed(given, audio, spectrogram)
            n_frames = min(most, clip.frames)
            first = (clip.frames - n_frames) // 2
            hops = slice(first * cache.hop_length, (first + n_frames) * cache.hop_length)
            yield audio[hops], mel[:, first : first + n_frames]


def draw_mels(held: Sequence[tuple[Tensor, Tensor]], frame_rate: float) -> Tensor:
    """The mels (B, M, F) of the draws: the beginning of each piece of held speech."""
    shortest = min(mel.shape[1] for _, mel in held)
    n_frames = min(max(1, round(DRAW_SECONDS * frame_rate)), shortest)
    return torch.stack([mel[:, :n_frames] for _, mel in held])


def references(cache: TrainingCache, recipe: Recipe) -> list[Result]:
    """Two densities without training: a Gaussian of fixed variance, and linear prediction.

    Raises:
        DataError: the data do not fit the recipe, or have no clips to train or to score on.
    """
    SegmentSampler(cache, 1, 1, recipe.mel, recipe.train.seed)  # looks at the data
    if not cache.clips("val"):
        raise DataError(f"{cache.folder} has no validation clips: keep some in val.txt")
    held = list(held_speech(cache, MelSpectrogram(recipe.mel)))
    return [
        linear_prediction(GAUSSIAN, cache, held, 0),
        linear_prediction(f"linear prediction, {PREDICTION_ORDER}", cache, held, PREDICTION_ORDER),
    ]


def linear_prediction(
    name: str, cache: TrainingCache, held: Sequence[tuple[Tensor, Tensor]], order: int
) -> Result:
    """p(x) = prod_t N(x_t; sum_k a_k x_{t-k}, s^2), the most likely a and s^2 of training clips.

    They are a function of the clips' autocorrelation; 200 clips at most are looked at. Without
    predictors it is a Gaussian of fixed variance. The audio before a piece counts as silence.

    Reference: Makhoul 1975, equations 12 and 13 (the autocorrelation method).
    """
    clips, n_samples = cache.clips("train"), 0
    correlation = np.zeros(order + 1)
    for clip in clips[:: max(1, len(clips) // 200)]:
        samples = cache.audio(clip) / 32768
        n_samples += len(samples)
        for lag in range(min(order + 1, len(samples))):
            correlation[lag] += samples[lag:] @ samples[: len(samples) - lag]
    correlation /= n_samples
    correlation[0] += STEP_16_BIT**2 / 12  # of the noise that dequantises
    lags = np.abs(np.subtract.outer(range(order), range(order)))
    weights = np.linalg.solve(correlation[lags], correlation[1:]) if order else np.zeros(0)
    variance = correlation[0] - weights @ correlation[1:]
    log_probs = []
    for piece, _ in held:
        x = piece.double().cpu().numpy()
        error = np.convolve(x, [1, *-weights])[: len(x)]
        n_nats = error @ error / variance + len(x) * math.log(2 * math.pi * variance)
        log_probs.append(-0.5 * float(n_nats))
    sizes = tuple(len(piece) for piece, _ in held)
    return Result(name=name, n_samples=sizes, log_probs=tuple(log_probs), parameters=order + 1)


def _samples_per_second(vocoder: Vocoder, mel: Tensor) -> float:
    """Speed of draws of one item with the mel (M, F)."""
    vocoder.draw(mel[:, :4])
    draw = timed(lambda: vocoder.draw(mel).cpu(), str(vocoder.device))
    seconds, n_draws = 0.0, 0
    while seconds < TIMED_SECONDS:
        seconds += draw()
        n_draws += 1
    return n_draws * mel.shape[1] * vocoder.hop_length / seconds


def _check_not_beyond(trainer: Trainer, job: Job) -> None:
    """Raises ConfigError if a run has gone well beyond its goal: it would not compare."""
    mean_step = trainer.minutes / max(trainer.step, 1)
    too_late = trainer.minutes > 1.1 * job.goal.minutes + 3 * mean_step
    if too_late or trainer.step > job.goal.steps:
        raise ConfigError(
            f"{job.out} has {trainer.step} steps of training already, {trainer.minutes:.2f} "
            "minutes: that is more than asked for; ask for more, or give another --out"
        )


def _load_modules() -> None:
    """Loads what any training loads when it begins, which is no memory of the model."""
    with suppress(ImportError):
        from torch.utils import tensorboard  # noqa: F401
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # brings 90 MB of torch._dynamo


def _memory(field: str) -> int:
    """Bytes of this process in /proc/self/status (man 5 proc); 0 where there is none."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0
