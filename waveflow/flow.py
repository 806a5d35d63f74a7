"""Flow: a bijection, the condition that steers it, and a standard normal at its end."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from waveflow.bijections.base import Bijection, Condition, log_dets_by_position
from waveflow.context import Context, context_of
from waveflow.distributions import draw_noise, standard_normal_log_prob
from waveflow.errors import ConfigError
from waveflow.objective import Batch, Phase
from waveflow.padding import zero_padding

# Carried by a stream from a window to the next: None, a tensor with the batch first, or a tuple of
# them. Only who made it looks inside: a conditioner, or for a flow's state the flow.
State = Any


class Fitted(NamedTuple):
    """A condition under which given audio is likely.

    Attributes:
        cond: the condition.
        state: the state that made it.
        log_prob: (B, F), nats of each frame: the prior of what was chosen in the state for this
            audio; None where nothing was chosen.
    """

    cond: Condition
    state: State
    log_prob: Tensor | None


class Conditioner(nn.Module):
    """Makes the condition of a mel, F hop_length / channels positions of it.

    It declares its `context`, (left, right) frames of the mel around a frame of the condition.
    A conditioner whose result also depends on all frames before (a harmonic source has a running
    phase) keeps a state: streams cut a mel into windows and carry it from one to the next.
    """

    def forward(self, mel: Tensor, mask: Tensor | None = None, state: State = None) -> Condition:
        """The condition of mel (B, M, F), valid where mask (B, 1, F) is 1.

        `state` belongs to a window that does not begin with its utterance.
        """
        raise NotImplementedError

    def fitted(
        self, audio: Tensor, mel: Tensor, mask: Tensor | None = None, state: State = None
    ) -> Fitted:
        """The condition for the density of audio (B, F hop).

        A state that holds what the mel does not tell (where the pulses of a voice lie) may be
        chosen for the audio here. With its prior the density is a lower bound:
        log p(x) >= log p(x | state) + log p(state).
        """
        return Fitted(self(mel, mask, state), state, None)

    def carry(self, mel: Tensor, mask: Tensor | None, state: State, n_frames: int) -> State:
        """The state of a window that begins `n_frames` after this one, whose state is `state`.

        n_frames and the context on both sides lie within the mel, or the utterance begins or ends
        there.
        """
        return None

    def random_state(self, n_items: int, device: torch.device) -> State:
        """A state to train with, where a model should not learn the one of an utterance's start."""
        return None

    def tempered(
        self, z: Tensor, cond: Condition, sigma: float | Tensor
    ) -> tuple[Tensor, Condition]:
        """Noise z (B, C, L) and the condition for a draw at `sigma`; at 1 both as they are."""
        return sigma * z, cond


class Unconditional(Conditioner):
    """No features at all: the flow is a density of audio alone.

    Args:
        n_positions: of the condition for each frame.
    """

    context = Context()

    def __init__(self, n_positions: int) -> None:
        super().__init__()
        self.n_positions = n_positions

    def forward(self, mel: Tensor, mask: Tensor | None = None, state: State = None) -> Condition:
        if mask is not None:
            mask = mask.repeat_interleave(self.n_positions, 2)
        return Condition(mel.new_zeros(mel.shape[0], 0, mel.shape[2] * self.n_positions), mask)


class Flow(nn.Module):
    """The exact density of audio given its mel (change of variables, Dinh et al. 2015):

        log p(x | mel) = log N(z; 0, 1) + log|det dz/dx|,    z = bijection(x, conditioner(mel))

    All likelihoods are in nats per audio sample, of audio at amplitude [-1, 1], natural
    logarithm, higher is better. The base is a standard normal; a mel-informed normal is a
    first step of the bijection (`Coupling` with `AllActive`), which is the same density.

    Args:
        bijection: its first step squeezes audio (B, 1, T) to (B, channels, T / channels).
        conditioner: makes the condition, at the resolution after the squeeze, F hop_length /
            channels positions; None for a density of audio alone.
        channels: C of the squeezed signal.
        hop_length: audio samples for each mel frame, a multiple of `channels`; by default equal.
        latent_channels: C of z, where the bijection adds latents (`Augment`); by default equal
            to `channels`.

    Attributes:
        is_bound: whether its likelihoods are lower bounds, as those of a VAE are.
        phase_settings: settings of a recipe that only its `phases` use; other models refuse them.
        measure: the name of what validation measures, in logs and in `waveflow info`. It has the
            unit of a likelihood and higher is better; another one comes from `Phase.score`.

    Raises:
        ConfigError: hop_length is no multiple of `channels`, or of the bijection's blocks.

    Example:
        >>> step = Coupling(nn.Conv1d(1, 2, 1), Affine(), Halves())
        >>> moons = Flow(Chain(Squeeze(2), step), channels=2)
        >>> moons(torch.randn(100, 2)).shape, moons.sample(n_items=7).shape
        (torch.Size([100]), torch.Size([7, 2]))
    """

    is_bound: bool = False
    phase_settings: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        bijection: Bijection,
        conditioner: Conditioner | None = None,
        channels: int = 1,
        hop_length: int | None = None,
        latent_channels: int | None = None,
    ) -> None:
        super().__init__()
        hop_length = channels if hop_length is None else hop_length
        for name, size in (("channels", channels), ("blocks", bijection.block)):
            if hop_length % size:
                raise ConfigError(
                    f"hop_length {hop_length} is not a multiple of {size}, the flow's {name}"
                )
        self.bijection = bijection
        self.conditioner = conditioner or Unconditional(hop_length // channels)
        self.channels = channels
        self.latent_channels = channels if latent_channels is None else latent_channels
        self.hop_length = hop_length

    @property
    def measure(self) -> str:
        return "lower bound" if self.is_bound else "log-likelihood"

    @property
    def context(self) -> Context:
        """Frames to the left and to the right whose mel and noise a frame of audio depends on.

        A stream that carries the flow's state needs no more.

        Raises:
            ConfigError: a network, a bijection or the conditioner declares none.
        """
        hops = [
            side if side == math.inf else -(-int(side) // self.hop_length)
            for side in self.bijection.stream_context
        ]
        return Context(*hops) + context_of(self.conditioner)

    @property
    def recompute(self) -> bool:
        """Whether training computes the couplings' networks twice instead of keeping activations.

        Memory then hardly grows with the number of flows, and a step takes about a third longer.
        """
        return any(getattr(module, "recompute", False) for module in self.bijection.modules())

    @recompute.setter
    def recompute(self, wanted: bool) -> None:
        for module in self.bijection.modules():
            if hasattr(module, "recompute"):
                setattr(module, "recompute", wanted)  # noqa: B010

    def condition(
        self, mel: Tensor, lengths: Tensor | None = None, state: State = None
    ) -> Condition:
        """The condition of mel (B, M, F); `lengths` (B,) are the frames of each padded item."""
        return self.conditioner(mel, _frame_mask(mel, lengths), state)

    def carry(
        self, mel: Tensor, lengths: Tensor | None, state: State, n_frames: int, audio: Tensor
    ) -> State:
        """The state of a window `n_frames` after this one, for `decode`.

        It is the conditioner's state and the audio that is made already.

        Args:
            mel: of this window.
            lengths: of this window's items.
            state: of this window.
            n_frames: see `Conditioner.carry`.
            audio: (B, T), the final part of what `decode` made of this window.
        """
        of_conditioner = None if state is None else state[0]
        if n_frames:
            mask = _frame_mask(mel, lengths)
            of_conditioner = self.conditioner.carry(mel, mask, of_conditioner, n_frames)
        return of_conditioner, audio[:, n_frames * self.hop_length :]

    def forward(
        self, audio: Tensor, mel: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """The log-likelihood (B,) of audio (B, T) under mel (B, M, F), nats per sample.

        T is a multiple of `channels` and at most F hop_length; `lengths` (B,) in frames. The mel
        may be None where there is no conditioner.
        """
        cond, _, prior = self.fitted(audio, self._mel(audio, mel), lengths)
        return self.log_prob(audio, cond.crop(audio.shape[1] // self.channels), prior)[0]

    def fitted(
        self, audio: Tensor, mel: Tensor, lengths: Tensor | None = None, state: State = None
    ) -> Fitted:
        """The condition for the density of audio (B, T), T at most F hop_length."""
        missing = mel.shape[2] * self.hop_length - audio.shape[1]
        whole = F.pad(audio, (0, missing)) if missing else audio
        return self.conditioner.fitted(whole, mel, _frame_mask(mel, lengths), state)

    def log_prob(
        self, audio: Tensor, cond: Condition, prior: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-likelihood (B,) and z (B, C, L) of audio (B, T) under a condition.

        `prior` (B, F) is that of a condition that was chosen for the audio (`Fitted.log_prob`).
        """
        z, log_det = self.bijection(audio[:, None], cond)
        log_prob = standard_normal_log_prob(z, cond.mask) + log_det
        if prior is not None:
            log_prob = log_prob + prior.sum(1).to(log_prob.dtype)
        n_samples: Tensor | int = audio.shape[1]
        if cond.mask is not None:
            n_samples = cond.mask.sum((1, 2)) * self.channels
        return log_prob / n_samples, z

    def by_frame(
        self, audio: Tensor, mel: Tensor | None = None, fitted: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-likelihoods of frames (B, F) and of all (B,), nats per sample, and z (B, C, L).

        A frame has the density of its own z and the log-determinants at its positions. Their mean
        is the log-likelihood, where every bijection adds up its own by `sum_log_det`.

        Args:
            audio: (B, F hop_length).
            mel: (B, M, F), as `forward`.
            fitted: whether the condition is chosen for the audio, as in `forward`; if not, it is
                that of the mel alone, under which `decode` takes z back.
        """
        n_frames, mel = audio.shape[1] // self.hop_length, self._mel(audio, mel)
        chosen = self.fitted(audio, mel) if fitted else Fitted(self.condition(mel), None, None)
        cond = chosen.cond.crop(audio.shape[1] // self.channels)
        with log_dets_by_position() as log_dets:
            log_prob, z = self.log_prob(audio, cond, chosen.log_prob)
        own = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)
        frames = torch.stack([_in_frames(part, n_frames) for part in (own, *log_dets)]).sum(0)
        if chosen.log_prob is not None:
            frames = frames + chosen.log_prob[:, :n_frames].to(frames.dtype)
        return frames / self.hop_length, log_prob, z

    def encode(
        self, audio: Tensor, mel: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Audio (B, T) to noise (B, C, L); arguments as `forward`.

        The condition is that of the mel alone, so that `decode` takes the noise back.
        """
        cond = self.condition(self._mel(audio, mel), lengths)
        cond = cond.crop(audio.shape[1] // self.channels)
        return zero_padding(self.bijection(audio[:, None], cond)[0], cond.mask)

    def decode(
        self,
        z: Tensor,
        mel: Tensor | None = None,
        lengths: Tensor | None = None,
        state: State = None,
        sigma: float | Tensor = 1.0,
    ) -> Tensor:
        """Noise (B, C, L) to audio (B, channels L), the exact inverse of `encode`.

        `lengths` (B,) in frames; `state` (`carry`) belongs to a window that does not begin with
        its utterance; `sigma` tempers the noise (`Conditioner.tempered`).
        """
        of_conditioner, past = (None, None) if state is None else state
        mel = self._mel(z.flatten(1), mel)
        cond = self.condition(mel, lengths, of_conditioner).crop(z.shape[2])
        z, cond = self.conditioner.tempered(zero_padding(z, cond.mask), cond, sigma)
        if past is None:
            audio = self.bijection.inverse(z, cond)[0][:, 0]
        else:
            audio = self.bijection.inverse_after(past[:, None], z, cond)[:, 0]
        if cond.mask is not None:
            mask = cond.mask[:, 0].repeat_interleave(self.channels, 1)
            audio = zero_padding(audio, mask)
        return audio

    def sample(
        self,
        mel: Tensor | None = None,
        sigma: float = 1.0,
        seed: int = 0,
        n_items: int = 1,
        n_frames: int = 1,
    ) -> Tensor:
        """Draws of the density at `sigma`, (B, F hop_length): one for each mel (B, M, F).

        Each item has a seed of its own, `seed` and those after it. Without a mel, `n_items` draws
        of `n_frames`.
        """
        if mel is not None:
            n_items, n_frames = mel.shape[0], mel.shape[2]
        noise = self.noise(n_frames, range(seed, seed + n_items))
        device = next((p.device for p in self.parameters()), noise.device)
        return self.decode(noise.to(device), mel, sigma=sigma)

    def noise(self, n_frames: int, seeds: Sequence[int], first_frame: int = 0) -> Tensor:
        """z ~ N(0, 1) of an utterance from a frame on, (B, C, L).

        An item gets the same noise in any batch and in any pieces.
        """
        per_frame = self.hop_length // self.channels * self.latent_channels
        values = draw_noise(n_frames, per_frame, seeds, first_frame)
        return values.reshape(len(seeds), -1, self.latent_channels).transpose(1, 2)

    def phases(self, settings: Any, teacher: "Flow | None" = None) -> list[Phase]:
        """First phases of a training, before the one that trains the whole flow; none by default.

        A training calls it once, when it starts or resumes. A phase without end (`steps` is
        math.inf) replaces the one that trains the whole flow. This is how a model learns from
        another flow: the phase's loss holds that teacher. A teacher that is an attribute of the
        flow would be saved with it.

        Args:
            settings: the recipe's `TrainConfig`.
            teacher: the model that `settings.teacher` names, in evaluation mode, its weights
                frozen; on the same mel.
        """
        return []

    def training_loss(self, batch: Batch, cond: Condition) -> dict[str, Tensor]:
        """Terms of the model's own objective; training minimises their sum.

        By default the negative log-likelihood, "nll". A variational model overrides this with its
        bound. Terms of a recipe, such as the spectral energy distance, are no part of it.

        Args:
            batch: the items, under the two rules of `Batch`.
            cond: `condition` of the batch's mel.

        Returns:
            Scalars by name, means over the items.
        """
        return {"nll": -self.log_prob(batch.audio, cond)[0].mean()}

    def _mel(self, samples: Tensor, mel: Tensor | None) -> Tensor:
        """The mel, or one without bands for samples (B, T) where the flow needs none."""
        if mel is not None:
            return mel
        if not isinstance(self.conditioner, Unconditional):
            raise ConfigError("this flow is steered by a mel: give one")
        n_frames = -(-samples.shape[1] // self.hop_length)
        return samples.new_zeros(len(samples), 0, n_frames)


def _in_frames(values: Tensor, n_frames: int) -> Tensor:
    """Values (B, L) of positions, added up in frames (B, F), or shared out among them."""
    if values.shape[1] >= n_frames:
        return values.unflatten(1, (n_frames, -1)).sum(2)
    n = n_frames // values.shape[1]
    return values.repeat_interleave(n, 1) / n


def select_items(state: State, items: Any) -> State:
    """The state of some items of a batch; `items` is an index of the batch axis."""
    if isinstance(state, tuple):
        return tuple(select_items(part, items) for part in state)
    return None if state is None else state[items]


def _frame_mask(mel: Tensor, lengths: Tensor | None) -> Tensor | None:
    """(B, 1, F), 1 in the frames of each item of a padded batch."""
    if lengths is None:
        return None
    frames = torch.arange(mel.shape[2], device=mel.device)
    return (frames < lengths[:, None])[:, None].to(mel.dtype)
