"""Glow-TTS (Kim, Kim, Kong, Yoon 2020): a flow of mel frames whose prior a text gives."""

import math
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor, nn

from waveflow.bijections import (
    ActNorm,
    Affine,
    Bijection,
    Chain,
    Condition,
    Coupling,
    Halves,
    InvertibleConv1x1,
    Squeeze,
)
from waveflow.nn.frame import ConvNeXt, GatedStack
from waveflow.tts.alignment import best_durations
from waveflow.tts.text import SYMBOLS

# Mean and standard deviation of the log-mels of speech, roughly.
MEAN, STD = -5.0, 2.5
# Frames of a symbol, two seconds: untrained weights could ask for any number.
LONGEST = 172


class GlowTTSConfig(BaseModel):
    """Sizes of a Glow-TTS.

    Attributes:
        width, n_layers: of the text encoder, ConvNeXt blocks.
        duration_layers: of the duration predictor.
        n_flows, flow_width, dilations: of the couplings and their gated networks.
        dropout: of embeddings and of what the encoder gives, in training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["glow-tts"] = "glow-tts"
    width: PositiveInt = 128
    n_layers: PositiveInt = 6
    duration_layers: PositiveInt = 2
    n_flows: PositiveInt = 8
    flow_width: PositiveInt = 72
    dilations: tuple[Annotated[int, Field(gt=0, le=64)], ...] = Field((1, 2, 4), min_length=1)
    dropout: float = Field(default=0.2, ge=0, lt=1)


class Terms(NamedTuple):
    """The objective of a batch.

    Attributes:
        log_likelihood: of the mels, nats for each value of them.
        duration: mean squared error of log durations (equation 8).
        durations: (B, S), frames of each symbol on the best path.
    """

    log_likelihood: Tensor
    duration: Tensor
    durations: Tensor


class GlowTTS(nn.Module):
    """log p(mel | text) = log N(z; mu[A], 1) + log |det dz/dmel| (equations 1 and 2).

    A tells which symbol a frame belongs to: on the best monotonic path (equation 6) in training,
    and by predicted durations in synthesis.
    """

    def __init__(self, config: GlowTTSConfig, n_mels: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(SYMBOLS), config.width)
        self.encoder = ConvNeXt(config.width, config.n_layers)
        self.dropout = nn.Dropout(config.dropout)
        self.prior = nn.Linear(config.width, n_mels)
        self.duration_net = ConvNeXt(config.width, config.duration_layers, kernel_size=5)
        self.duration = nn.Linear(config.width, 1)
        steps = [step for _ in range(config.n_flows) for step in _flow_step(config, 2 * n_mels)]
        self.flow = Chain(Squeeze(2), *steps)
        self.frames = Squeeze(2)

    def encode(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Prior means (B, S, M) and log durations (B, S) of symbols (B, S)."""
        h = self.dropout(self.encoder(self.dropout(self.embed(text)), mask[..., None]))
        # The durations do not teach the encoder (section 3.1).
        durations = self.duration(self.duration_net(h.detach(), mask[..., None]))[..., 0]
        return self.prior(h), durations

    def forward(self, text: Tensor, n_symbols: Tensor, mel: Tensor, n_frames: Tensor) -> Terms:
        """The objective of a padded batch.

        Args:
            text, n_symbols: (B, S) numbers of symbols, and (B,) how many there are.
            mel, n_frames: (B, M, F) natural logarithms, and (B,) frames; all even, and no fewer
                than symbols.
        """
        text_mask = (torch.arange(text.shape[1]) < n_symbols[:, None]).to(mel)
        mask = (torch.arange(mel.shape[2]) < n_frames[:, None])[:, None].to(mel)
        mu, log_durations = self.encode(text, text_mask)
        z, log_det = self.latent(mel, mask)
        # log N(z; mu, 1) without what is the same for all symbols.
        scores = mu.detach() @ z.detach() - 0.5 * mu.detach().square().sum(2, keepdim=True)
        durations = best_durations(
            scores.masked_fill(text_mask[..., None] == 0, -1e4), n_symbols, n_frames
        )
        error = 0.5 * ((z - held(mu, durations, mel.shape[2])) * mask).square().sum((1, 2))
        n_values = n_frames.sum() * mel.shape[1]
        log_likelihood = (log_det - error).sum() / n_values - 0.5 * math.log(2 * math.pi)
        wanted = durations.clamp_min(1).log()
        duration = ((log_durations - wanted).square() * text_mask).sum() / text_mask.sum()
        return Terms(log_likelihood, duration, durations)

    def latent(self, mel: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, M, F) and log |det dz/dmel| (B,) of a mel (B, M, F) with its mask (B, 1, F)."""
        standard = (mel - MEAN) / STD * mask
        none = mel.new_zeros(len(mel), 0, mel.shape[2] // 2)
        z, log_det = self.flow(standard, Condition(none, mask[..., ::2]))
        n_values = mask.sum((1, 2)) * mel.shape[1]
        return self.frames.inverse(z)[0] * mask, log_det - n_values * math.log(STD)

    @torch.no_grad()
    def speak(self, text: Tensor, noise_scale: float, pace: float, seed: int) -> Tensor:
        """A draw of the mel (M, F) of symbols (S,).

        Args:
            noise_scale: standard deviation of z around its prior mean.
            pace: of the speech; 2 is twice as fast.
            seed: of the draw.
        """
        mu, log_durations = self.encode(text[None], torch.ones(1, len(text)))
        durations = (log_durations.exp() / pace).round().nan_to_num().clamp(1, LONGEST)
        n_frames = int(durations.sum())
        prior = held(mu, durations, n_frames + n_frames % 2)
        noise = torch.randn(prior.shape, generator=torch.Generator().manual_seed(seed % 2**63))
        z, _ = self.frames(prior + noise_scale * noise)
        return self.flow.inverse(z)[0][0] * STD + MEAN


def _flow_step(config: GlowTTSConfig, channels: int) -> list[Bijection]:
    """ActNorm, 1x1 convolution and affine coupling (section 3.2)."""
    network = FrameNetwork(channels // 2, config.flow_width, channels, config.dilations)
    coupling = Coupling(network, Affine(bound=2.0), Halves())
    return [ActNorm(channels), InvertibleConv1x1(channels), coupling]


class FrameNetwork(nn.Module):
    """A coupling's network: gated dilated convolutions over the frames of the passive half."""

    def __init__(self, n_in: int, width: int, n_out: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.enter = nn.Linear(n_in, width)
        self.stack = GatedStack(width, dilations)
        self.leave = nn.Linear(width, n_out)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        self.context = self.stack.context

    def forward(self, x: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        frames = None if mask is None else mask.transpose(1, 2)
        return self.leave(self.stack(self.enter(x.transpose(1, 2)), frames)).transpose(1, 2)


def held(values: Tensor, durations: Tensor, n_frames: int) -> Tensor:
    """Values (B, S, M) of symbols, each held for its frames: (B, M, F)."""
    frames = torch.arange(n_frames).expand(len(values), -1).contiguous()
    at = torch.searchsorted(durations.cumsum(1), frames.to(durations.dtype), right=True)
    at = at.clamp_max(values.shape[1] - 1)
    return values.gather(1, at[..., None].expand(-1, -1, values.shape[2])).transpose(1, 2)
