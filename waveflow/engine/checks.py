"""Checks mels, once, and turns them into float32 arrays. Nothing here imports torch."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from waveflow.errors import MelMismatchError

if TYPE_CHECKING:
    from torch import Tensor

    Lengths = Tensor | np.ndarray | Sequence[int]

Floats = NDArray[np.float32]

# A frame of one value is silence at the floor of some convention, or padding. Frames of natural
# logarithms are silence below -8 and go down to -23.03, a floor of 1e-10.
_LOUDEST_SILENCE = -8.0
_LEAST_LOGARITHM = -24.0
# Of fewer bands equal values are no wonder.
_FEWEST_BANDS = 8


def checked_mel(
    mel: Any,
    n_mels: int,
    lengths: NDArray[np.int64] | None = None,
    whose: str = "the model takes",
) -> tuple[Floats, bool]:
    """(B, M, F), padding zeroed; and whether the batch axis was added.

    Args:
        whose: what wants `n_mels` bands, with a verb.

    Raises:
        MelMismatchError: wrong number of bands, shape, or values that are no real numbers or not
            finite.
    """
    batch = mel_array(mel)
    squeezed = batch.ndim == 2
    batch = batch[None] if squeezed else batch
    if batch.ndim != 3:
        raise MelMismatchError(f"a mel is ({n_mels}, F) or (B, {n_mels}, F), not {batch.shape}")
    if batch.shape[1] != n_mels:
        turned = "; transpose it, or change --time-major (time_major)"
        hint = turned if batch.shape[2] == n_mels else ""
        raise MelMismatchError(f"this mel has {batch.shape[1]} bands, {whose} {n_mels}{hint}")
    if not batch.size:
        raise MelMismatchError(f"this mel is empty: {batch.shape}")
    if lengths is not None:
        batch = np.where((np.arange(batch.shape[2]) >= lengths[:, None])[:, None], 0, batch)
    if not np.isfinite(batch).all():
        raise MelMismatchError("this mel holds NaN or infinite values")
    return batch, squeezed


def band_major(mel: Floats, n_mels: int, time_major: bool | Literal["auto"]) -> Floats:
    """A mel whose bands are the last axis but one.

    Raises:
        MelMismatchError: "auto", and both axes may be the bands.
    """
    if mel.ndim not in (2, 3) or time_major is False:
        return mel
    rows, columns = mel.shape[-2:]
    if time_major == "auto":
        if rows == columns == n_mels:
            raise MelMismatchError(
                f"a mel of {rows} x {columns} does not tell its axes: give --time-major yes or no "
                "(time_major=True or False)"
            )
        time_major = columns == n_mels
    return mel.swapaxes(-1, -2) if time_major else mel


def checked_lengths(mel: Floats, lengths: "Lengths") -> NDArray[np.int64]:
    """(B,), frames of each item of mel (B, M, F).

    Raises:
        MelMismatchError: no integers, not one for each item, or out of range.
    """
    frames = as_array(lengths)
    if mel.ndim != 3 or frames.shape != mel.shape[:1] or frames.dtype.kind not in "iu":
        raise MelMismatchError(
            f"lengths are integers (B,) for a batch (B, M, F), not {frames.dtype} "
            f"{frames.shape} for a mel {mel.shape}"
        )
    if not ((frames >= 1) & (frames <= mel.shape[2])).all():
        raise MelMismatchError(
            f"lengths {frames.tolist()} are out of range: this mel has {mel.shape[2]} frames"
        )
    return frames.astype(np.int64)


def silence_padding(
    mel: Floats,
    floor: float,
    lengths: NDArray[np.int64] | None = None,
    after_speech: bool = False,
) -> tuple[Floats, int]:
    """A mel (B, M, F) with silence in the place of padding, and the number of such frames.

    Padding is a frame with one value in all bands, which is no silence: 0.0 would be loud noise.
    A mel that has no other frames, or no logarithms, is left as it is.

    Args:
        floor: the value of silence.
        lengths: (B,), frames of each item; what lies beyond is not looked at.
        after_speech: the mel goes on from a piece with other frames.
    """
    low, high = mel.min(1), mel.max(1)
    padding = (low == high) & ((high > _LOUDEST_SILENCE) | (high < _LEAST_LOGARITHM))
    if mel.shape[1] < _FEWEST_BANDS or not padding.any():
        return mel, 0
    inside = np.ones_like(padding)
    if lengths is not None:
        inside = np.arange(mel.shape[2]) < lengths[:, None]
    padding &= inside
    others = low[inside & ~padding]
    if not (after_speech if others.size == 0 else bool((others < 0).any())):
        return mel, 0
    return np.where(padding[:, None], np.float32(floor), mel), int(padding.sum())


def padding_notes(n_padding: int, n_frames: int) -> list[str]:
    """A note on the frames that `silence_padding` has changed."""
    if not n_padding:
        return []
    return [
        f"{n_padding} of {n_frames} frames hold one value in all bands: they were taken for "
        "padding and made silent"
    ]


def clipping_notes(n_clipped: int, n_samples: int) -> list[str]:
    """A note on the samples that were beyond [-1, 1]."""
    if not n_clipped:
        return []
    return [f"{100 * n_clipped / n_samples:.2g} % of the samples were clipped to [-1, 1]"]


def mel_array(mel: Any) -> Floats:
    """float32 of anything that holds real numbers, tensors on any device too."""
    try:
        array = as_array(mel)
        if array.dtype.kind not in "fiu":
            raise TypeError(f"it is of {array.dtype}, {type(mel).__name__}")
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise MelMismatchError(f"a mel is an array of real numbers: {reason}") from error
    with np.errstate(over="ignore"):  # values that overflow are refused as infinite
        # A copy where torch could not take it: reversed, byte-swapped or read-only arrays.
        return np.require(array, np.float32, ["C", "ALIGNED", "WRITEABLE"])


def as_array(values: Any) -> NDArray[Any]:
    """An array of a tensor, sparse and on a GPU as it may be, or of anything numpy takes."""
    torch = sys.modules.get("torch")  # who has a tensor has loaded it
    if torch is None or not isinstance(values, torch.Tensor):
        return np.asarray(values)
    dense = values.detach().to_dense().cpu()
    return (dense.float() if dense.dtype == torch.bfloat16 else dense).numpy()
