"""What a run writes down of itself."""

import csv
import logging
from pathlib import Path

from torch import Tensor

logger = logging.getLogger(__name__)


class MetricsLog:
    """metrics.csv of a run always, and TensorBoard where it is installed.

    Args:
        out: the run's folder.
        step: that the run is at. A resumed run repeats the steps after its last checkpoint, and
            metrics.csv has their rows twice, the same on a CPU.
    """

    def __init__(self, out: Path, step: int) -> None:
        self.path = out / "metrics.csv"
        self.folder = out
        self.step = step

    def __enter__(self) -> "MetricsLog":
        self.file = open(self.path, "a", newline="")
        self.writer = csv.writer(self.file)
        if not self.file.tell():
            self.writer.writerow(["kind", "step", "minutes", "name", "value"])
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            logger.info("tensorboard is not installed: metrics go to %s alone", self.path)
            self.board = None
        else:
            # Curves of steps that a killed run had made after its last checkpoint are dropped.
            self.board = SummaryWriter(str(self.folder), purge_step=self.step)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()

    def add(self, kind: str, step: int, minutes: float, values: dict[str, float]) -> None:
        """Appends rows of kind, step, minutes, name, value."""
        for name, value in values.items():
            self.writer.writerow([kind, step, f"{minutes:.3f}", name, f"{value:.6g}"])
            if self.board is not None:
                self.board.add_scalar(f"{kind}/{name}", value, step)
        self.file.flush()

    def add_audio(self, step: int, audio: Tensor, sample_rate: int) -> None:
        """A draw (T,) for TensorBoard."""
        if self.board is not None:
            self.board.add_audio("draw", audio[None].clamp(-1, 1), step, sample_rate)
