"""The training loop: step, log, validate, save, resume.

Every random number of a step comes from a generator seeded by (seed, step), so a run that
resumes at a step continues bit for bit on a CPU, and no generator has to be saved.
"""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save as save_safetensors
from torch import Tensor

from waveflow.audio.mel import MelSpectrogram
from waveflow.checkpoint import (
    CONFIG,
    RUN_POINTER,
    WEIGHTS,
    ModelConfig,
    Provenance,
    first_problem,
    load_weights,
    parse_config,
    parse_tensors,
    read_files,
    resolve_run,
    save_checkpoint,
)
from waveflow.data.cache import AUDIO_FILE, TrainingCache
from waveflow.data.segments import SegmentSampler
from waveflow.data.statistics import mel_range
from waveflow.errors import CheckpointError, ConfigError, DataError
from waveflow.models.frameglow import FrameConditioner
from waveflow.models.registry import build_flow
from waveflow.training.config import Recipe, TrainConfig
from waveflow.training.log import MetricsLog
from waveflow.training.losses import WINDOWS, SpectralDistance, objectives
from waveflow.training.validation import validate

logger = logging.getLogger(__name__)

TRAINING, STATE = "training.safetensors", "state.json"


class Progress(NamedTuple):
    """What a step reports.

    Attributes:
        step: steps done.
        values: by name, the terms that this step trained and the gradient's norm.
        audio_seconds_per_second: audio trained on, for each second of the clock.
        minutes_left: estimate.
    """

    step: int
    values: dict[str, float]
    audio_seconds_per_second: float
    minutes_left: float


class RunState(BaseModel):
    """state.json: where a run stands, beside its weights and moments."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    minutes: float
    skipped: int
    pitch_steps: int
    best: float | None
    best_name: str | None
    audio_sha256: str


class Trainer:
    """A run in a folder: `Trainer(...).run()`.

    Args:
        recipe: everything that decides the run.
        cache: training data, at the recipe's mel settings.
        out: the run's folder; recipe.json, metrics.csv, checkpoints.
        device: of the training.
        init: weights to start from; the pitch head then counts as trained.
        resume: continue the run that is in `out`, from its last checkpoint.
        data: what the data is, in words, for the checkpoint's provenance.

    Raises:
        ConfigError: the recipe cannot be trained, or is not that of the run that is resumed.
        CheckpointError: there is nothing to resume, or it is damaged.
        DataError: the cache does not fit, or nothing in it is for training or for validation.
    """

    def __init__(
        self,
        recipe: Recipe,
        cache: TrainingCache,
        out: Path,
        device: str = "cpu",
        init: tuple[Path, dict[str, Tensor]] | None = None,
        resume: bool = False,
        data: str = "",
    ) -> None:
        config = recipe.train
        _check(recipe, cache)
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.recipe, self.cache, self.out = recipe, cache, out
        self.device = torch.device(device)
        self.flow = build_flow(recipe.model, recipe.mel).to(self.device)
        if init is not None:
            load_weights(self.flow, init[1], init[0])
        self.pitch_steps = config.pitch_steps if init is None else 0
        if self.pitch_steps and not hasattr(self.flow.conditioner, "pitch_loss"):
            raise ConfigError(f"pitch_steps {config.pitch_steps}: this model has no pitch head")
        self.mel = MelSpectrogram(recipe.mel).to(self.device)
        self.spectral = SpectralDistance(recipe.mel).to(self.device)
        self.sampler = SegmentSampler(
            cache,
            config.segment_frames,
            config.batch_size,
            recipe.mel,
            config.seed,
            config.gain_range,
        )
        # One optimizer for both phases: parameters without a gradient are left alone.
        self.optimizer = torch.optim.AdamW(
            self.flow.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
        )
        self.ema = {name: t.detach().clone() for name, t in self.flow.state_dict().items()}
        self.step, self.minutes, self.skipped = 0, 0.0, 0
        self.best: float | None = None
        self.best_name: str | None = None
        self.provenance = Provenance(data=data, mel_range=mel_range(cache, recipe.mel))
        if resume:
            self._load()
        else:
            self._start_folder()

    def run(
        self,
        max_minutes: float = math.inf,
        report: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        """Trains until `steps` are done or the clock has run for `max_minutes`, then saves."""
        config = self.recipe.train
        begin, saved_minutes = time.monotonic(), self.minutes
        first = self.step
        with MetricsLog(self.out, self.step) as log:
            while self.step < config.steps:
                values = self._train_step()
                self.step += 1
                elapsed = max(time.monotonic() - begin, 1e-9) / 60  # clocks can be coarse
                self.minutes = saved_minutes + elapsed
                done = self.step - first
                audio_seconds = (
                    done
                    * config.batch_size
                    * config.segment_frames
                    * self.recipe.mel.hop_length
                    / self.recipe.mel.sample_rate
                )
                left = min(elapsed / done * (config.steps - self.step), max_minutes - elapsed)
                report(Progress(self.step, values, audio_seconds / (elapsed * 60), left))
                if self.step % 20 == 0:
                    log.add("train", self.step, self.minutes, values)
                last = self.step == config.steps or elapsed >= max_minutes
                save = last or self.step % config.checkpoint_every == 0
                if (last or self.step % config.validate_every == 0) and not self._in_pitch():
                    save = self._validate(log) or save
                if save:
                    self._save()
                if last:
                    break

    def _in_pitch(self) -> bool:
        return self.step < self.pitch_steps

    def _train_step(self) -> dict[str, float]:
        """One optimizer step; its terms. A non-finite one is skipped and counted."""
        config = self.recipe.train
        in_pitch = self._in_pitch()
        torch.manual_seed(config.seed * 1_000_003 + self.step)
        audio, mel, f0 = self._batch()
        self.flow.train()
        if in_pitch:
            loss = cast(FrameConditioner, self.flow.conditioner).pitch_loss(mel, f0)
            values = {"pitch_loss": loss.item()}
        else:
            loss, values = self._flow_loss(audio, mel)

        rate = learning_rate(config, self.step if in_pitch else self.step - self.pitch_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.flow.parameters(), config.clip_norm)
        values["gradient_norm"] = norm.item()
        if math.isfinite(values["gradient_norm"]) and math.isfinite(loss.item()):
            self.optimizer.step()
            self._update_ema()
        else:
            self.skipped += 1
            logger.warning("step %d skipped: loss or gradient is not finite", self.step)
        return values

    def _batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """The step's audio (B, T), mel (B, M, F) and F0 (B, F)."""
        batch = self.sampler.batch(self.step)
        audio, f0 = batch.audio.to(self.device), batch.f0.to(self.device)
        hop, margin = self.recipe.mel.hop_length, self.recipe.mel.margin_frames
        end = margin + self.recipe.train.segment_frames
        return audio[:, margin * hop : end * hop], self.mel(audio)[:, :, margin:end], f0

    def _flow_loss(self, audio: Tensor, mel: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum of the objectives, and each of them."""
        config = self.recipe.train
        terms = objectives(
            self.flow,
            self.spectral,
            audio,
            mel,
            energy=config.energy_weight > 0,
            calibration=config.calibration_weight > 0,
            precision=config.precision,
        )
        loss = config.likelihood_weight * terms.nll
        values = {"log_likelihood": -terms.nll.item()}
        if terms.energy is not None:
            loss = loss + config.energy_weight * terms.energy
            values["energy"] = terms.energy.item()
        if terms.calibration is not None:
            loss = loss + config.calibration_weight * terms.calibration
            values["calibration"] = terms.calibration.item()
        return loss, values

    @torch.no_grad()
    def _update_ema(self) -> None:
        # Young averages forget faster, or the random start would be in them for long.
        decay = min(self.recipe.train.ema_decay, (1 + self.step) / (10 + self.step))
        for name, value in self.flow.state_dict().items():
            if value.is_floating_point():
                self.ema[name].lerp_(value, 1 - decay)
            else:
                self.ema[name].copy_(value)

    def _validate(self, log: MetricsLog) -> bool:
        """Validates the averaged weights; whether they are the best so far."""
        averaged = build_flow(self.recipe.model, self.recipe.mel).to(self.device)
        averaged.load_state_dict(self.ema)
        result = validate(averaged.prepare_for_inference(), self.cache, self.mel, self.device)
        values = {
            "log_likelihood": result.log_likelihood,
            "draw_log_likelihood": result.draw_log_likelihood,
        }
        log.add("validation", self.step, self.minutes, values)
        log.add_audio(self.step, result.example, self.recipe.mel.sample_rate)
        logger.info(
            "step %d, %.1f minutes: validation log-likelihood %.4f, own draws %.4f",
            self.step,
            self.minutes,
            result.log_likelihood,
            result.draw_log_likelihood,
        )
        self.provenance = self.provenance.model_copy(
            update={"steps": self.step, "minutes": round(self.minutes, 2), **values}
        )
        best = -math.inf if self.best is None else self.best
        if not result.log_likelihood > best:
            return False
        self.best, self.best_name = result.log_likelihood, self._name()
        return True

    def _name(self) -> str:
        return f"step-{self.step:08d}"

    def _save(self) -> None:
        """Writes this step's checkpoint, then points to it, then removes the older ones."""
        config = ModelConfig(
            model=self.recipe.model,
            mel=self.recipe.mel,
            synthesis=self.recipe.synthesis,
            provenance=self.provenance,
        )
        parameters = dict(self.flow.named_parameters())
        tensors = {f"raw.{name}": t for name, t in self.flow.state_dict().items()}
        for name, parameter in parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        state = RunState(
            step=self.step,
            minutes=self.minutes,
            skipped=self.skipped,
            pitch_steps=self.pitch_steps,
            best=self.best,
            best_name=self.best_name,
            audio_sha256=self.cache.manifest.sha256[AUDIO_FILE],
        )
        extra = {
            TRAINING: save_safetensors({k: v.cpu().contiguous() for k, v in tensors.items()}),
            STATE: (state.model_dump_json(indent=1) + "\n").encode(),
        }
        save_checkpoint(self.out / self._name(), config, self.ema, extra)
        keep = {"last": self._name(), "best": self.best_name or self._name()}
        _write_atomic(self.out / RUN_POINTER, json.dumps(keep, indent=1) + "\n")
        # Those that begin with a dot are what a killed save left.
        for folder in [*self.out.glob("step-*"), *self.out.glob(".step-*")]:
            if folder.name not in keep.values():
                shutil.rmtree(folder, ignore_errors=True)

    def _load(self) -> None:
        """Takes up the last checkpoint of the run in `out`."""
        if not (self.out / RUN_POINTER).is_file():
            raise CheckpointError(f"nothing to resume in {self.out}: it has no {RUN_POINTER}")
        stored = self.out / "recipe.json"
        recipe = _stored_recipe(stored)
        if recipe is None or _endless(recipe) != _endless(self.recipe):
            raise ConfigError(f"{stored} is not this recipe: resume with the recipe of the run")
        folder = resolve_run(self.out, "last")
        files = read_files(folder)
        if TRAINING not in files or STATE not in files:
            raise CheckpointError(f"{folder} holds no {TRAINING} and {STATE}: cannot resume")
        tensors = parse_tensors(files[TRAINING], folder / TRAINING)
        raw = {k.removeprefix("raw."): v for k, v in tensors.items() if k.startswith("raw.")}
        load_weights(self.flow, raw, folder)
        self.ema = {
            k: v.to(self.device) for k, v in parse_tensors(files[WEIGHTS], folder / WEIGHTS).items()
        }
        for name, parameter in self.flow.named_parameters():
            moments: dict[str, Any] = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors.get(f"optimizer.{key}.{name}")
                if value is not None:
                    moments[key] = value if key == "step" else value.to(self.device)
            if moments:
                self.optimizer.state[parameter] = moments
        try:
            state = RunState.model_validate_json(files[STATE])
        except ValidationError as error:
            raise CheckpointError(f"{folder / STATE}: {first_problem(error)}") from error
        if state.audio_sha256 != self.cache.manifest.sha256[AUDIO_FILE]:
            raise ConfigError(f"{self.cache.folder} is not the data of the run in {self.out}")
        self.step, self.minutes = state.step, state.minutes
        self.skipped, self.pitch_steps = state.skipped, state.pitch_steps
        self.best, self.best_name = state.best, state.best_name
        self.provenance = parse_config(files[CONFIG], folder / CONFIG).provenance

    def _start_folder(self) -> None:
        if (self.out / RUN_POINTER).exists():
            raise ConfigError(f"{self.out} holds a run: use --resume or name another folder")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            _write_atomic(self.out / "recipe.json", self.recipe.model_dump_json(indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"cannot write the run {self.out}: {error.strerror}") from error


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then 1 / sqrt(1 + step / decay_steps)."""
    warmup = min(1.0, (step + 1) / config.warmup_steps)
    return config.learning_rate * warmup / math.sqrt(1 + step / config.decay_steps)


def _check(recipe: Recipe, cache: TrainingCache) -> None:
    segment = recipe.train.segment_frames * recipe.mel.hop_length
    if recipe.train.energy_weight and segment < max(WINDOWS):
        raise ConfigError(
            f"segment_frames {recipe.train.segment_frames} are {segment} samples; the energy "
            f"distance needs {max(WINDOWS)}: give longer segments"
        )
    if not cache.clips("val"):
        raise DataError(f"{cache.folder} has no validation clips: keep some in val.txt")


def _stored_recipe(path: Path) -> Recipe | None:
    try:
        return Recipe.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _endless(recipe: Recipe) -> Recipe:
    """The recipe without its end, which a run may move."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 1})})


def _write_atomic(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
