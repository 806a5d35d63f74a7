"""Checks a vocoder's inputs, once, and turns them into tensors on its device."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from waveflow.audio.samples import MOST_PEAK, audio_tensor, check_range, check_shape
from waveflow.errors import MelMismatchError

# A frame of one value is silence at the floor of some convention, or padding. Frames of natural
# logarithms are silence below -8 and go down to -23.03, a floor of 1e-10.
_LOUDEST_SILENCE = -8.0
_LEAST_LOGARITHM = -24.0
# Of fewer bands equal values are no wonder.
_FEWEST_BANDS = 8


def checked_mel(
    mel: Tensor | np.ndarray,
    n_mels: int,
    device: torch.device,
    lengths: Tensor | None = None,
    whose: str = "the model takes",
) -> tuple[Tensor, bool]:
    """(B, M, F) float32 on the device, padding zeroed; and whether the batch axis was added.

    Args:
        whose: what wants `n_mels` bands, with a verb.

    Raises:
        MelMismatchError: wrong number of bands, shape, or values that are no real numbers or not
            finite.
    """
    batch = mel_tensor(mel, device)
    squeezed = batch.dim() == 2
    batch = batch[None] if squeezed else batch
    if batch.dim() != 3:
        raise MelMismatchError(
            f"a mel is ({n_mels}, F) or (B, {n_mels}, F), not {tuple(batch.shape)}"
        )
    if batch.shape[1] != n_mels:
        turned = "; transpose it, or change --time-major (time_major)"
        hint = turned if batch.shape[2] == n_mels else ""
        raise MelMismatchError(f"this mel has {batch.shape[1]} bands, {whose} {n_mels}{hint}")
    if not batch.numel():
        raise MelMismatchError(f"this mel is empty: {tuple(batch.shape)}")
    if lengths is not None:
        positions = torch.arange(batch.shape[2], device=device)
        batch = batch.masked_fill((positions >= lengths[:, None])[:, None], 0.0)
    if not torch.isfinite(batch).all():
        raise MelMismatchError("this mel holds NaN or infinite values")
    return batch, squeezed


def band_major(mel: Tensor, n_mels: int, time_major: bool | Literal["auto"]) -> Tensor:
    """A mel whose bands are the last axis but one.

    Raises:
        MelMismatchError: "auto", and both axes may be the bands.
    """
    if mel.dim() not in (2, 3) or time_major is False:
        return mel
    rows, columns = mel.shape[-2:]
    if time_major == "auto":
        if rows == columns == n_mels:
            raise MelMismatchError(
                f"a mel of {rows} x {columns} does not tell its axes: give --time-major yes or no "
                "(time_major=True or False)"
            )
        time_major = columns == n_mels
    return mel.transpose(-1, -2) if time_major else mel


def checked_lengths(
    mel: Tensor | np.ndarray, lengths: Tensor | np.ndarray | Sequence[int], device: torch.device
) -> Tensor:
    """(B,) int64 on the device, frames of each item of mel (B, M, F).

    Raises:
        MelMismatchError: no integers, not one for each item, or out of range.
    """
    frames = torch.as_tensor(lengths, device=device)
    if mel.ndim != 3 or frames.shape != mel.shape[:1] or frames.is_floating_point():
        raise MelMismatchError(
            f"lengths are integers (B,) for a batch (B, M, F), not {frames.dtype} "
            f"{tuple(frames.shape)} for a mel {tuple(mel.shape)}"
        )
    if not ((frames >= 1) & (frames <= mel.shape[2])).all():
        raise MelMismatchError(
            f"lengths {frames.tolist()} are out of range: this mel has {mel.shape[2]} frames"
        )
    return frames.long()


def checked_audio(audio: Any, device: torch.device, most_peak: float = MOST_PEAK) -> Tensor:
    """(T,) or (B, T) float32 on the device; integers are scaled by their type's range.

    Raises:
        AudioError: another shape, empty, no real numbers, samples that are not finite or beyond
            `most_peak`.
    """
    samples = audio_tensor(audio).detach().to(device, torch.float32)
    check_shape(samples.shape)
    low, high = samples.aminmax()
    check_range(float(low), float(high), most_peak)
    return samples


def silence_padding(
    mel: Tensor, floor: float, lengths: Tensor | None = None, after_speech: bool = False
) -> tuple[Tensor, int]:
    """A mel (B, M, F) with silence in the place of padding, and the number of such frames.

    Padding is a frame with one value in all bands, which is no silence: 0.0 would be loud noise.
    A mel that has no other frames, or no logarithms, is left as it is.

    Args:
        floor: the value of silence.
        lengths: (B,), frames of each item; what lies beyond is not looked at.
        after_speech: the mel goes on from a piece with other frames.
    """
    low, high = mel.aminmax(dim=1)
    padding = (low == high) & ((high > _LOUDEST_SILENCE) | (high < _LEAST_LOGARITHM))
    if mel.shape[1] < _FEWEST_BANDS or not padding.any():
        return mel, 0
    inside = torch.ones_like(padding)
    if lengths is not None:
        inside = torch.arange(mel.shape[2], device=mel.device) < lengths[:, None]
    padding &= inside
    others = low[inside & ~padding]
    if not (after_speech if others.numel() == 0 else bool((others < 0).any())):
        return mel, 0
    return mel.masked_fill(padding[:, None], floor), int(padding.sum())


def padding_notes(n_padding: int, n_frames: int) -> list[str]:
    """A note on the frames that `silence_padding` has changed."""
    if not n_padding:
        return []
    return [
        f"{n_padding} of {n_frames} frames hold one value in all bands: they were taken for "
        "padding and made silent"
    ]


def mel_tensor(mel: Any, device: torch.device) -> Tensor:
    """float32 on the device, of anything that holds real numbers."""
    try:
        if isinstance(mel, Tensor):
            values = mel.detach().to_dense()
            if values.is_complex() or values.dtype == torch.bool:
                raise TypeError(f"it is of {values.dtype}")
            return values.to(device, torch.float32)
        array = np.asarray(mel)
        if array.dtype.kind not in "fiu":
            raise TypeError(f"it is of {array.dtype}, {type(mel).__name__}")
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise MelMismatchError(f"a mel is an array of real numbers: {reason}") from error
    with np.errstate(over="ignore"):  # values that overflow are refused as infinite
        # A copy: torch takes no reversed, byte-swapped or read-only arrays.
        return torch.from_numpy(np.array(array, np.float32, order="C")).to(device)
