"""The training loop: step, log, validate, save, resume.

Every random number of a step comes from a generator seeded by (seed, step), so a run that
resumes at a step continues bit for bit on a CPU, and no generator has to be saved.

Several processes (`distributed`) share each batch. A batch, its noise and what its loss is
divided by are those of the whole, so that their number changes a run by rounding alone. All
take every decision together, on sums of all; rank 0 writes.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save as save_safetensors
from torch import Tensor

from waveflow.audio.mel import MelSpectrogram
from waveflow.bijections import ActNorm
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
    remove_checkpoint,
    run_checkpoints,
    save_checkpoint,
)
from waveflow.data.cache import AUDIO_FILE, MEL_FILE, TrainingCache
from waveflow.data.segments import SegmentSampler
from waveflow.data.statistics import mel_range
from waveflow.errors import CheckpointError, ConfigError, DataError
from waveflow.files import atomic_path
from waveflow.flow import Flow
from waveflow.models.frameglow import FrameConditioner
from waveflow.models.registry import build_flow
from waveflow.training.compile import compile_networks
from waveflow.training.config import Recipe, TrainConfig
from waveflow.training.distributed import (
    Share,
    all_sum,
    in_any,
    is_main,
    on_main,
    own_share,
    sum_gradients,
)
from waveflow.training.log import MetricsLog
from waveflow.training.losses import WINDOWS, SpectralDistance, objectives
from waveflow.training.memory import choose_recompute
from waveflow.training.prefetch import Prefetch
from waveflow.training.record import RUN_RECORD, run_record
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
    # Of mels that were given with the audio.
    mel_sha256: str | None = None


class Trainer:
    """A run in a folder: `Trainer(...).run()`.

    Args:
        recipe: everything that decides the run.
        cache: training data, at the recipe's mel settings.
        out: the run's folder; recipe.json, metrics.csv, checkpoints.
        device: of the training.
        init: weights to start from; the pitch head then counts as trained.
        resume: continue the run that is in `out`, from its newest whole checkpoint; a run that
            was killed before it had one starts anew.
        data: what the data is, in words, for the checkpoint's provenance.

    Raises:
        ConfigError: the recipe cannot be trained, or is not that of the run that is resumed.
        CheckpointError: no checkpoint of the run that is resumed can be used.
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
        self.share = own_share(config.batch_size)
        n_items = max(p.stop - p.start for p in self.share.split(config.accumulate))
        self.flow.recompute = choose_recompute(self.flow, recipe, n_items, self.device)
        if config.compile:
            compile_networks(self.flow, self.device)
        sampler = SegmentSampler(
            cache,
            config.segment_frames,
            config.batch_size,
            recipe.mel,
            config.seed,
            config.gain_range,
            slice(self.share.start, self.share.stop),
        )
        self.batches = Prefetch(sampler.batch)
        # One optimizer for both phases: parameters without a gradient are left alone.
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.flow, config.rates),
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            # One pass over all weights; the kernels are those of a CPU and of CUDA.
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.ema = {name: t.detach().clone() for name, t in self.flow.state_dict().items()}
        self.step, self.minutes, self.skipped = 0, 0.0, 0
        self.best: float | None = None
        self.best_name: str | None = None
        # The likelihood before the first step of a run that starts from trained weights.
        self.before: float | None = None
        self._is_tuning = False
        self.provenance = Provenance(data=data)
        if not (resume and self._resume()):
            levels = on_main(lambda: mel_range(cache, recipe.mel))
            self.provenance = self.provenance.model_copy(update={"mel_range": levels})
            on_main(lambda: self._start_folder(None if init is None else init[0]))
            self._is_tuning = init is not None
            if init is not None:
                # What a kill before the first step's checkpoint would lose.
                self._save()

    def run(
        self,
        max_minutes: float = math.inf,
        report: Callable[[Progress], None] = lambda _: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Trains until `steps` are done or the clock has run for `max_minutes`, then saves.

        Args:
            report: called after each step.
            stop: asked after each step; yes, in any process, saves and ends at that step.

        Raises:
            CheckpointError: the disk is full or cannot be written; older checkpoints are whole.
        """
        config = self.recipe.train
        begin, saved_minutes = time.monotonic(), self.minutes
        first = self.step
        with (
            _writing(self.out),
            MetricsLog(self.out, self.step) if is_main() else nullcontext() as log,
        ):
            if self._is_tuning:
                self._validate(log)
                self.before = self.best
            while self.step < config.steps and not self._out_of_patience():
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
                if log is not None and self.step % 20 == 0:
                    pace = {
                        "learning_rate": self._rate(self.step - 1),
                        "waiting_share": self.batches.waiting_share(),
                        "skipped": self.skipped,
                    }
                    log.add("train", self.step, self.minutes, values | pace)
                late, stopped = in_any(elapsed >= max_minutes, stop())
                last = late or self.step == config.steps
                save = last or stopped or self.step % config.checkpoint_every == 0
                if (last or self.step % config.validate_every == 0) and not self._in_pitch():
                    save = self._validate(log) or save
                if save or self._out_of_patience():
                    self._save()
                if stopped:
                    logger.info("asked to stop: saved at step %d", self.step)
                if last or stopped:
                    break
        if self._out_of_patience():
            logger.info(
                "stopped at step %d: since %s no validation log-likelihood was above %.4f",
                self.step,
                self.best_name,
                self.best,
            )

    def _out_of_patience(self) -> bool:
        """Whether `patience` validations, those of the interval, have brought nothing better."""
        config = self.recipe.train
        if not config.patience or self.best_name is None:
            return False
        best_step = int(self.best_name.removeprefix("step-"))
        since = self.step // config.validate_every - best_step // config.validate_every
        return since >= config.patience

    def _in_pitch(self) -> bool:
        return self.step < self.pitch_steps

    def _train_step(self) -> dict[str, float]:
        """One optimizer step; its terms. A non-finite one is skipped and counted."""
        config = self.recipe.train
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * self._rate(self.step)
        values = self._gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.flow.parameters(), config.clip_norm)
        values["gradient_norm"] = norm.item()
        if all(math.isfinite(value) for value in values.values()):
            self.optimizer.step()
            self._update_ema()
        else:
            self.skipped += 1
            logger.warning("step %d skipped: loss or gradient is not finite", self.step)
        return values

    def _rate(self, step: int) -> float:
        """The learning rate of a step, which starts again when the pitch head is done."""
        in_pitch = step < self.pitch_steps
        return learning_rate(self.recipe.train, step if in_pitch else step - self.pitch_steps)

    def _gradients(self) -> dict[str, float]:
        """Leaves the gradients of the loss of the whole batch; the terms of that loss."""
        config = self.recipe.train
        audio, mel, f0 = self._batch()
        parts = self.share.split(config.accumulate)
        n_voiced = levels = None
        if parts[0].weight < 1:
            # Means over a part would divide by the part's own.
            n_voiced = all_sum((f0 > 0).sum().float())
            levels = all_sum(self.spectral.levels(audio) * self.share.weight)
        self.flow.train()
        if len(parts) > 1 and not self._in_pitch():
            self._start_actnorm(audio, mel, levels)
        self.optimizer.zero_grad()
        values: dict[str, float] = {}
        for part in parts:
            # Each draws the random numbers of the whole batch, and takes its own.
            self._seed_noise()
            own = slice(part.start - self.share.start, part.stop - self.share.start)
            if self._in_pitch():
                voiced = None if n_voiced is None else n_voiced * part.weight
                conditioner = cast(FrameConditioner, self.flow.conditioner)
                loss = conditioner.pitch_loss(mel[own], f0[own], voiced)
                terms = {"pitch_loss": loss.item()}
            else:
                loss, terms = self._flow_loss(audio[own], mel[own], part, levels)
            (loss * part.weight).backward()
            for name, value in terms.items():
                values[name] = values.get(name, 0.0) + value * part.weight
        sum_gradients(self.flow.parameters())
        sums = all_sum(torch.tensor([*values.values()], dtype=torch.float64))
        return dict(zip(values, sums.tolist(), strict=True))

    @torch.no_grad()
    def _start_actnorm(self, audio: Tensor, mel: Tensor, levels: Tensor | None) -> None:
        """Shows layers that start from their first batch the whole of it, not its first part."""
        norms = [module for module in self.flow.modules() if isinstance(module, ActNorm)]
        if not all(norm.initialized for norm in norms):
            self._seed_noise()
            self._flow_loss(audio, mel, self.share, levels)

    def _seed_noise(self) -> None:
        torch.manual_seed(self.recipe.train.seed * 1_000_003 + self.step)

    def _batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """The audio (B, T), mel (B, M, F) and F0 (B, F) of this process's items of the step.

        The mel is the one that the cache was given, or that of the audio.
        """
        batch = self.batches.get(self.step)
        audio, f0 = batch.audio.to(self.device), batch.f0.to(self.device)
        hop, margin = self.recipe.mel.hop_length, self.recipe.mel.margin_frames
        end = margin + self.recipe.train.segment_frames
        given = batch.mel
        mel = self.mel(audio)[:, :, margin:end] if given is None else given.to(self.device)
        return audio[:, margin * hop : end * hop], mel, f0

    def _flow_loss(
        self, audio: Tensor, mel: Tensor, share: Share, levels: Tensor | None
    ) -> tuple[Tensor, dict[str, float]]:
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
            share=share,
            levels=levels,
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

    def _validate(self, log: MetricsLog | None) -> bool:
        """Validates the averaged weights; whether they are the best so far."""
        averaged = build_flow(self.recipe.model, self.recipe.mel).to(self.device)
        averaged.load_state_dict(self.ema)
        result = validate(averaged.eval(), self.cache, self.mel, self.device)
        values = {
            "log_likelihood": result.log_likelihood,
            "draw_log_likelihood": result.draw_log_likelihood,
        }
        if log is not None:
            log.add_validation(self.step, self.minutes, result, self.mel)
        logger.info(
            "step %d, %.1f minutes: validation log-likelihood %.4f%s, own draws %.4f",
            self.step,
            self.minutes,
            result.log_likelihood,
            "" if result.interval is None else f" ± {result.interval:.4f}",
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
        on_main(self._write_checkpoint)

    def _write_checkpoint(self) -> None:
        """Writes this step's checkpoint, then points to it, then removes what is too old."""
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
            mel_sha256=self.cache.manifest.sha256.get(MEL_FILE),
        )
        extra = {
            TRAINING: save_safetensors({k: v.cpu().contiguous() for k, v in tensors.items()}),
            STATE: (state.model_dump_json(indent=1) + "\n").encode(),
        }
        save_checkpoint(self.out / self._name(), config, self.ema, extra)
        keep = self._point()
        with _writing(self.out):
            for folder in run_checkpoints(self.out):
                # A newer waveflow may read later steps, and this one could not.
                if folder.name < self._name() and folder.name not in keep:
                    remove_checkpoint(folder)
            # What a kill within a save left.
            for folder in self.out.glob(".step-*"):
                shutil.rmtree(folder, ignore_errors=True)
            for file in self.out.glob(".*.tmp.json"):
                file.unlink(missing_ok=True)

    def _point(self) -> set[str]:
        """Names the last checkpoint, the one before it and the best; what is named."""
        older = [f.name for f in run_checkpoints(self.out) if f.name < self._name()]
        pointer = {
            "last": self._name(),
            "previous": older[0] if older else self._name(),
            "best": self.best_name or self._name(),
        }
        with _writing(self.out):
            _write_text(self.out / RUN_POINTER, json.dumps(pointer, indent=1) + "\n")
        return set(pointer.values())

    def _resume(self) -> bool:
        """Takes up the run in `out`; whether there was one to take up."""
        if not on_main(lambda: bool(run_checkpoints(self.out))):
            logger.warning("%s holds no checkpoint yet: the run starts at step 0", self.out)
            return False
        stored = self.out / "recipe.json"
        recipe = _stored_recipe(stored)
        if recipe is None or _endless(recipe) != _endless(self.recipe):
            raise ConfigError(f"{stored} is not this recipe: resume with the recipe of the run")
        name, best, best_name = on_main(self._load_newest)
        if not is_main():
            self._load(self.out / name)
            self.best, self.best_name = best, best_name
        return True

    def _load_newest(self) -> tuple[str, float | None, str | None]:
        """Loads the newest checkpoint that is whole; its name, and what is the best."""
        errors = []
        for folder in run_checkpoints(self.out):
            try:
                self._load(folder)
            except CheckpointError as error:
                errors.append(error)
                logger.warning("%s", error)
                continue
            if errors:
                logger.warning("going on from %s, the newest that is whole", folder)
            self._forget_damaged_best()
            # A kill between a checkpoint and its pointer leaves an older pointer.
            self._point()
            return folder.name, self.best, self.best_name
        raise CheckpointError(
            f"no checkpoint in {self.out} can be resumed; the newest: {errors[0]}"
        )

    def _forget_damaged_best(self) -> None:
        if self.best_name in (None, self._name()):
            return
        try:
            read_files(self.out / str(self.best_name))
        except CheckpointError as error:
            logger.warning("%s: the best checkpoint is that of the next validation", error)
            self.best = self.best_name = None

    def _load(self, folder: Path) -> None:
        """Takes up a checkpoint; changes nothing but the weights where it raises."""
        files = read_files(folder)
        if TRAINING not in files or STATE not in files:
            raise CheckpointError(f"{folder} holds no {TRAINING} and {STATE}: cannot resume")
        try:
            state = RunState.model_validate_json(files[STATE])
        except ValidationError as error:
            raise CheckpointError(f"{folder / STATE}: {first_problem(error)}") from error
        hashes = self.cache.manifest.sha256
        if (state.audio_sha256, state.mel_sha256) != (hashes[AUDIO_FILE], hashes.get(MEL_FILE)):
            raise ConfigError(f"{self.cache.folder} is not the data of the run in {self.out}")
        config = parse_config(files[CONFIG], folder / CONFIG)
        if (config.model, config.mel) != (self.recipe.model, self.recipe.mel):
            raise CheckpointError(f"{folder / CONFIG} is not the model of the run's recipe")
        averaged = parse_tensors(files[WEIGHTS], folder / WEIGHTS)
        load_weights(self.flow, averaged, folder / WEIGHTS)
        tensors = parse_tensors(files[TRAINING], folder / TRAINING)
        raw = {k.removeprefix("raw."): v for k, v in tensors.items() if k.startswith("raw.")}
        load_weights(self.flow, raw, folder / TRAINING)
        self.ema = {k: v.to(self.device) for k, v in averaged.items()}
        for name, parameter in self.flow.named_parameters():
            moments: dict[str, Any] = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors.get(f"optimizer.{key}.{name}")
                if value is not None:
                    moments[key] = value.to(self.device)
            if moments:
                self.optimizer.state[parameter] = moments
        self.step, self.minutes = state.step, state.minutes
        self.skipped, self.pitch_steps = state.skipped, state.pitch_steps
        self.best, self.best_name = state.best, state.best_name
        self.provenance = config.provenance

    def _start_folder(self, init: Path | None) -> None:
        if run_checkpoints(self.out):
            raise ConfigError(f"{self.out} holds a run: use --resume or name another folder")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            _write_text(self.out / "recipe.json", self.recipe.model_dump_json(indent=1) + "\n")
            record = run_record(self.recipe, self.cache, self.device, self.provenance.data, init)
            _write_text(self.out / RUN_RECORD, record)
        except OSError as error:
            raise ConfigError(f"cannot write the run {self.out}: {error.strerror}") from error


def parameter_groups(flow: Flow, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """The optimizer's groups: parameters by their `factor` of the learning rate; 0 is frozen.

    Raises:
        ConfigError: a name with which no parameter begins.
    """
    named = dict(flow.named_parameters())
    for prefix in rates:
        if not any(_begins(name, prefix) for name in named):
            raise ConfigError(
                f"rates: no parameter begins with {prefix!r}; there are, for example, "
                f"{', '.join(sorted({name.partition('.')[0] for name in named}))}"
            )
    groups: dict[float, list[Tensor]] = {}
    for name, parameter in named.items():
        fitting = [prefix for prefix in rates if _begins(name, prefix)]
        factor = rates[max(fitting, key=len)] if fitting else 1.0
        if factor == 0:
            parameter.requires_grad_(False)
        else:
            groups.setdefault(factor, []).append(parameter)
    if not groups:
        raise ConfigError("rates: every parameter is frozen, so there is nothing to train")
    return [{"params": params, "factor": factor} for factor, params in groups.items()]


def _begins(name: str, prefix: str) -> bool:
    return f"{name}.".startswith(f"{prefix}.")


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
    train = recipe.train.model_copy(update={"steps": 1, "patience": 0})
    return recipe.model_copy(update={"train": train})


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Makes one line of what the disk refuses."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"cannot write to the run {folder}: {reason}") from error


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
