"""The training loop: step, log, validate, save, resume.

The random numbers of a step come from generators that are seeded by (seed, step). So a run that
resumes continues bit for bit on a CPU, and no generator has to be saved.

Several processes (`distributed`) share each batch. The batch, its noise and the counts that a
loss divides by are those of the whole batch, so the number of processes changes a run by rounding
alone. The processes take every decision together, on sums over all of them; rank 0 writes.
"""

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from waveflow.audio.mel import MelSpectrogram
from waveflow.checkpoint import Provenance, load_weights
from waveflow.context import context_of
from waveflow.data.cache import TrainingCache
from waveflow.data.segments import Prefetch, SegmentSampler
from waveflow.errors import DataError, DivergedError
from waveflow.models.registry import build_flow
from waveflow.objective import Batch, Phase
from waveflow.training.config import Recipe
from waveflow.training.distributed import (
    all_sum,
    in_any,
    is_main,
    on_main,
    own_share,
    sum_gradients,
)
from waveflow.training.log import MetricsLog
from waveflow.training.machine import choose_recompute, compile_networks
from waveflow.training.objectives import phases
from waveflow.training.optimizer import (
    decay_of_average,
    learning_rate,
    make_optimizer,
    update_average,
)
from waveflow.training.run_folder import (
    RunFolder,
    Saved,
    checkpoint_name,
    load_training_tensors,
    training_tensors,
    writing,
)
from waveflow.training.validation import ValidationStopped, validate

logger = logging.getLogger(__name__)

LOG_EVERY = 20
# Skipped steps in a row after which a run has diverged: batches differ, so it is not the data.
MOST_SKIPPED = 20


class Progress(NamedTuple):
    """The report of a step.

    Attributes:
        step: steps done.
        values: by name, the terms that this step trained and the norm of the gradient.
        audio_seconds_per_second: audio trained on for each second of the clock.
        minutes_left: an estimate, to the end of a first phase or of the run.
        limit: what comes then: the last of the "steps", or that of the "minutes".
        phase: name of the first phase that this step belongs to; "" in the last one.
        phase_step, phase_steps: steps done and in all, of that phase, or else of the run.
    """

    step: int
    values: dict[str, float]
    audio_seconds_per_second: float
    minutes_left: float
    limit: str
    phase: str
    phase_step: int
    phase_steps: int


class Trainer:
    """A run in a folder: `Trainer(...).run()`.

    Args:
        recipe: decides everything about the run.
        cache: training data, at the recipe's mel settings.
        out: the run's folder (`run_folder`).
        device: of the training.
        init: the folder of trained weights and the weights, to start from them. The model's own
            first phases then count as done.
        resume: continue the run in `out` from its newest whole checkpoint. A run that was killed
            before its first checkpoint starts anew.
        data: the data in words, for the checkpoints' provenance.

    Raises:
        ConfigError: the recipe cannot be trained, or is not that of the run to resume.
        CheckpointError: no checkpoint of the run to resume can be used.
        DataError: the cache does not fit, or has no clips for training or for validation.
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
        if not cache.clips("val"):
            raise DataError(f"{cache.folder} has no validation clips: keep some in val.txt")
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.recipe, self.cache, self.device = recipe, cache, torch.device(device)
        self.folder = RunFolder(out, recipe, cache)
        self.flow = build_flow(recipe.model, recipe.mel).to(self.device)
        context_of(self.flow)  # without a context it could be trained, but never speak
        if init is not None:
            load_weights(self.flow, init[1], init[0])
        goes_on = resume and on_main(self.folder.has_checkpoints)
        teacher = self.folder.load_teacher(goes_on, self.device)
        # The last phase has no end and trains the whole flow.
        self.phases = phases(self.flow, recipe, self.device, teacher and teacher.flow)
        if init is not None:
            self.phases = self.phases[-1:]
        self.share = own_share(config.batch_size)
        n_items = max(part.stop - part.start for part in self.share.split(config.accumulate))
        self.flow.recompute = choose_recompute(self.flow, recipe, n_items, self.device)
        if config.compile:
            compile_networks(self.flow, self.device)
        self.spectrogram = MelSpectrogram(recipe.mel).to(self.device)
        self.batches = Prefetch(self._sampler().batch)
        self.optimizer = make_optimizer(self.flow, config)
        self.decay = decay_of_average(self.flow, config.ema_decay)
        self.average = {name: t.detach().clone() for name, t in self.flow.state_dict().items()}
        self.step, self.minutes, self.skipped = 0, 0.0, 0
        self.skipped_in_row = 0
        self.best: float | None = None
        self.best_name: str | None = None
        # The likelihood before the first step of a run that starts from trained weights.
        self.before: float | None = None
        if teacher is not None:
            source = teacher.config.provenance.data or "data not stated"
            data = f"{data}, taught by {recipe.train.teacher}: {source}"
        self.provenance = Provenance(data=data, measure=self.flow.measure)
        # Weights that a validation can be about, before the first step of this call.
        self._has_weights = init is not None
        if resume and self._resume():
            self._has_weights = True
            return
        mel_range = on_main(lambda: cache.mel_range(recipe.mel))
        self.provenance = self.provenance.model_copy(update={"mel_range": mel_range})
        start_from = None if init is None else init[0]
        on_main(lambda: self.folder.start(self.device, data, start_from, teacher))
        if init is not None:
            # A kill before the first step's checkpoint would lose the weights.
            self._save()

    def run(
        self,
        max_minutes: float = math.inf,
        report: Callable[[Progress], None] = lambda _: None,
        stop: Callable[[], bool] = lambda: False,
        report_clip: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Trains until `steps` are done or `max_minutes` are over, then saves.

        Args:
            report: called after each step.
            stop: called after each step, and before each clip of a validation; if it returns True
                in any process, the run saves and ends. A validation that is due is made up for
                when the run goes on.
            report_clip: called in a validation with the clips done and those in all.

        Raises:
            CheckpointError: the disk is full or cannot be written; older checkpoints are whole.
            DivergedError: the steps, the weights or a validation are no longer finite. Checkpoints
                from before are kept, and a resume with a lower `learning_rate` goes on from them.
        """
        config, first = self.recipe.train, self.step
        begin, minutes_before = time.monotonic(), self.minutes
        path, mel = self.folder.path, self.recipe.mel
        with (
            writing(path),
            self.folder.lock() if is_main() else nullcontext(),
            MetricsLog(path, first, mel) if is_main() else nullcontext() as log,
        ):
            stopped = self._misses_validation() and not self._validate(log, report_clip, stop)
            if first == 0:
                self.before = self.best
            save = due = False
            pace_from = first, begin
            while not stopped and self.step < config.steps and not self._out_of_patience():
                if self._phase(self.step)[1] == self.step:  # steps of a phase take their own time
                    pace_from = self.step, time.monotonic()
                if self.step == self.first_steps > 0:
                    # Likelihood falls while draws are learnt: what came before does not compete.
                    self.best = self.best_name = None
                values = self._train_step()
                self.step += 1
                now = time.monotonic()
                elapsed = max(now - begin, 1e-9) / 60  # clocks can be coarse
                self.minutes = minutes_before + elapsed
                pace = max(now - pace_from[1], 1e-9) / 60 / (self.step - pace_from[0])
                report(self._progress(values, pace, max_minutes - elapsed))
                if log is not None and self.step % LOG_EVERY == 0:
                    log.add("train", self.step, self.minutes, values | self._pace())
                late, stopped = in_any(elapsed >= max_minutes, stop())
                last = late or self.step == config.steps
                self._check_skipped(ends=last or stopped)
                save = save or last or stopped or self.step % config.checkpoint_every == 0
                if self.step >= self.part_steps:
                    due = due or last or self.step % config.validate_every == 0
                if self.skipped_in_row and not (last or stopped):
                    continue  # nothing is saved until a step shows that the weights are good
                # Before the validation, which may take minutes.
                if save or due:
                    self._save()
                if due and not stopped:
                    stopped = not self._validate(log, report_clip, stop)
                save = due = False
                if last:
                    break
        if stopped:
            logger.info("asked to stop: saved at step %d", self.step)
        if self._out_of_patience():
            logger.info(
                "stopped at step %d: since %s no validation %s was above %.4f",
                self.step,
                self.best_name,
                self.flow.measure,
                self.best,
            )

    def _train_step(self) -> dict[str, float]:
        """Makes one optimizer step and returns its terms. Skips and counts a non-finite step."""
        config = self.recipe.train
        phase, _ = self._phase(self.step)
        rate = self._rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * rate
        values = self._gradients(phase)
        norm = torch.nn.utils.clip_grad_norm_(self.flow.parameters(), config.clip_norm)
        values["gradient_norm"] = norm.item()
        if all(math.isfinite(value) for value in values.values()):
            self.optimizer.step()
            update_average(self.average, self.flow, self.decay, self.step)
            self.skipped_in_row = 0
        else:
            self.skipped += 1
            self.skipped_in_row += 1
            logger.warning("step %d skipped: loss or gradient is not finite", self.step)
        return values

    def _rate(self, step: int) -> float:
        """The learning rate of a step."""
        config = self.recipe.train
        phase, begin = self._phase(step)
        if phase.whole:
            begin = self.part_steps
            steps_left, cooldown = float(config.steps - step), float(config.cooldown_steps)
        else:
            # What it trains is frozen afterwards, so it ends at zero.
            steps_left, cooldown = begin + phase.steps - step, phase.steps / 2
        return learning_rate(config, step - begin, steps_left, cooldown)

    def _phase(self, step: int) -> tuple[Phase, int]:
        """The phase of a step, and the step at which it begins."""
        begin = 0
        for phase in self.phases[:-1]:
            if step < begin + phase.steps:
                return phase, begin
            begin += int(phase.steps)
        return self.phases[-1], begin

    @property
    def first_steps(self) -> int:
        """Number of steps in the phases before the last one."""
        return sum(int(phase.steps) for phase in self.phases[:-1])

    @property
    def part_steps(self) -> int:
        """Number of steps in the phases that train only a part of the flow; they come first."""
        return sum(int(phase.steps) for phase in self.phases if not phase.whole)

    def _gradients(self, phase: Phase) -> dict[str, float]:
        """Leaves the gradients of a phase's loss of the whole batch; returns the loss's terms."""
        batch = self._batch()
        parts = batch.split(self.recipe.train.accumulate)
        self.flow.train()
        if len(parts) > 1 and self._waits_for_data():
            # Layers that start from their first batch see all of it, not its first part.
            self._seed_noise()
            with torch.no_grad():
                phase.loss(batch)
        self.optimizer.zero_grad()
        values: dict[str, float] = {}
        for part in parts:
            # Each draws the random numbers of the whole batch, and takes its own.
            self._seed_noise()
            loss = phase.loss(part)
            if loss.value.requires_grad:  # not where `rates` has frozen all that it reaches
                (loss.value * part.share.weight).backward()
            for name, term in loss.terms.items():
                values[name] = values.get(name, 0.0) + term.item() * part.share.weight
        sum_gradients(self.flow.parameters())
        sums = all_sum(torch.tensor([*values.values()], dtype=torch.float64))
        return dict(zip(values, sums.tolist(), strict=True))

    def _batch(self) -> Batch:
        """This process's items of the step, on the device."""
        segments = self.batches.get(self.step).to(self.device)
        return Batch(*segments.cut(self.spectrogram), self.share, self.step, all_sum)

    def _waits_for_data(self) -> bool:
        """Whether a layer (ActNorm) has yet to start from its first batch."""
        return not all(getattr(module, "initialized", True) for module in self.flow.modules())

    def _seed_noise(self) -> None:
        torch.manual_seed(self.recipe.train.seed * 1_000_003 + self.step)

    def _misses_validation(self) -> bool:
        """Whether the weights in hand are due for a validation and have had none.

        These are weights to start from, and those of a run that ended within a validation.
        """
        config = self.recipe.train
        due = self.step % config.validate_every == 0 or self.step == config.steps
        source = self.provenance
        is_new = source.steps == self.step and source.log_likelihood is None
        return self._has_weights and due and is_new and self.step >= self.part_steps

    def _validate(
        self,
        log: MetricsLog | None,
        report: Callable[[int, int], None],
        stop: Callable[[], bool],
    ) -> bool:
        """Validates the averaged weights and saves; returns False if it was asked to stop before.

        Raises:
            DivergedError: the likelihood is not finite.
        """
        averaged = build_flow(self.recipe.model, self.recipe.mel).to(self.device)
        averaged.load_state_dict(self.average)
        try:
            result = validate(
                averaged.eval(),
                self.cache,
                self.spectrogram,
                self.device,
                report,
                stop,
                self.phases[-1].score,
            )
        except ValidationStopped:
            return False
        if not math.isfinite(result.log_likelihood):
            self._end_diverged(f"the validation {result.measure} is not finite", self.step)
        if log is not None:
            log.add_validation(self.step, self.minutes, result)
        logger.info(
            "step %d, %.1f minutes: validation %s %.4f%s, own draws %.4f",
            self.step,
            self.minutes,
            result.measure,
            result.log_likelihood,
            "" if result.interval is None else f" ± {result.interval:.4f}",
            result.draw_log_likelihood,
        )
        self.provenance = self.provenance.model_copy(
            update={
                "steps": self.step,
                "minutes": round(self.minutes, 2),
                "log_likelihood": result.log_likelihood,
                "draw_log_likelihood": result.draw_log_likelihood,
            }
        )
        best = -math.inf if self.best is None else self.best
        # A model that cannot draw is of no use, however likely it finds speech.
        if result.log_likelihood > best and math.isfinite(result.draw_log_likelihood):
            self.best, self.best_name = result.log_likelihood, checkpoint_name(self.step)
        self._save()
        return True

    def _check_skipped(self, ends: bool) -> None:
        """Raises DivergedError after too many skipped steps, or if a run would end with some.

        One may be chance. Later ones show that the weights are bad, or soon will.
        """
        n_skipped = self.skipped_in_row
        if n_skipped >= MOST_SKIPPED or (ends and n_skipped > 1):
            # The checkpoint of the weights that gave no finite step, if it is there.
            begin = self.step - n_skipped
            self._end_diverged(f"the last {n_skipped} steps were skipped", begin)

    def _end_diverged(self, reason: str, bad_step: int) -> NoReturn:
        """Raises DivergedError, after the checkpoint of `bad_step` was removed."""
        left = on_main(lambda: self.folder.drop(checkpoint_name(bad_step), self.best_name))
        remedy = "start anew: it saved no checkpoint that is good"
        if left is not None:
            remedy = f"go on from {self.folder.path / left} with --resume"
        raise DivergedError(
            f"this training has diverged at step {self.step}: {reason}. Lower its learning_rate, "
            f"{self.recipe.train.learning_rate:g}, in the recipe, and {remedy}"
        )

    def _out_of_patience(self) -> bool:
        """Whether the last `patience` validations of the last phase have brought nothing better."""
        config = self.recipe.train
        if not config.patience or self.best_name is None or self.step <= self.first_steps:
            return False
        best_step = int(self.best_name.removeprefix("step-"))
        since = self.step // config.validate_every - best_step // config.validate_every
        return since >= config.patience

    def _save(self) -> None:
        """Saves a checkpoint.

        Raises:
            CheckpointError: it cannot be written.
            DivergedError: weights or moments are not finite.
        """
        phase, _ = self._phase(max(self.step - 1, 0))
        update: dict[str, Any] = {"phase": "" if phase.whole else phase.name}
        if self.provenance.steps != self.step:
            # The figures are those of other weights.
            update |= {"log_likelihood": None, "draw_log_likelihood": None}
            update |= {"steps": self.step, "minutes": round(self.minutes, 2)}
        self.provenance = self.provenance.model_copy(update=update)
        saved = self._saved()
        for name, tensor in [*saved.averaged.items(), *saved.training.items()]:
            if not tensor.isfinite().all():
                self._end_diverged(f"{name.removeprefix('raw.')} is not finite", self.step)
        on_main(lambda: self.folder.save(saved))

    def _saved(self) -> Saved:
        state = self.folder.state(
            step=self.step,
            minutes=self.minutes,
            skipped=self.skipped,
            pitch_steps=self.first_steps,
            best=self.best,
            best_name=self.best_name,
        )
        training = training_tensors(self.flow, self.optimizer)
        return Saved(state, self.provenance, self.average, training)

    def _resume(self) -> bool:
        """Takes up the run in the folder; returns whether there was one."""
        if not on_main(self.folder.has_checkpoints):
            logger.warning("%s holds no checkpoint yet: the run starts at step 0", self.folder.path)
            return False
        name, state = on_main(lambda: self.folder.load_newest(self._load))
        if not is_main():
            self._load(self.folder.read(name))
        self.best, self.best_name = state.best, state.best_name
        return True

    def _load(self, saved: Saved) -> None:
        """Takes up a checkpoint. Changes nothing but weights if it does not fit."""
        source = self.folder.path / saved.state.name
        load_weights(self.flow, saved.averaged, source)
        average = {name: t.detach().clone() for name, t in self.flow.state_dict().items()}
        load_training_tensors(self.flow, self.optimizer, saved.training, source)
        self.average = average
        self.step, self.minutes = saved.state.step, saved.state.minutes
        self.skipped, self.provenance = saved.state.skipped, saved.provenance
        if not saved.state.pitch_steps:
            self.phases = self.phases[-1:]

    def _sampler(self) -> SegmentSampler:
        config = self.recipe.train
        return SegmentSampler(
            self.cache,
            config.segment_frames,
            config.batch_size,
            self.recipe.mel,
            config.seed,
            config.gain_range,
            slice(self.share.start, self.share.stop),
        )

    def _pace(self) -> dict[str, float]:
        """What the log says of a step beside its terms."""
        return {
            "learning_rate": self._rate(self.step - 1),
            "waiting_share": self.batches.waiting_share(),
            "skipped": self.skipped,
        }

    def _progress(self, values: dict[str, float], pace: float, to_minutes: float) -> Progress:
        """The report after a step; steps take `pace` minutes, and `to_minutes` are left."""
        config, mel = self.recipe.train, self.recipe.mel
        seconds = config.batch_size * config.segment_frames * mel.hop_length / mel.sample_rate
        phase, begin = self._phase(self.step - 1)
        is_first = phase is not self.phases[-1]
        phase_step = self.step - begin if is_first else self.step
        phase_steps = int(min(phase.steps, config.steps - begin)) if is_first else config.steps
        to_steps = pace * (phase_steps - phase_step)
        return Progress(
            step=self.step,
            values=values,
            audio_seconds_per_second=seconds / (pace * 60),
            minutes_left=min(to_steps, to_minutes),
            limit="steps" if to_steps <= to_minutes else "minutes",
            phase=phase.name if is_first else "",
            phase_step=phase_step,
            phase_steps=phase_steps,
        )
