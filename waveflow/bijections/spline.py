"""RationalQuadratic: a monotone spline as the map of a coupling."""

import torch
from torch import Tensor
from torch.nn import functional as F


class RationalQuadratic:
    """A monotone rational-quadratic spline on [-bound, bound], the identity outside.

    (Durkan et al. 2019, Neural Spline Flows, equations 4 to 8.) Parameters of a value are K
    widths, K heights and K - 1 slopes, all zero for the identity. The inverse solves a quadratic
    equation, so it is as exact as the direction that is written.

    Args:
        n_bins: K.
        bound: the spline's interval; values of the flow should lie in it.
    """

    def __init__(self, n_bins: int = 8, bound: float = 4.0) -> None:
        self.n_bins, self.bound = n_bins, bound
        self.n_params = 3 * n_bins - 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        inside = x.abs() < self.bound
        left, bottom, width, height, slope, next_slope = self._bin(x, params, of_input=True)
        mean_slope = height / width
        t = ((x - left) / width).clamp(0, 1)
        curve = t * (1 - t)
        bend = mean_slope + (slope + next_slope - 2 * mean_slope) * curve
        z = bottom + height * (mean_slope * t.square() + slope * curve) / bend
        numerator = next_slope * t.square() + 2 * mean_slope * curve + slope * (1 - t).square()
        log_slope = 2 * mean_slope.log() + numerator.log() - 2 * bend.log()
        return torch.where(inside, z, x), torch.where(inside, log_slope, 0.0)

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        inside = z.abs() < self.bound
        left, bottom, width, height, slope, next_slope = self._bin(z, params, of_input=False)
        mean_slope = height / width
        above = (z - bottom).clamp_min(0).minimum(height)
        excess = slope + next_slope - 2 * mean_slope
        a = height * (mean_slope - slope) + above * excess
        b = height * slope - above * excess
        c = -mean_slope * above
        # The root in [0, 1], in the form that subtracts nothing.
        t = 2 * c / (-b - (b.square() - 4 * a * c).clamp_min(0).sqrt())
        curve = t * (1 - t)
        bend = mean_slope + excess * curve
        numerator = next_slope * t.square() + 2 * mean_slope * curve + slope * (1 - t).square()
        log_slope = 2 * bend.log() - 2 * mean_slope.log() - numerator.log()
        return torch.where(inside, left + t * width, z), torch.where(inside, log_slope, 0.0)

    def _bin(self, values: Tensor, params: Tensor, of_input: bool) -> tuple[Tensor, ...]:
        """Left and bottom, width and height, and the slopes at both ends of each value's bin."""
        params = params.to(torch.promote_types(params.dtype, torch.float32))
        params = params.unflatten(1, (self.n_params, -1)).movedim(1, -1)
        widths, heights, slopes = params.split([self.n_bins, self.n_bins, self.n_bins - 1], -1)
        x_knots, y_knots = self._knots(widths), self._knots(heights)
        # Zero parameters give slopes of 1; the ends join the identity.
        slopes = F.pad(F.softplus(slopes + 0.5413), (1, 1), value=1.0)
        knots = x_knots if of_input else y_knots
        index = torch.searchsorted(
            knots[..., 1:-1].contiguous(), values.detach()[..., None].contiguous()
        )
        bounds = [x_knots, y_knots, x_knots.diff(), y_knots.diff(), slopes, slopes[..., 1:]]
        return tuple(part.gather(-1, index)[..., 0] for part in bounds)

    def _knots(self, sizes: Tensor) -> Tensor:
        """K + 1 ascending knots from -bound to bound; no bin is narrower than 1e-3 of it."""
        shares = 1e-3 + (1 - 1e-3 * self.n_bins) * sizes.softmax(-1)
        inner = 2 * shares.cumsum(-1)[..., :-1] - 1
        return self.bound * F.pad(F.pad(inner, (1, 0), value=-1.0), (0, 1), value=1.0)

    def __repr__(self) -> str:
        return f"RationalQuadratic(n_bins={self.n_bins}, bound={self.bound:g})"
