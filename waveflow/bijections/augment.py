"""Augment: latent variables beside a signal, drawn from a posterior (VAE)."""

import math

import torch
from torch import Tensor, nn

from waveflow.bijections.base import Bijection, Condition
from waveflow.context import Context, context_of
from waveflow.distributions import draw_noise, standard_normal_log_prob


class Augment(Bijection):
    """x -> (x, y), y ~ q(y | x, cond), and back (x, y) -> x (Kingma, Welling 2014).

    y = posterior(e), e ~ N(0, 1), where the encoder's features of x steer the posterior. In place
    of a log-determinant `forward` returns -log q(y | x, cond) = log|det dy/de| - log N(e; 0, 1).
    A flow's log-density of (x, y) then becomes log p(x, y) - log q(y | x), whose mean over e is
    the evidence lower bound: at most log p(x), the density of x alone. So this is no bijection
    (SurVAE flows, Nielsen et al. 2020, section 3, call it a stochastic surjection), and a `Flow`
    that contains it sets `is_bound`.

    In evaluation e is the noise of a fixed seed, the same for all items, so that a bound repeats
    and an item has the same one in any batch. In training it is drawn anew, or given.

    Args:
        channels: of y.
        encoder: `network(x, features, mask) -> (B, H, L)`.
        posterior: of y, (B, channels, L), under the encoder's features.
    """

    def __init__(self, channels: int, encoder: nn.Module, posterior: Bijection) -> None:
        super().__init__()
        self.channels = channels
        self.encoder = encoder
        self.posterior = posterior

    @property
    def context(self) -> Context:
        return context_of(self.encoder) + context_of(self.posterior)

    @property
    def inverse_context(self) -> Context:
        return Context()

    def forward(
        self, x: Tensor, cond: Condition | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, C, L) and noise e (B, channels, L) to (x, y) (B, C + channels, L)."""
        features, mask = (None, None) if cond is None else cond
        if noise is None:
            noise = self._noise(x)
        own = Condition(self.encoder(x, features, mask), mask)
        y, log_det = self.posterior(noise, own)
        return torch.cat([x, y], 1), log_det - standard_normal_log_prob(noise, mask)

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        """(x, y) to x. The log-determinant is NaN, because the density of x is not known."""
        return z[:, : -self.channels], z.new_full((z.shape[0],), math.nan)

    def _noise(self, x: Tensor) -> Tensor:
        shape = x.shape[0], self.channels, x.shape[2]
        if self.training:
            return torch.randn(shape, dtype=x.dtype, device=x.device)
        noise = draw_noise(x.shape[2], self.channels, seeds=[0])
        return noise.view(1, -1, self.channels).transpose(1, 2).to(x).expand(shape)

    def extra_repr(self) -> str:
        return f"channels={self.channels}"
