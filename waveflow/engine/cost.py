"""What a model costs: parameters, multiply-adds, and measured speed."""

import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from waveflow.engine.vocoder import Vocoder, VocoderWarning

# Long enough that what is done once for each call hardly counts.
COUNTED_SECONDS = 4.0
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
    """Multiply-adds of the flow for one second of audio, noise to audio.

    Matrix products and convolutions are counted, as torch's counter sees them; Fourier
    transforms (lapped transforms, refinement) and elementwise operations are not.
    """
    n_frames = max(1, round(COUNTED_SECONDS * vocoder.sample_rate / vocoder.hop_length))
    mel = _plain_mel(vocoder, n_frames)
    noise = vocoder.flow.noise(n_frames, [0]).to(vocoder.device)
    with FlopCounterMode(display=False) as counter:
        vocoder.flow.decode(noise, mel[None])
    seconds = n_frames * vocoder.hop_length / vocoder.sample_rate
    # The counter takes a multiply-add for two operations.
    return counter.get_total_flops() / 2 / seconds


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
    mel = _plain_mel(vocoder, n_frames) if example is None else _tiled(example, n_frames)
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


def _tiled(mel: Tensor, n_frames: int) -> Tensor:
    return mel.repeat(1, -(-n_frames // mel.shape[1]))[:, :n_frames]


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
