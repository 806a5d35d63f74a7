"""Flow: a bijection, the condition that steers it, and a standard normal at its end."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from waveflow.bijections.base import Bijection, Condition
from waveflow.bijections.reversible import Reversible
from waveflow.distributions import draw_noise, standard_normal_log_prob


class Conditioner(nn.Module):
    """What makes a condition of a mel: `conditioner(mel (B, M, F), mask (B, 1, F) or None, start)`.

    A conditioner with a harmonic source has a memory, the source's running phase. In a window
    that is cut out of an utterance the F0 of the first frames is not yet what it is in the
    utterance, so `start` (B,), float64, is the phase in cycles where frame `anchor` begins.

    Attributes:
        context: frames to the left and to the right that a frame of the condition depends on,
            the running phase aside.
        anchor: see above; 0 without a source.
    """

    context = (0, 0)
    anchor = 0

    def forward(
        self, mel: Tensor, mask: Tensor | None = None, start: Tensor | None = None
    ) -> Condition:
        raise NotImplementedError

    def cycles(self, mel: Tensor, mask: Tensor | None = None) -> Tensor:
        """By how many cycles (B, F), float64, the phase advances in each frame of a mel."""
        return torch.zeros(len(mel), mel.shape[2], dtype=torch.float64, device=mel.device)


class Flow(nn.Module):
    """The exact density of audio given its mel (change of variables, Dinh et al. 2015):

        log p(x | mel) = log N(z; 0, 1) + log|det dz/dx|,    z = bijection(x, conditioner(mel))

    All likelihoods are in nats per audio sample, of audio at amplitude [-1, 1], natural
    logarithm, higher is better. The base is a standard normal; a mel-informed normal is a
    first step of the bijection (`Coupling` with `AllActive`), which is the same density.

    Args:
        bijection: its first step squeezes audio (B, 1, T) to (B, channels, T / channels).
        conditioner: makes the condition, at the resolution after the squeeze, F hop_length /
            channels positions.
        channels: C of the squeezed signal and of z.
        hop_length: audio samples for each mel frame, a multiple of `channels`.

    Attributes:
        reversible: whether training rebuilds activations instead of keeping them; no part of
            the model, off at first.
    """

    def __init__(
        self, bijection: Bijection, conditioner: Conditioner, channels: int, hop_length: int
    ) -> None:
        super().__init__()
        self.bijection = bijection
        self.conditioner = conditioner
        self.channels = channels
        self.hop_length = hop_length
        self.reversible = False

    @property
    def transform(self) -> Bijection:
        """The bijection, as training runs it (`reversible`)."""
        return Reversible(self.bijection) if self.reversible else self.bijection

    @property
    def context(self) -> tuple[int, int]:
        """Frames to the left and to the right whose mel and noise a frame of audio depends on."""
        positions = reach(self.bijection)
        frames = -(-positions * self.channels // self.hop_length)
        left, right = self.conditioner.context
        return frames + left, frames + right

    def condition(
        self, mel: Tensor, lengths: Tensor | None = None, start: Tensor | None = None
    ) -> Condition:
        """What the mel (B, M, F) says.

        `lengths` (B,) are the frames of each padded item, `start` (B,) the running phase of a
        window out of an utterance (`Conditioner`).
        """
        return self.conditioner(mel, _frame_mask(mel, lengths), start)

    def cycles(self, mel: Tensor, lengths: Tensor | None = None) -> Tensor:
        """By how many cycles (B, F), float64, the phase of the source advances in each frame."""
        return self.conditioner.cycles(mel, _frame_mask(mel, lengths))

    def forward(self, audio: Tensor, mel: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The log-likelihood (B,) of audio (B, T) under mel (B, M, F), nats per sample.

        T is a multiple of `channels` and at most F hop_length; `lengths` (B,) in frames.
        """
        cond = self.condition(mel, lengths).crop(audio.shape[1] // self.channels)
        return self.log_prob(audio, cond)[0]

    def log_prob(self, audio: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """Log-likelihood (B,) and z (B, C, L) of audio (B, T) under a condition."""
        z, log_det = self.transform(audio[:, None], cond)
        log_prob = standard_normal_log_prob(z, cond.mask) + log_det
        n_samples: Tensor | int = audio.shape[1]
        if cond.mask is not None:
            n_samples = cond.mask.sum((1, 2)) * self.channels
        return log_prob / n_samples, z

    def encode(self, audio: Tensor, mel: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Audio (B, T) to noise (B, C, L)."""
        cond = self.condition(mel, lengths).crop(audio.shape[1] // self.channels)
        return _masked(self.bijection(audio[:, None], cond)[0], cond)

    def decode(
        self,
        z: Tensor,
        mel: Tensor,
        lengths: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Noise (B, C, L) to audio (B, C L), the exact inverse of `encode`.

        `lengths` (B,) in frames; `start` (B,) as in `condition`.
        """
        cond = self.condition(mel, lengths, start).crop(z.shape[2])
        x, _ = self.bijection.inverse(_masked(z, cond), cond)
        audio = x[:, 0]
        if cond.mask is not None:
            audio = audio * cond.mask[:, 0].repeat_interleave(self.channels, 1)
        return audio

    def noise(self, n_frames: int, seeds: Sequence[int], first_frame: int = 0) -> Tensor:
        """z ~ N(0, 1) of an utterance from a frame on, (B, C, L).

        The same for an item wherever, and in whatever pieces, it is drawn.
        """
        samples = draw_noise(n_frames, self.hop_length, seeds, first_frame)
        return samples.reshape(len(seeds), -1, self.channels).transpose(1, 2)

    def prepare_for_inference(self) -> "Flow":
        """Computes once what synthesis repeats; undone by `train()` and by loading weights."""
        self.eval()
        for module in self.bijection.modules():
            prepare = getattr(module, "prepare_for_inference", None)
            if prepare is not None:
                prepare()
        return self


def reach(module: nn.Module) -> int:
    """Positions on each side that a position of the result depends on.

    The sum of the layers' own, as if each saw all that the one before has changed. In all our
    networks they act one after another.
    """
    return sum(getattr(layer, "reach", 0) for layer in module.modules())


def _frame_mask(mel: Tensor, lengths: Tensor | None) -> Tensor | None:
    """(B, 1, F), 1 in the frames of each item of a padded batch."""
    if lengths is None:
        return None
    frames = torch.arange(mel.shape[2], device=mel.device)
    return (frames < lengths[:, None])[:, None].to(mel.dtype)


def _masked(z: Tensor, cond: Condition) -> Tensor:
    return z if cond.mask is None else z * cond.mask.to(z.dtype)
