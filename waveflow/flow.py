"""Flow: a bijection, the condition that steers it, and a standard normal at its end."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from waveflow.bijections.base import Bijection, Condition
from waveflow.distributions import draw_noise, standard_normal_log_prob


class Flow(nn.Module):
    """The exact density of audio given its mel (change of variables, Dinh et al. 2015):

        log p(x | mel) = log N(z; 0, 1) + log|det dz/dx|,    z = bijection(x, conditioner(mel))

    All likelihoods are in nats per audio sample, of audio at amplitude [-1, 1], natural
    logarithm, higher is better. The base is a standard normal; a mel-informed normal is a
    first step of the bijection (`Coupling` with `AllActive`), which is the same density.

    Args:
        bijection: its first step squeezes audio (B, 1, T) to (B, channels, T / channels).
        conditioner: `conditioner(mel (B, M, F), mask (B, 1, F) or None) -> Condition` at the
            resolution after the squeeze, F hop_length / channels positions.
        channels: C of the squeezed signal and of z.
        hop_length: audio samples for each mel frame, a multiple of `channels`.
    """

    def __init__(
        self, bijection: Bijection, conditioner: nn.Module, channels: int, hop_length: int
    ) -> None:
        super().__init__()
        self.bijection = bijection
        self.conditioner = conditioner
        self.channels = channels
        self.hop_length = hop_length

    def condition(self, mel: Tensor, lengths: Tensor | None = None) -> Condition:
        """What the mel (B, M, F) says; `lengths` (B,) are the frames of each padded item."""
        mask = None
        if lengths is not None:
            frames = torch.arange(mel.shape[2], device=mel.device)
            mask = (frames < lengths[:, None])[:, None].to(mel.dtype)
        return self.conditioner(mel, mask)

    def forward(self, audio: Tensor, mel: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The log-likelihood (B,) of audio (B, T) under mel (B, M, F), nats per sample.

        T is a multiple of `channels` and at most F hop_length; `lengths` (B,) in frames.
        """
        cond = self.condition(mel, lengths).crop(audio.shape[1] // self.channels)
        return self.log_prob(audio, cond)[0]

    def log_prob(self, audio: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """Log-likelihood (B,) and z (B, C, L) of audio (B, T) under a condition."""
        z, log_det = self.bijection(audio[:, None], cond)
        log_prob = standard_normal_log_prob(z, cond.mask) + log_det
        n_samples: Tensor | int = audio.shape[1]
        if cond.mask is not None:
            n_samples = cond.mask.sum((1, 2)) * self.channels
        return log_prob / n_samples, z

    def encode(self, audio: Tensor, mel: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Audio (B, T) to noise (B, C, L)."""
        cond = self.condition(mel, lengths).crop(audio.shape[1] // self.channels)
        return _masked(self.bijection(audio[:, None], cond)[0], cond)

    def decode(self, z: Tensor, mel: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Noise (B, C, L) to audio (B, C L), the exact inverse of `encode`."""
        cond = self.condition(mel, lengths).crop(z.shape[2])
        x, _ = self.bijection.inverse(_masked(z, cond), cond)
        audio = x[:, 0]
        if cond.mask is not None:
            audio = audio * cond.mask[:, 0].repeat_interleave(self.channels, 1)
        return audio

    def noise(self, n_frames: int, seeds: Sequence[int]) -> Tensor:
        """z ~ N(0, 1) of an utterance, (B, C, L), the same for an item wherever it is drawn."""
        samples = draw_noise(n_frames, self.hop_length, seeds)
        return samples.reshape(len(seeds), -1, self.channels).transpose(1, 2)

    def prepare_for_inference(self) -> "Flow":
        """Computes once what synthesis repeats; undone by `train()` and by loading weights."""
        self.eval()
        for module in self.bijection.modules():
            prepare = getattr(module, "prepare_for_inference", None)
            if prepare is not None:
                prepare()
        return self


def _masked(z: Tensor, cond: Condition) -> Tensor:
    return z if cond.mask is None else z * cond.mask.to(z.dtype)
