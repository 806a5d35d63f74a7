"""What a model costs: parameters, multiply-adds, and measured speed."""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from waveflow.engine.vocoder import Vocoder, VocoderWarning

# Two lengths, in frames: what the longer one costs more is free of what each call does once.
COUNTED_FRAMES = (8, 24)
# A mid level of speech in natural logarithms, for models that come without an example.
PLAIN_LEVEL = -5.0


class Speed(NamedTuple):
    """How fast a clip is resynthesised: mel, draw and refinement, without loading the model.

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


def count_parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def macs_per_second(vocoder: Vocoder) -> float:
    """Multiply-adds of the flow for one more second of audio, noise to audio.

    Matrix products and convolutions are counted, as torch's counter sees them; Fourier
    transforms (lapped transforms, refinement) and elementwise operations are not.
    """

    def decode(mel: Tensor) -> Tensor:
        noise = vocoder.flow.noise(mel.shape[2], [0]).to(mel.device)
        return vocoder.flow.decode(noise, mel)

    mel = _plain_mel(vocoder, max(COUNTED_FRAMES))
    return macs_per_frame(decode, mel[None]) * vocoder.sample_rate / vocoder.hop_length


@torch.no_grad()
def macs_per_frame(synthesis: Callable[[Tensor], Tensor], mel: Tensor) -> float:
    """Multiply-adds of one more frame of a mel (1, M, F); counted as in `macs_per_second`."""
    short, long = COUNTED_FRAMES
    # The counter takes a multiply-add for two operations.
    more = _operations(synthesis, mel[..., :long]) - _operations(synthesis, mel[..., :short])
    return more / 2 / (long - short)


def _operations(synthesis: Callable[[Tensor], Tensor], mel: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        synthesis(mel)
    return counter.get_total_flops()


def measure_speed(
    vocoder: Vocoder,
    example: Tensor | None = None,
    clip_seconds: float = 10.0,
    threads: int = 1,
    runs: int = 5,
) -> Speed:
    """Times `vocoder.resynth` of a clip at the model's own settings.

    The clip is made by the vocoder itself, so that no recording is needed; that first call is
    the warm-up and is timed too.

    Args:
        vocoder: freshly loaded, if `first_call_seconds` is to mean anything.
        example: a mel (n_mels, F), repeated to the clip's length; None for a constant one.
        clip_seconds: length of the clip.
        threads: CPU threads during the measurement.
        runs: timed calls of `resynth`.
    """
    n_frames = max(1, round(clip_seconds * vocoder.sample_rate / vocoder.hop_length))
    mel = _plain_mel(vocoder, n_frames) if example is None else tiled(example, n_frames)
    with _threads(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore", VocoderWarning)
        begin = time.perf_counter()
        audio = vocoder(mel).cpu()
        first = time.perf_counter() - begin
        times = []
        for _ in range(runs):
            begin = time.perf_counter()
            # Copied back, or an accelerator would still be at work when the clock is read.
            vocoder.resynth(audio).cpu()
            times.append(time.perf_counter() - begin)
    seconds = len(audio) / vocoder.sample_rate
    return Speed(seconds / statistics.median(times), first, seconds, threads, runs)


def _plain_mel(vocoder: Vocoder, n_frames: int) -> Tensor:
    shape = (vocoder.mel_config.n_mels, n_frames)
    return torch.full(shape, PLAIN_LEVEL, device=vocoder.device)


def tiled(mel: Tensor, n_frames: int) -> Tensor:
    """A mel (M, F) repeated to a number of frames."""
    return mel.repeat(1, -(-n_frames // mel.shape[1]))[:, :n_frames]


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
