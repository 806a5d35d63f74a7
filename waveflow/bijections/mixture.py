"""MixtureOfLogistics: the distribution function of a mixture as the map of a coupling."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# An inverse is solved to this error of z; the last step of Newton's method squares it.
_SOLVED = 1e-9
_MOST_STEPS = 60
_MOST = 8.0  # |log_scale| of a component


class MixtureOfLogistics:
    """z = Phi^-1(F(x)), F the distribution function of K logistic components.

    The density of x is then that of the mixture, which can have several peaks: the head of a
    WaveNet (van den Oord et al. 2018, section 2.1; Ho et al. 2019, Flow++, section 3.2).
    Parameters of a value are K logits, K means and K log-scales. All is computed in float64,
    from the side on which F is small. The inverse has no formula: Newton's method finds it
    between the components' own quantiles, and its last step also gives the gradient.

    Args:
        n_components: K.
    """

    def __init__(self, n_components: int = 4) -> None:
        self.n_components = n_components
        self.n_params = 3 * n_components

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        z, log_slope = self._z(x.double(), *self._split(params))
        dtype = torch.promote_types(x.dtype, torch.float32)
        return z.to(dtype), log_slope.to(dtype)

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(z.dtype, torch.float32)
        parts = self._split(params)
        z = z.double()
        with torch.no_grad():
            _, means, log_scales = parts
            logit = torch.special.log_ndtr(z) - torch.special.log_ndtr(-z)
            quantiles = means + log_scales.exp() * logit[..., None]
            x = self._solved(z, quantiles.amin(-1), quantiles.amax(-1), parts)
        # One step of Newton's method: its value is x, its derivatives are those of the inverse.
        found, log_slope = self._z(x, *parts)
        x = x - (found - z) * (-log_slope.detach()).exp()
        return x.to(dtype), -self._z(x, *parts)[1].to(dtype)

    def initial(self, std: float) -> Tensor:
        """Parameters (3 K,) of components side by side, for values of this standard deviation.

        Components that start alike would stay alike, because their gradients are equal.
        """
        means = std * torch.linspace(-1, 1, self.n_components + 2)[1:-1]
        log_scales = torch.full_like(means, math.log(std / 2))
        return torch.cat([torch.zeros_like(means), means, _MOST * torch.atanh(log_scales / _MOST)])

    def _solved(self, z: Tensor, low: Tensor, high: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """x with z(x) = z, between low and high: Newton's method, or halving where it leaves."""
        x = (low + high) / 2
        for _ in range(_MOST_STEPS):
            found, log_slope = self._z(x, *parts)
            off = found - z
            if off.abs().max() < _SOLVED:
                break
            low, high = torch.where(off < 0, x, low), torch.where(off < 0, high, x)
            newton = x - off * (-log_slope).exp()
            x = torch.where((low < newton) & (newton < high), newton, (low + high) / 2)
        return x

    def _z(
        self, x: Tensor, log_weights: Tensor, means: Tensor, log_scales: Tensor
    ) -> tuple[Tensor, Tensor]:
        """z of x, and log dz/dx."""
        u = (x[..., None] - means) * (-log_scales).exp()
        log_below = torch.logsumexp(log_weights + F.logsigmoid(u), -1)
        log_above = torch.logsumexp(log_weights + F.logsigmoid(-u), -1)
        log_density = torch.logsumexp(
            log_weights + F.logsigmoid(u) + F.logsigmoid(-u) - log_scales, -1
        )
        z = _normal_quantile(log_below, log_above)
        log_normal = -0.5 * (z.square() + math.log(2 * math.pi))
        return z, log_density - log_normal

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights, means and log-scales, (B, C, L, K), float64."""
        params = params.double().unflatten(1, (self.n_params, -1)).movedim(1, -1)
        logits, means, log_scales = params.chunk(3, -1)
        return logits.log_softmax(-1), means, _MOST * torch.tanh(log_scales / _MOST)

    def __repr__(self) -> str:
        return f"MixtureOfLogistics(n_components={self.n_components})"


def _normal_quantile(log_below: Tensor, log_above: Tensor) -> Tensor:
    """z with log Phi(z) = log_below and log Phi(-z) = log_above."""
    smaller = torch.minimum(log_below, log_above)
    z = -torch.special.ndtri(smaller.exp().clamp_min(1e-300))
    return torch.where(log_below < log_above, -z, z)
