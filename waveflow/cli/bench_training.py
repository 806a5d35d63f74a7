"""`waveflow bench --training`: memory and time of a training step, activations kept or rebuilt."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from waveflow.cli.bench_report import PAGE_WIDTH
from waveflow.cli.console import counting
from waveflow.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from waveflow.bench.training_cost import TrainingCost
    from waveflow.models.waveglow import WaveGlowConfig

DEFAULT_SIZE = "waveglow-64"
# WaveGlow is trained on segments of 16,000 samples (section 3); whole frames of 256 of them.
SEGMENT_FRAMES = 63
SAMPLE_RATE = 22050


def bench_training(
    models: Sequence[str],
    device: str,
    batch: int,
    seconds: Sequence[float],
    runs: int,
    json_file: Path | None,
) -> None:
    """Measures a WaveGlow's training step and prints the table."""
    import torch
    from rich.console import Console

    from waveflow.bench.training_cost import training_cost
    from waveflow.files import atomic_path

    config = _size(models)
    n_frames = SEGMENT_FRAMES
    if seconds:
        n_frames = math.ceil(max(seconds) * SAMPLE_RATE / config.hop_length)
    with counting("rounds") as progress:
        result = training_cost(config, batch, n_frames, torch.device(device), runs, progress)
    if json_file is not None:
        with atomic_path(json_file) as temporary:
            temporary.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else PAGE_WIDTH, highlight=False)
    console.print(_table(result))
    console.print(
        f"gradient, rebuilt against kept: relative error {result.gradient_error:.1g}; the input "
        f"rebuilt worst is off by {result.drift:.1g} of its root mean square (flow step "
        f"{result.drift_step})",
        soft_wrap=True,
    )


def _size(models: Sequence[str]) -> "WaveGlowConfig":
    from waveflow.bench.subjects import UNTRAINED

    sizes = [name for name in UNTRAINED if name.startswith("waveglow-")]
    if len(models) > 1 or any(name not in sizes for name in models):
        raise ConfigError(
            f"--training measures one untrained size, {' or '.join(sizes)}, not {' '.join(models)}"
        )
    return UNTRAINED[models[0] if models else DEFAULT_SIZE]


def _table(result: "TrainingCost") -> "Table":
    from rich.table import Table

    from waveflow.bench.training_cost import FEW_FLOWS

    machine = result.machine
    table = Table(
        "",
        title=f"training step of WaveGlow, {result.hidden_channels} channels, {result.batch} x "
        f"{result.n_samples} samples; {machine.processor}, {machine.device}, "
        f"threads {machine.threads}",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for column in ("peak MB", f"to {FEW_FLOWS} flows", "s", "to kept"):
        table.add_column(column, justify="right")
    for step in result.steps:
        few = result.cost(FEW_FLOWS, step.reversible)
        table.add_row(
            f"{step.n_flows} flows, activations {'rebuilt' if step.reversible else 'kept'}",
            f"{step.peak_bytes / 1e6:.1f}",
            f"{step.peak_bytes / few.peak_bytes:.2f}",
            f"{step.seconds:.3f}",
            f"{step.ratio:.2f}",
        )
    return table
