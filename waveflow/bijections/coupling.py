"""Coupling: one part of the channels conditions the map of the other."""

import inspect
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from waveflow.bijections.base import Bijection, Condition, sum_log_det
from waveflow.bijections.elementwise import ElementwiseMap
from waveflow.context import Context, context_of
from waveflow.padding import zero_padding


class Split(Protocol):
    """Which channels are passive (seen by the network) and which are active (mapped)."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def merge(self, passive: Tensor, active: Tensor) -> Tensor: ...


class Halves:
    """The first half is passive, the second active (WaveGlow); `swap` exchanges the roles."""

    def __init__(self, swap: bool = False) -> None:
        self.swap = swap

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _check_two(self, x)
        first, second = x.chunk(2, 1)
        return (second, first) if self.swap else (first, second)

    def merge(self, passive: Tensor, active: Tensor) -> Tensor:
        return torch.cat([active, passive] if self.swap else [passive, active], 1)

    def __repr__(self) -> str:
        return "Halves(swap=True)" if self.swap else "Halves()"


class EvenOdd:
    """Even channels are passive, odd ones active; `swap` exchanges the roles."""

    def __init__(self, swap: bool = False) -> None:
        self.swap = swap

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] % 2:
            raise ValueError(f"EvenOdd needs an even number of channels, not {x.shape[1]}")
        _check_two(self, x)
        even, odd = x[:, 0::2], x[:, 1::2]
        return (odd, even) if self.swap else (even, odd)

    def merge(self, passive: Tensor, active: Tensor) -> Tensor:
        even, odd = (active, passive) if self.swap else (passive, active)
        # Interleaved on the transposed view, so that (B, L, C) memory stays as it is.
        both = torch.stack([even.transpose(1, 2), odd.transpose(1, 2)], -1)
        return both.flatten(2).transpose(1, 2)

    def __repr__(self) -> str:
        return "EvenOdd(swap=True)" if self.swap else "EvenOdd()"


class AllActive:
    """No channel is passive: the map depends on the condition alone."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :0], x

    def merge(self, passive: Tensor, active: Tensor) -> Tensor:
        return active

    def __repr__(self) -> str:
        return "AllActive()"


class ActiveFirst:
    """The first `n` channels are active, the others passive."""

    def __init__(self, n: int) -> None:
        self.n = n

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, self.n :], x[:, : self.n]

    def merge(self, passive: Tensor, active: Tensor) -> Tensor:
        return torch.cat([active, passive], 1)

    def __repr__(self) -> str:
        return f"ActiveFirst({self.n})"


class Coupling(Bijection):
    """active -> map(active; network(passive, cond)), passive stays.

    The Jacobian is triangular, so its log-determinant is the sum of the map's elementwise
    log-derivatives (NICE, Dinh et al. 2015, section 3). With `AllActive` it is an elementwise
    map that only the condition steers: a conditional Gaussian base, x = mean + std u, written
    as a step of the flow, is the same density.

    Args:
        network: `network(passive (B, Cp, L), features, mask) -> params (B, n Ca, L)`. One that
            takes fewer arguments, such as a plain `nn.Conv1d`, gets as many as it takes; if it
            takes no mask, each item of a padded batch goes through it at its own length.
        map: the elementwise map and its number n of parameters.
        split: which channels are which.

    Attributes:
        recompute: whether the backward pass computes the network's activations anew instead of
            keeping them.

    Raises:
        ValueError: the network's result, or the condition, does not fit the signal.

    Example:
        >>> coupling = Coupling(nn.Conv1d(1, 2, 3, padding=1), Affine(), Halves())
        >>> z, log_det = coupling(torch.randn(5, 2, 7))
    """

    def __init__(self, network: nn.Module, map: ElementwiseMap, split: Split) -> None:
        super().__init__()
        self.network = network
        self.map = map
        self.split = split
        self.recompute = False
        self._n_inputs = _count_inputs(network)

    @property
    def context(self) -> Context:
        return context_of(self.network)

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        passive, active = self.split.split(x)
        params = self._params(passive, active, cond)
        active, log_det = self.map.forward(active, params)
        return self.split.merge(passive, active), sum_log_det(log_det, cond)

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        passive, active = self.split.split(z)
        params = self._params(passive, active, cond)
        active, log_det = self.map.inverse(active, params)
        return self.split.merge(passive, active), sum_log_det(log_det, cond)

    def _params(self, passive: Tensor, active: Tensor, cond: Condition | None) -> Tensor:
        features, mask = (None, None) if cond is None else cond
        if features is not None and features.shape[2] != passive.shape[2]:
            raise ValueError(
                f"the condition has {features.shape[2]} positions, the signal of this coupling "
                f"{passive.shape[2]}"
            )
        if mask is not None and self._n_inputs < 3:
            params = self._each_item(passive, features, mask)
        else:
            params = self._run((passive, features, mask)[: self._n_inputs])
        batch, n_active, length = active.shape
        expected = (batch, self.map.n_params * n_active, length)
        # Too few channels would broadcast, and the log-determinant would be wrong.
        if params.shape != expected:
            raise ValueError(
                f"{type(self.network).__name__} makes {tuple(params.shape)} of "
                f"{tuple(passive.shape)}; {self.map!r} of {n_active} channels needs {expected}"
            )
        return params

    def _run(self, inputs: tuple[Tensor | None, ...]) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.network, *inputs, use_reentrant=False)
        return self.network(*inputs)

    def _each_item(self, passive: Tensor, features: Tensor | None, mask: Tensor) -> Tensor:
        """Runs a network that takes no mask on each item alone; zeros in the padding."""
        rows = []
        for i, n in enumerate((mask[:, 0] != 0).sum(1).tolist()):
            own = [None if x is None else x[i : i + 1, :, : max(n, 1)] for x in (passive, features)]
            params = self._run(tuple(own[: self._n_inputs]))
            rows.append(F.pad(params, (0, passive.shape[2] - params.shape[2])))
        return zero_padding(torch.cat(rows), mask)

    def extra_repr(self) -> str:
        return f"map={self.map!r}, split={self.split!r}"


def _count_inputs(network: nn.Module) -> int:
    """How many of (passive, features, mask) a network's forward takes: 1, 2 or 3."""
    parameters = inspect.signature(network.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return 3
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return min(3, sum(parameter.kind in named for parameter in parameters))


def _check_two(split: Split, x: Tensor) -> None:
    if x.shape[1] < 2:
        raise ValueError(f"{split!r} needs two channels or more, not {x.shape[1]}: squeeze first")
