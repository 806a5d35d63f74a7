"""What a training step costs with activations kept and with activations rebuilt."""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.profiler import ProfilerActivity

from waveflow.bench.calibration import Machine, describe_machine, timed
from waveflow.bench.subjects import untrained_waveglow
from waveflow.bijections.reversible import Drift, record_drift
from waveflow.engine.cost import PLAIN_LEVEL
from waveflow.models.waveglow import WaveGlowConfig

FEW_FLOWS, MANY_FLOWS = 2, 12


class StepCost(BaseModel):
    """A training step of WaveGlow: likelihood, its gradient, AdamW.

    Attributes:
        n_flows: steps of flow.
        reversible: whether activations are rebuilt.
        peak_bytes: the highest that torch's allocations rise during the step, above weights,
            gradients and moments, which are there before.
        seconds: median over the rounds; of the process's CPU time on a CPU with one thread.
        ratio: of `seconds` to the ordinary step of as many flows, median over the rounds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_flows: int
    reversible: bool
    peak_bytes: int
    seconds: float
    ratio: float


class TrainingCost(BaseModel):
    """All steps that were measured.

    Attributes:
        machine: on which.
        hidden_channels: of the couplings' networks.
        batch, n_samples: items and their audio samples.
        steps: ordinary and reversible, of few flows and of many.
        gradient_error: of the reversible step of many flows, norm of the difference to the
            ordinary gradient over its norm.
        drift: root mean square by which the worst rebuilt input of that is off, over its own.
        drift_step: where: the step's number and name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    machine: Machine
    hidden_channels: int
    batch: int
    n_samples: int
    steps: tuple[StepCost, ...]
    gradient_error: float
    drift: float
    drift_step: str

    def cost(self, n_flows: int, reversible: bool) -> StepCost:
        """The figures of one step."""
        return next(s for s in self.steps if (s.n_flows, s.reversible) == (n_flows, reversible))


class TrainingStep:
    """A training step of an untrained WaveGlow on noise at the level of speech."""

    def __init__(
        self, config: WaveGlowConfig, batch: int, n_frames: int, device: torch.device
    ) -> None:
        self.flow = untrained_waveglow(config)[1].train().to(device)
        # Slow: at a usual rate random weights run away, and the figures with them.
        self.optimizer = torch.optim.AdamW(self.flow.parameters(), lr=1e-6)
        generator = torch.Generator().manual_seed(0)
        audio = 0.1 * torch.randn(batch, n_frames * config.hop_length, generator=generator)
        mel = torch.randn(batch, config.n_mels, n_frames, generator=generator) + PLAIN_LEVEL
        self.audio, self.mel = audio.to(device), mel.to(device)

    def gradient(self, reversible: bool) -> list[Tensor]:
        """Of every parameter; they are left in place, for the next step to begin with."""
        self.flow.reversible = reversible
        self.optimizer.zero_grad(set_to_none=False)
        (-self.flow(self.audio, self.mel).mean()).backward()
        return [p.grad for p in self.flow.parameters() if p.grad is not None]

    def exactness(self) -> tuple[float, Drift]:
        """Relative error of the reversible gradient, and the largest drift."""
        ordinary = torch.cat([grad.flatten() for grad in self.gradient(False)])
        with record_drift() as drifts:
            rebuilt = torch.cat([grad.flatten() for grad in self.gradient(True)])
        norm = torch.linalg.vector_norm
        error = (norm(rebuilt - ordinary) / norm(ordinary)).item()
        return error, max(drifts, key=lambda drift: drift.relative)

    def __call__(self, reversible: bool) -> None:
        """One step, finished on an accelerator too."""
        self.gradient(reversible)
        self.optimizer.step()
        next(self.flow.parameters())[0].sum().item()


def training_cost(
    config: WaveGlowConfig,
    batch: int,
    n_frames: int,
    device: torch.device,
    runs: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TrainingCost:
    """Measures WaveGlow of few flows and of many, each step ordinary and reversible.

    The two steps of one model take turns, in reversed order every second round.

    Args:
        config: sizes of the model; its number of flows is not taken.
        batch: items of a step.
        n_frames: mel frames of an item.
        device: where.
        runs: timed rounds, after a warm-up.
        progress: called with rounds done and in all.
    """
    on_cpu = device.type == "cpu" and torch.get_num_threads() == 1
    steps: list[StepCost] = []
    done = 0
    for n_flows in (FEW_FLOWS, MANY_FLOWS):
        step = TrainingStep(config.model_copy(update={"n_flows": n_flows}), batch, n_frames, device)
        # Before the weights move; it is the last model's that is reported.
        error, worst = step.exactness()
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for reversible in seconds:
            step(reversible)
        peaks = {
            reversible: peak_bytes(partial(step, reversible), device) for reversible in seconds
        }
        for i in range(runs):
            for reversible in reversed(seconds) if i % 2 else seconds:
                time = timed(partial(step, reversible))
                seconds[reversible].append(time.cpu if on_cpu else time.wall)
            done += 1
            progress(done, 2 * runs)
        for reversible, times in seconds.items():
            ratios = [a / b for a, b in zip(times, seconds[False], strict=True)]
            steps.append(
                StepCost(
                    n_flows=n_flows,
                    reversible=reversible,
                    peak_bytes=peaks[reversible],
                    seconds=statistics.median(times),
                    ratio=statistics.median(ratios),
                )
            )
    return TrainingCost(
        machine=describe_machine(device),
        hidden_channels=config.hidden_channels,
        batch=batch,
        n_samples=step.audio.shape[1],
        steps=tuple(steps),
        gradient_error=error,
        drift=worst.relative,
        drift_step=f"{worst.step}, {worst.name}",
    )


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The highest that torch's allocations on the device rise while `work` runs.

    On a CPU the profiler reports every allocation and release; an accelerator counts itself.
    What libraries below torch take as scratch space is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    level = peak = 0
    for change in _allocations(profiler):
        level += change
        peak = max(peak, level)
    return peak


def _allocations(profiler: torch.profiler.profile) -> Iterator[int]:
    """Bytes of each allocation, negative for a release, in the order of time."""
    # `profiler.events()` has added them up by operator.
    results: Any = profiler.profiler and profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        yield event.nbytes()
