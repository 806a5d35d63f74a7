"""Checks a vocoder's inputs, once, and turns them into tensors on its device."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from waveflow.errors import AudioError, MelMismatchError


def checked_mel(
    mel: Tensor | np.ndarray, n_mels: int, device: torch.device, lengths: Tensor | None = None
) -> tuple[Tensor, bool]:
    """(B, M, F) float32 on the device, padding zeroed; and whether the batch axis was added.

    Raises:
        MelMismatchError: wrong number of bands, shape, or values that are not finite.
    """
    batch = _as_tensor(mel, device)
    squeezed = batch.dim() == 2
    batch = batch[None] if squeezed else batch
    if batch.dim() != 3:
        raise MelMismatchError(
            f"a mel is ({n_mels}, F) or (B, {n_mels}, F), not {tuple(batch.shape)}"
        )
    if batch.shape[1] != n_mels:
        hint = "; transpose it" if batch.shape[2] == n_mels else ""
        raise MelMismatchError(
            f"this mel has {batch.shape[1]} bands, the model takes {n_mels}{hint}"
        )
    if not batch.numel():
        raise MelMismatchError(f"this mel is empty: {tuple(batch.shape)}")
    if lengths is not None:
        positions = torch.arange(batch.shape[2], device=device)
        batch = batch.masked_fill((positions >= lengths[:, None])[:, None], 0.0)
    if not torch.isfinite(batch).all():
        raise MelMismatchError("this mel holds NaN or infinite values")
    return batch, squeezed


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


def checked_audio(audio: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """(T,) or (B, T) float32 on the device.

    Raises:
        AudioError: another shape, empty, or samples that are not finite.
    """
    samples = _as_tensor(audio, device)
    if samples.dim() not in (1, 2) or not samples.numel():
        raise AudioError(f"audio is (T,) or (B, T) and not empty, not {tuple(samples.shape)}")
    if not torch.isfinite(samples).all():
        raise AudioError("this audio holds NaN or infinite samples")
    return samples


def _as_tensor(values: Tensor | np.ndarray, device: torch.device) -> Tensor:
    if isinstance(values, np.ndarray):
        # A copy: torch takes no reversed, byte-swapped or read-only arrays.
        with np.errstate(over="ignore"):  # values that overflow are refused as infinite
            values = torch.from_numpy(np.array(values, np.float32, order="C"))
    return torch.as_tensor(values, dtype=torch.float32, device=device).detach()
