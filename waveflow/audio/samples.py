"""What samples of audio may be, in one place for files (`io`) and arrays (`Vocoder`).

Integers are scaled by their range. What cannot be meant is refused. What can be mended is mended,
and a note says so.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from waveflow.errors import AudioError

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float32]

# Recordings in floats go a little beyond full scale. Nobody means a peak of 12 dB over it.
MOST_PEAK = 4.0
# The density is asked about draws too, and these have tails. Integers that were not scaled lie far
# beyond: this is -54 dB of 16 bits.
MOST_PEAK_OF_DRAW = 64.0
# So many items of so few samples are none: (samples, channels) was given for (items, samples).
MOST_CHANNELS = 8
MANY_ITEMS = 64
# Of five corpora (1,845 clips) four are below 0.0003 and one is at 0.0007 everywhere. Below this
# an offset adds rumble of less than 0.0015 to a copy and does not change the likelihood.
LEAST_OFFSET = 0.002
# What noise at 8 kHz (3.6 / sqrt(8000)) or a tone of 50 Hz, cut anywhere (0.009), leaves at most in
# the mean of a second, as a share of the RMS. Shorter blocks keep more.
_CHANCE_SHARE = 0.04
# Two running means follow an offset within 50 ms where it changes, and take less than 0.1 dB from
# the lowest tones of a voice.
_SLOW_SECONDS = 0.05
# A mean that has so much less energy than channels without correlation would leave.
_CANCELLED = 0.1
# -100 dB: rounding, not sound.
_NOTHING = 1e-10

# Bits and midpoint. There is no audio of 64 bits: such an array holds integers of another range.
_INTEGERS = {
    "uint8": (8, 2**7),
    "int8": (8, 0),
    "uint16": (16, 2**15),
    "int16": (16, 0),
    "uint32": (32, 2**31),
    "int32": (32, 0),
}


def as_floats(samples: Any) -> Floats:
    """Samples of any real type as float32, integers scaled to [-1, 1) by their type's range.

    Unsigned integers have their zero in the middle of the range.

    Raises:
        AudioError: no array of real numbers, or integers of 64 bits or of a range that their type
            does not tell.
    """
    try:
        array = np.asarray(samples)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, odd kinds of tensors
        raise AudioError(f"audio is an array of samples: {str(error).splitlines()[0]}") from error
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # values that overflow are refused as infinite
            # A copy: torch takes no reversed, byte-swapped or read-only arrays.
            return np.array(array, np.float32, order="C")
    kind = array.dtype.name
    if kind not in _INTEGERS:
        if array.dtype.kind in "iu":
            raise AudioError(
                f"audio of type {kind} does not tell its range: "
                "convert 16-bit samples with .astype('int16'), or give floats in [-1, 1]"
            )
        raise AudioError(
            f"audio is an array of real numbers in [-1, 1] or of integers, not of {kind} "
            f"({type(samples).__name__})"
        )
    bits, middle = _INTEGERS[kind]
    scaled = (array.astype(np.float64, order="C") - middle) / 2 ** (bits - 1)
    if bits == 32 and array.size and 2**10 <= np.abs(scaled).max() * 2**31 <= 2**15:
        raise AudioError(
            f"audio of type {kind} with a peak of 2^15 or less looks like 16-bit samples: "
            "convert it with .astype('int16')"
        )
    return scaled.astype(np.float32)


def audio_tensor(audio: Any) -> "Tensor":
    """`as_floats` as a tensor; one of floats keeps its type, its device and its gradient."""
    import torch

    if not isinstance(audio, torch.Tensor):
        return torch.from_numpy(as_floats(audio))
    dense = audio if audio.layout == torch.strided else audio.to_dense()
    if dense.is_floating_point():
        return dense
    return torch.from_numpy(as_floats(dense.detach().cpu())).to(dense.device)


def check_shape(shape: Sequence[int]) -> None:
    """Raises AudioError for samples that are neither (T,) nor (B, T)."""
    if len(shape) not in (1, 2) or 0 in shape:
        raise AudioError(f"audio is (T,) or (B, T) and not empty, not {tuple(shape)}")
    if len(shape) == 2 and shape[1] <= MOST_CHANNELS and shape[0] > MANY_ITEMS:
        raise AudioError(
            f"audio {tuple(shape)} looks like (samples, channels), and (T,) or (B, T) is expected: "
            "take one channel, audio[:, 0], or their mean, audio.mean(1)"
        )


def check_range(low: float, high: float, most: float = MOST_PEAK) -> None:
    """Raises AudioError for samples between `low` and `high` that are no audio."""
    peak = max(-low, high)
    if not np.isfinite((low, high)).all():
        raise AudioError("this audio holds NaN or infinite samples")
    if peak > most:
        raise AudioError(
            f"this audio has a peak of {peak:.5g}, and samples lie in [-1, 1]: "
            "divide 16-bit samples by 32768, or give them as integers"
        )


def mixed_down(channels: Floats) -> tuple[Floats, list[str]]:
    """One channel (T,) of channels (T, n), and what was done, in words.

    The mean of the channels; or the loudest one, where they cancel each other.
    """
    n_channels = channels.shape[1]
    if n_channels == 1:
        return channels[:, 0], []
    offsets = channels.mean(axis=0, dtype=np.float64)
    covariance = channels.T @ channels / len(channels) - np.outer(offsets, offsets)
    energy = covariance.diagonal()
    # The mean of all entries is the energy of the channels' mean.
    if energy.mean() > _NOTHING and n_channels * covariance.mean() < _CANCELLED * energy.mean():
        loudest = int(energy.argmax())
        note = f"{n_channels} channels in opposite phase: channel {loudest + 1} taken"
        return channels[:, loudest], [note]
    return channels.mean(axis=1), [f"{n_channels} channels mixed down to one"]


def offset_of(audio: Floats, sample_rate: int) -> float:
    """The DC offset of audio (T,), the RMS of its means over seconds; 0 where it is not clear."""
    size = min(len(audio), sample_rate)
    whole = audio[: len(audio) // size * size]
    blocks = whole.reshape(-1, size)
    offset = np.sqrt(np.square(blocks.mean(axis=1, dtype=np.float64)).mean())
    rms = np.sqrt(np.dot(whole, whole) / len(whole))
    least = max(LEAST_OFFSET, _CHANCE_SHARE * rms * sample_rate / size)
    return float(offset) if offset > least else 0.0


def without_offset(audio: Floats, sample_rate: int) -> tuple[Floats, list[str]]:
    """Audio (T,) without a clear DC offset, and what was done, in words.

    A slow mean is subtracted, because an offset may begin after digital silence, or drift. The
    mean of the whole would then put an offset into the silence.
    """
    offset = offset_of(audio, sample_rate)
    if not offset:
        return audio, []
    size = 2 * int(_SLOW_SECONDS / 2 * sample_rate) + 1
    slow = _running_mean(_running_mean(audio, size), size)
    return (audio - slow).astype(np.float32), [f"DC offset of {offset:.1g} removed"]


def _running_mean(values: NDArray[np.floating], size: int) -> NDArray[np.float64]:
    """The mean of `size` values, an odd number, around each of values (T,) that go on mirrored."""
    padded = np.pad(values, (size // 2 + 1, size // 2), "symmetric")
    total = np.cumsum(padded, dtype=np.float64)
    return (total[size:] - total[:-size]) / size
