"""Mels of about one length, spoken as one batch: each gets what it gets alone, sooner."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import cast

import numpy as np

from waveflow.audio.mel_names import NATIVE
from waveflow.engine.options import Speech, SynthesisOptions
from waveflow.engine.vocoder import Vocoder

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
) -> list[Speech | Exception]:
    """Speech of each mel (M, F), or the error that says what is wrong with it.

    Mels in the model's own convention are spoken as one batch. Others are spoken one by one, since
    a convention is told, or converted, for a mel by itself.

    Args:
        mels: of about one length.
        options: of each; they differ in their seeds only.
    """
    found: list[Speech | Exception | None] = [None] * len(mels)
    shared, bands = options[0], vocoder.mel_config.n_mels
    is_own = shared.convention in (None, NATIVE) and shared.time_major is False
    if is_own and len(mels) > 1 and all(mel.ndim == 2 and len(mel) == bands for mel in mels):
        # Whatever goes wrong, such as memory that is too small, each is tried alone.
        with suppress(Exception):
            found = list(_batch(vocoder, mels, options))
    for i, speech in enumerate(found):
        if speech is None:
            try:
                found[i] = vocoder.synthesise(mels[i], options[i])
            except Exception as error:
                found[i] = error
    return cast(list[Speech | Exception], found)


def _batch(
    vocoder: Vocoder, mels: Sequence[np.ndarray], options: Sequence[SynthesisOptions]
) -> Iterator[Speech | None]:
    """Speech of each, or None where there may be something to note about it."""
    lengths = [mel.shape[1] for mel in mels]
    padded = np.zeros((len(mels), mels[0].shape[0], max(lengths)), np.float32)
    for row, mel in zip(padded, mels, strict=True):
        row[:, : mel.shape[1]] = mel
    seeds = {"seed": [own.seed for own in options]}
    made = vocoder.synthesise(padded, options[0].changed(seeds), lengths)
    for audio, mel in zip(made.audio, mels, strict=True):
        audio = audio[: mel.shape[1] * vocoder.hop_length]
        # Clipped samples, and frames of one value, which are padding.
        notable = bool(audio.abs().max() >= 1) or bool((mel == mel[:1]).all(0).any())
        yield None if made.notes and notable else Speech(audio, None, [])
