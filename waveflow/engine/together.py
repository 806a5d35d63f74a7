"""Mels of about one length, spoken as one batch: each gets what it gets alone, sooner."""

from collections.abc import Iterator, Sequence

import numpy as np

from waveflow.engine.options import Speech, SynthesisOptions
from waveflow.engine.vocoder import Vocoder
from waveflow.errors import WaveflowError

# On a CPU eight mels of half a second to one are decoded together in half the time of one after
# another; of two seconds nothing is gained, and of four they take longer (benchmarks/together.py).
MOST_ON_CPU, FRAMES_ON_CPU = 8, 100
# On a GPU a batch has so many frames, three minutes, that its memory stays within a few gigabytes.
FRAMES_ON_GPU = 2**14
# Of the longest mel over the shortest: the rest is padding, and wasted.
MOST_UNEVEN = 1.25


def batches(n_frames: Sequence[int], device: str) -> Iterator[list[int]]:
    """Which mels are spoken together, by their numbers; the shortest come first.

    Args:
        n_frames: of each mel.
        device: type of the vocoder's device, such as "cpu".
    """
    on_cpu = device == "cpu"
    batch: list[int] = []
    for i in sorted(range(len(n_frames)), key=n_frames.__getitem__):
        if batch:
            n = n_frames[i]
            uneven = n > MOST_UNEVEN * n_frames[batch[0]]
            full = len(batch) == MOST_ON_CPU or n > FRAMES_ON_CPU
            if not on_cpu:
                full = n * (len(batch) + 1) > FRAMES_ON_GPU
            if uneven or full:
                yield batch
                batch = []
        batch.append(i)
    if batch:
        yield batch


def speak_together(
    vocoder: Vocoder, mels: Sequence[np.ndarray], options: Sequence[SynthesisOptions]
) -> list[Speech | WaveflowError]:
    """Speech of each mel (M, F), or the error that says what is wrong with it.

    Args:
        mels: of about one length.
        options: of each; they differ in their seeds only.
    """
    if len(mels) > 1 and len({mel.shape[:-1] for mel in mels}) == 1:
        lengths = [mel.shape[1] for mel in mels]
        batch = np.zeros((len(mels), mels[0].shape[0], max(lengths)), np.float32)
        for row, mel in zip(batch, mels, strict=True):
            row[:, : mel.shape[1]] = mel
        seeds = {"seed": [one.seed for one in options]}
        try:
            speech = vocoder.synthesise(batch, options[0].changed(seeds), lengths)
        except WaveflowError:
            speech = None  # of one of them
        # Notes are about all of them: alone, each gets its own.
        if speech is not None and not speech.notes:
            ends = [n * vocoder.hop_length for n in lengths]
            return [
                Speech(audio[:end], None, []) for audio, end in zip(speech.audio, ends, strict=True)
            ]
    return [_alone(vocoder, mel, one) for mel, one in zip(mels, options, strict=True)]


def _alone(vocoder: Vocoder, mel: np.ndarray, options: SynthesisOptions) -> Speech | WaveflowError:
    try:
        return vocoder.synthesise(mel, options)
    except WaveflowError as error:
        return error
