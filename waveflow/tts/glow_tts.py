"""Glow-TTS (Kim, Kim, Kong, Yoon 2020): a flow of mel frames whose prior a text gives."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from waveflow.bijections import (
    ActNorm, Affine, Chain, Condition, Coupling, Halves, InvertibleConv1x1, Squeeze,
)
from waveflow.nn.frame import ConvNeXt, GatedStack
from waveflow.tts.alignment import durations_of
from waveflow.tts.text import SYMBOLS

MEAN, STD = -5.0, 2.5  # of log-mels of speech


class FlowNetwork(nn.Module):
    """A coupling's network: gated dilated convolutions of the passive half."""

    def __init__(self, n_in: int, width: int, n_out: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.enter = nn.Linear(n_in, width)
        self.stack = GatedStack(width, dilations)
        self.leave = nn.Linear(width, n_out)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        self.context = self.stack.context

    def forward(self, x: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        columns = None if mask is None else mask.transpose(1, 2)
        h = self.stack(self.enter(x.transpose(1, 2)), columns)
        return self.leave(h).transpose(1, 2)


class Terms(NamedTuple):
    """Losses of a batch, and what was found."""

    nll: Tensor  # nats per mel value
    duration: Tensor
    durations: Tensor


class GlowTTS(nn.Module):
    """log p(mel | text) = log N(z; mu_A, 1) + log |det dz/dmel| (equations 1 and 2).

    A says which symbol each frame belongs to: the best monotonic alignment under the model.
    """

    def __init__(self, n_mels: int = 80, width: int = 128, n_layers: int = 6,
                 n_flows: int = 8, flow_width: int = 72, dilations: tuple[int, ...] = (1, 2, 4)) -> None:
        super().__init__()
        self.n_mels = n_mels
        self.embed = nn.Embedding(len(SYMBOLS), width)
        nn.init.normal_(self.embed.weight, std=1.0)
        self.encoder = ConvNeXt(width, n_layers)
        self.prior = nn.Linear(width, n_mels)
        self.duration_in = ConvNeXt(width, 2, 5)
        self.duration_out = nn.Linear(width, 1)
        steps = []
        channels = 2 * n_mels
        for _ in range(n_flows):
            network = FlowNetwork(n_mels, flow_width, 2 * n_mels, dilations)
            steps += [ActNorm(channels), InvertibleConv1x1(channels),
                      Coupling(network, Affine(bound=2.0), Halves())]
        self.flow = Chain(Squeeze(2), *steps)

    def encode(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """mu (B, S, M) and log durations (B, S) of text (B, S)."""
        h = self.encoder(self.embed(text), mask[..., None])
        log_durations = self.duration_out(self.duration_in(h.detach(), mask[..., None]))[..., 0]
        return self.prior(h), log_durations

    def forward(self, text: Tensor, n_symbols: Tensor, mel: Tensor, n_frames: Tensor) -> Terms:
        """Text (B, S), mel (B, M, F) with even numbers of frames."""
        text_mask = (torch.arange(text.shape[1]) < n_symbols[:, None]).float()
        mask = (torch.arange(mel.shape[2]) < n_frames[:, None]).float()
        mu, log_durations = self.encode(text, text_mask)
        x = (mel - MEAN) / STD
        cond = Condition(x.new_zeros(len(x), 0, x.shape[2] // 2), mask[:, None, ::2])
        z, log_det = self.flow(x * mask[:, None], cond)
        z = unsqueezed(z) * mask[:, None]
        with torch.no_grad():
            # -|z - mu|^2 / 2 without what does not depend on the symbol
            scores = mu @ z - 0.5 * mu.square().sum(2, keepdim=True)
            scores = scores.masked_fill(text_mask[..., None] == 0, -1e4)
            found = durations_of(scores.numpy(), n_symbols.numpy(), n_frames.numpy())
            durations = torch.from_numpy(found)
        prior = spread(mu, durations, mel.shape[2])
        error = 0.5 * ((z - prior) * mask[:, None]).square().sum((1, 2))
        n_values = n_frames * self.n_mels
        nll = (error - log_det).sum() / n_values.sum() + 0.5 * math.log(2 * math.pi)
        wanted = durations.clamp_min(1).float().log()
        duration = ((log_durations - wanted).square() * text_mask).sum() / text_mask.sum()
        return Terms(nll, duration, durations)

    @torch.no_grad()
    def speak(self, text: Tensor, sigma: float = 0.5, pace: float = 1.0, seed: int = 0) -> Tensor:
        """A mel (M, F) of text (S,)."""
        mask = torch.ones(1, len(text))
        mu, log_durations = self.encode(text[None], mask)
        durations = (log_durations.exp() * pace).round().clamp_min(1).long()
        n_frames = int(durations.sum())
        n_frames += n_frames % 2
        prior = spread(mu, durations, n_frames)
        generator = torch.Generator().manual_seed(seed)
        z = prior + sigma * torch.randn(prior.shape, generator=generator)
        x, _ = self.flow.inverse(squeezed(z), None)
        return x[0] * STD + MEAN


def spread(mu: Tensor, durations: Tensor, n_frames: int) -> Tensor:
    """mu (B, S, M) held for as many frames, (B, M, F)."""
    ends = durations.cumsum(1)
    at = torch.searchsorted(ends, torch.arange(n_frames).expand(len(mu), -1).contiguous(), right=True)
    at = at.clamp_max(mu.shape[1] - 1)
    return mu.gather(1, at[..., None].expand(-1, -1, mu.shape[2])).transpose(1, 2)


_SQUEEZE = Squeeze(2)


def squeezed(z: Tensor) -> Tensor:
    return _SQUEEZE(z)[0]


def unsqueezed(z: Tensor) -> Tensor:
    return _SQUEEZE.inverse(z)[0]
