"""The cost of a model: its parameters, its multiply-adds, and its speed on this machine."""

import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations
from torch.utils.flop_counter import FlopCounterMode

from waveflow.engine.vocoder import Vocoder

# Two lengths, in frames. Their difference does not count the work that a call does only once. They
# are short because some flows decode sample by sample.
COUNTED_FRAMES = (2, 4)
# A mid level of speech in natural logarithms, for models that come without an example.
PLAIN_LEVEL = -5.0

Name = TypeVar("Name", bound=Hashable)


class Speed(NamedTuple):
    """Speed of the copy-synthesis of a clip: mel, draw and refinement, without loading the model.

    Attributes:
        times_real_time: seconds of audio for each second of the clock, median of the runs.
        first_call_seconds: the vocoder's first call in this process, mel to the whole clip.
        clip_seconds: length of the clip.
        threads: CPU threads.
        runs: number of runs.
    """

    times_real_time: float
    first_call_seconds: float
    clip_seconds: float
    threads: int
    runs: int


class Ratio(NamedTuple):
    """Quartiles and median of a ratio over rounds."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def count_parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def macs_per_second(vocoder: Vocoder) -> float:
    """Multiply-adds of the flow for one more second of audio, noise to audio.

    Matrix products and convolutions count, as torch's counter sees them. Fourier transforms
    (lapped transforms, refinement) and elementwise operations do not.
    """

    def decode(mel: Tensor) -> Tensor:
        noise = vocoder.flow.noise(mel.shape[2], [0]).to(mel.device)
        return vocoder.flow.decode(noise, mel)

    mel = clip_mel(vocoder, max(COUNTED_FRAMES))
    return macs_per_frame(decode, mel[None]) * vocoder.sample_rate / vocoder.hop_length


@torch.no_grad()
def macs_per_frame(synthesis: Callable[[Tensor], Tensor], mel: Tensor) -> float:
    """Multiply-adds of one more frame of a mel (1, M, F); counted as in `macs_per_second`."""
    operations = []
    for n_frames in COUNTED_FRAMES:
        with FlopCounterMode(display=False) as counter:
            synthesis(mel[..., :n_frames])
        operations.append(counter.get_total_flops())
    # The counter takes a multiply-add for two operations.
    return (operations[1] - operations[0]) / 2 / (COUNTED_FRAMES[1] - COUNTED_FRAMES[0])


def clip_mel(vocoder: Vocoder, n_frames: int) -> Tensor:
    """A mel (M, n_frames): the model's example repeated to the length, or a constant."""
    mel = vocoder.example_mel()
    if mel is None:
        mel = torch.full((vocoder.mel_config.n_mels, 1), PLAIN_LEVEL)
    repeats = -(-n_frames // mel.shape[1])
    return mel.repeat(1, repeats)[:, :n_frames].to(vocoder.device)


def measure_speed(
    vocoder: Vocoder,
    clip_seconds: float = 10.0,
    threads: int = 1,
    runs: int = 5,
) -> Speed:
    """Times the copy-synthesis of a clip at the model's own settings.

    The vocoder makes the clip itself, so no recording is needed. That first call is the
    warm-up, and is timed too.

    Args:
        vocoder: freshly loaded, if `first_call_seconds` is to mean anything.
        clip_seconds: length of the clip.
        threads: CPU threads during the measurement.
        runs: timed copies.
    """
    n_frames = max(1, round(clip_seconds * vocoder.sample_rate / vocoder.hop_length))
    mel = clip_mel(vocoder, n_frames)

    def speak(mel: Tensor) -> Tensor:
        # Copied back, or an accelerator would still be at work when the clock is read.
        return vocoder.synthesise(mel).audio.cpu()

    with _threads(threads):
        begin = time.perf_counter()
        audio = speak(mel)
        first = time.perf_counter() - begin
        times = []
        for _ in range(runs):
            begin = time.perf_counter()
            speak(vocoder.mel_to_copy(audio))
            times.append(time.perf_counter() - begin)
    seconds = len(audio) / vocoder.sample_rate
    return Speed(seconds / statistics.median(times), first, seconds, threads, runs)


def plain_path(vocoder: Vocoder) -> Vocoder:
    """The model without an engine: `Flow.decode` in eager float32.

    Weight norm is folded and 1x1 convolutions are inverted once, as anybody would do. Every
    other path is compared with it. The flow of the vocoder given is changed.
    """
    for layer in list(vocoder.flow.modules()):
        if is_parametrized(layer, "weight"):
            remove_parametrizations(layer, "weight")
        for name in ("inverted", "log_abs_det"):
            if hasattr(layer, name):
                value = getattr(layer, name)().detach()
                setattr(layer, name, lambda value=value: value)
    return Vocoder(vocoder.config, vocoder.flow, lambda flow: flow.decode, vocoder.folder)


def timed(work: Callable[[], object], device: str = "cpu") -> Callable[[], float]:
    """Does the work and returns its seconds.

    On one CPU thread these are CPU time, which does not grow while the process waits for its
    core; else they are of the wall clock. On an accelerator, work must wait for its result.
    """
    on_one_thread = torch.device(device).type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if on_one_thread else time.perf_counter

    def run() -> float:
        begin = clock()
        work()
        return clock() - begin

    return run


def take_turns(
    works: Mapping[Name, Callable[[], float]],
    runs: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Name, list[float]]:
    """Times several pieces of work in rounds, in reversed order every second round.

    Compare them within a round (`speed_ratio`): a disturbance of the machine then hits all of
    them.

    Args:
        works: by name; each returns its seconds (`timed`).
        runs: number of rounds, after one to warm up.
        progress: called with (calls done, calls in all).

    Returns:
        Seconds of each work in each round.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in works}
    total = len(works) * (1 + runs)
    for n_round in range(1 + runs):
        names = list(works) if n_round % 2 == 0 else list(works)[::-1]
        for n_done, name in enumerate(names, start=1):
            seconds[name].append(works[name]())
            progress(n_round * len(works) + n_done, total)
    return {name: times[1:] for name, times in seconds.items()}


def speed_ratio(reference: Sequence[float], seconds: Sequence[float]) -> Ratio:
    """How many times as fast as a reference that took turns with it, over the rounds."""
    low, median, high = np.percentile(np.divide(reference, seconds), (25, 50, 75))
    return Ratio(float(low), float(median), float(high))


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
