"""Memory and time of a training step, activations kept or recomputed in the backward pass.

    python benchmarks/training.py waveglow-64

Each size is measured with 2 and with 12 flows. A step is the likelihood, its gradient and AdamW.
"peak" is the highest that torch's allocations rise during it, above weights, gradients and moments.
The last column is how far the recomputed gradient differs, relative to its norm.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

import lab
from sizes import SIZES, untrained
from waveflow.audio.mel import MelSpectrogram
from waveflow.cli.console import show_table
from waveflow.engine.cost import speed_ratio, take_turns, timed
from waveflow.errors import ConfigError

FEW, MANY = 2, 12
# WaveGlow is trained on segments of 16,000 samples (section 3); whole frames of 256 of them.
SEGMENT_SECONDS = 16128 / 22050
COLUMNS = ("model", "activations", "flows", "peak MB", "x 2 flows", "s", "x kept", "gradient")


class TrainingStep:
    """A training step of random weights on noise at the level of speech, and on its mel."""

    def __init__(self, config: Any, batch: int, seconds: float, device: str) -> None:
        made, flow = untrained(config)
        self.flow: Any = flow.train().to(device)
        # Slow: at a usual rate random weights run away.
        self.optimizer = torch.optim.AdamW(self.flow.parameters(), lr=1e-6, fused=True)
        n_frames = math.ceil(seconds * made.mel.sample_rate / made.mel.hop_length)
        generator = torch.Generator().manual_seed(0)
        audio = 0.1 * torch.randn(batch, n_frames * made.mel.hop_length, generator=generator)
        self.audio, self.mel = audio.to(device), MelSpectrogram(made.mel)(audio).to(device)

    def backward(self, recompute: bool) -> None:
        """Gradients of all parameters, in place: the next step begins with them."""
        self.flow.recompute = recompute
        self.optimizer.zero_grad(set_to_none=False)
        torch.manual_seed(0)  # some conditioners draw random numbers
        (-self.flow(self.audio, self.mel).mean()).backward()

    def gradient(self, recompute: bool) -> Tensor:
        """A copy of all gradients in a row."""
        self.backward(recompute)
        grads = (p.grad for p in self.flow.parameters() if p.grad is not None)
        return torch.cat([grad.flatten() for grad in grads])

    def __call__(self, recompute: bool) -> None:
        self.backward(recompute)
        self.optimizer.step()
        next(self.flow.parameters()).sum().item()  # waits for an accelerator


def peak_bytes(work: Callable[[], object], device: str | torch.device) -> int:
    """The highest that torch's allocations on the device rise while `work` runs.

    On a CPU the profiler reports every allocation and release. Scratch space of libraries below
    torch does not show.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    # `profiler.events()` has added them up by operator.
    results: Any = profiler.profiler and profiler.profiler.kineto_results
    changes = [event for event in results.events() if event.name() == "[memory]"]
    level = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        level += change.nbytes()  # negative for a release
        peak = max(peak, level)
    return peak


def rows_of(name: str, batch: int, seconds: float, runs: int, device: str) -> list[Sequence[str]]:
    """The rows of the table for one size."""
    rows: list[Sequence[str]] = []
    few_peaks: dict[bool, int] = {}
    for n_flows in (FEW, MANY):
        config = SIZES[name].model_copy(update={"n_flows": n_flows})
        step = TrainingStep(config, batch, seconds, device)
        kept, recomputed = step.gradient(False), step.gradient(True)  # before the weights move
        error = f"{((recomputed - kept).norm() / kept.norm()).item():.1g}"
        works = {recompute: partial(step, recompute) for recompute in (False, True)}
        times = take_turns({key: timed(work, device) for key, work in works.items()}, runs)
        for recompute, work in works.items():
            peak = peak_bytes(work, device)
            few_peaks.setdefault(recompute, peak)
            rows.append(
                (
                    name,
                    "recomputed" if recompute else "kept",
                    str(n_flows),
                    f"{peak / 1e6:.1f}",
                    f"{peak / few_peaks[recompute]:.2f}",
                    f"{statistics.median(times[recompute]):.3f}",
                    f"{1 / speed_ratio(times[False], times[recompute]).median:.2f}",
                    error if recompute else "",
                )
            )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table of all sizes."""
    parser = lab.parser(__doc__, "runs", "threads", "device")
    parser.add_argument("--batch", type=int, default=1, help="items of a step")
    parser.add_argument("--seconds", type=float, default=SEGMENT_SECONDS, help="of an item")
    args = parser.parse_args(argv)
    if unknown := set(args.models) - SIZES.keys():
        raise ConfigError(f"not a size: {', '.join(unknown)}; give {', '.join(SIZES)}")
    torch.set_num_threads(args.threads)
    print(f"{lab.machine()}, {args.threads} CPU threads, {args.device}")
    rows: list[Sequence[str]] = [COLUMNS]
    for name in args.models:
        rows += rows_of(name, args.batch, args.seconds, args.runs, args.device)
    show_table(rows)


if __name__ == "__main__":
    lab.run(main)
