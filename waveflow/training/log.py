"""The log of a run: metrics.csv, TensorBoard, Weights & Biases."""

import csv
import logging
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from waveflow.audio.mel import MelConfig, MelSpectrogram
from waveflow.data.cache import file_sha256
from waveflow.door import check_plain
from waveflow.errors import ConfigError
from waveflow.model_files import LIKELIHOODS, LOG_LIKELIHOOD
from waveflow.training.run_folder import RECIPE, RUN_RECORD
from waveflow.training.validation import Validation

logger = logging.getLogger(__name__)

# Environment variable: a project of Weights & Biases. Its own variables (WANDB_MODE, ...) hold too.
WANDB_SWITCH = "WAVEFLOW_WANDB"


class Board(Protocol):
    """Takes curves, sounds and pictures."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def audio(self, step: int, name: str, audio: Tensor, sample_rate: int) -> None: ...

    def picture(self, step: int, name: str, image: Tensor) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Writes metrics.csv; also to TensorBoard if installed, and to Weights & Biases on demand.

    A resumed run repeats the steps after its last checkpoint. metrics.csv then has their rows
    twice, with equal values on a CPU.

    Args:
        out: the run's folder.
        step: the step at which the run is.
        mel: settings of the pictures.

    Raises:
        ConfigError: Weights & Biases is asked for and not installed.
    """

    def __init__(self, out: Path, step: int, mel: MelConfig) -> None:
        self.path = out / "metrics.csv"
        self.folder = out
        self.step = step
        self.spectrogram = MelSpectrogram(mel)
        self.boards: list[Board] = []
        self.has_speech = False  # the speech is the same each time

    def __enter__(self) -> "MetricsLog":
        tensorboard = _tensorboard(self.folder, self.step)
        if tensorboard is None:
            logger.info("tensorboard is not installed: metrics go to %s alone", self.path)
        else:
            self.boards.append(tensorboard)
        if project := os.environ.get(WANDB_SWITCH):
            self.boards.append(_WandbBoard(self.folder, project))
        if os.path.lexists(self.path):
            check_plain(self.path, self.folder)
        self.file = open(self.path, "a", newline="")
        self.writer = csv.writer(self.file)
        if not self.file.tell():
            self.writer.writerow(["kind", "step", "minutes", "name", "value"])
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.close()
        for board in self.boards:
            board.close()

    def add(self, kind: str, step: int, minutes: float, values: dict[str, float]) -> None:
        """Appends rows of kind, step, minutes, name, value."""
        for name, value in values.items():
            self.writer.writerow([kind, step, f"{minutes:.3f}", name, f"{value:.6g}"])
        self.file.flush()
        for board in self.boards:
            board.scalars(step, {f"{kind}/{name}": value for name, value in values.items()})

    def add_validation(self, step: int, minutes: float, result: Validation) -> None:
        """Appends rows of its figures; gives its example to the boards."""
        of_draws = result.measure if result.measure in LIKELIHOODS else LOG_LIKELIHOOD
        values = {_key(result.measure): result.log_likelihood}
        if result.interval is not None:
            values["interval"] = result.interval
        values[f"draw_{_key(of_draws)}"] = result.draw_log_likelihood
        self.add("validation", step, minutes, values)
        if result.latent is not None:
            self.add("z", step, minutes, result.latent._asdict())
        self.add("log_det", step, minutes, result.log_dets)
        if not self.has_speech:
            self._add_sound(step, "speech", result.speech)
            self.has_speech = True
        self._add_sound(step, "draw", result.example)

    def _add_sound(self, step: int, name: str, audio: Tensor) -> None:
        for board in self.boards:
            board.audio(step, name, audio.clamp(-1, 1), self.spectrogram.config.sample_rate)
            board.picture(step, name, mel_picture(self.spectrogram(audio)))


def mel_picture(mel: Tensor) -> Tensor:
    """A log-mel (M, F) as a grey image (1, 2 M, F) uint8: low bands at the bottom, loud is white.

    The scale is fixed, from silence (1e-5, black) to amplitude 1, so that pictures can be compared.
    """
    grey = ((mel + 11.5) / 13.5).clamp(0, 1) * 255
    return grey.round().to(torch.uint8).flip(0).repeat_interleave(2, 0)[None].cpu()


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def audio(self, step: int, name: str, audio: Tensor, sample_rate: int) -> None:
        self.writer.add_audio(name, audio[None], step, sample_rate)

    def picture(self, step: int, name: str, image: Tensor) -> None:
        self.writer.add_image(f"{name}_mel", image, step)

    def close(self) -> None:
        self.writer.close()


def _tensorboard(out: Path, step: int) -> Board | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # Drops the curves of steps that a killed run made after its last checkpoint.
    return _TensorBoard(SummaryWriter(str(out), purge_step=step + 1))


class _WandbBoard:
    """One run of a project; a resumed training continues it."""

    def __init__(self, out: Path, project: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"{WANDB_SWITCH}={project} reports to Weights & Biases, which is not installed: "
                "pip install waveflow[wandb], or unset it"
            ) from error
        self.wandb = wandb
        record = out / RUN_RECORD
        self.run = wandb.init(
            project=project,
            name=out.resolve().name,
            id=file_sha256(record)[:16] if record.is_file() else None,
            resume="allow",
            dir=str(out),
            config={"recipe": (out / RECIPE).read_text(encoding="utf-8")},
        )
        # Its own count of steps cannot go back; ours does when a killed run resumes.
        self.run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def audio(self, step: int, name: str, audio: Tensor, sample_rate: int) -> None:
        sound = self.wandb.Audio(audio.numpy(), sample_rate=sample_rate)
        self.run.log({"step": step, name: sound})

    def picture(self, step: int, name: str, image: Tensor) -> None:
        self.run.log({"step": step, f"{name}_mel": self.wandb.Image(image[0].numpy())})

    def close(self) -> None:
        self.run.finish()


def _key(measure: str) -> str:
    """The name of a measure in metrics.csv."""
    return measure.replace("-", "_").replace(" ", "_")
