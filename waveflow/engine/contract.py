"""The type of a decoder, and a loop over the items of a batch."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from waveflow.flow import State, select_items


class Decoder(Protocol):
    """Noise z (B, C, L) and mel (B, M, F) to audio (B, F hop): the flow's inverse.

    `lengths` (B,) are the frames of each item of a padded batch, `state` that of the
    conditioner, `sigma` the temperature of the noise (`Flow.decode`).
    """

    def __call__(
        self,
        z: Tensor,
        mel: Tensor,
        lengths: Tensor | None = None,
        state: State = None,
        sigma: float = 1.0,
    ) -> Tensor: ...


def each_item(
    decode: Callable[[Tensor, Tensor, State], Tensor],
    hop_length: int,
    z: Tensor,
    mel: Tensor,
    lengths: Tensor | None,
    state: State,
) -> Tensor:
    """A batch item by item, each at its own length, zeros beyond: audio (B, F hop).

    For decoders that gain nothing from a batch. Without padding they need no masks.

    Args:
        decode: z (1, C, l), mel (1, M, f) and the item's state to audio (1, f hop).
        hop_length: audio samples for each frame.
        z, mel, lengths, state: a decoder's arguments.
    """
    audio = torch.zeros(len(z), mel.shape[2] * hop_length, dtype=torch.float32)
    frames = [mel.shape[2]] * len(mel) if lengths is None else lengths.tolist()
    for i, n_frames in enumerate(frames):
        item = slice(i, i + 1)
        made = decode(
            z[item, :, : z.shape[2] * n_frames // mel.shape[2]],
            mel[item, :, :n_frames],
            select_items(state, item),
        )
        audio[i, : made.shape[1]] = made[0]
    return audio
