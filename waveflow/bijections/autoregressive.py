"""Autoregressive: each element is mapped by parameters that earlier elements decide."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from waveflow.bijections.base import Bijection, Condition, check_channels, sum_log_det
from waveflow.bijections.elementwise import ElementwiseMap
from waveflow.context import Context, context_of
from waveflow.decoding import Steps


class CausalNetwork(Protocol):
    """Parameters (B, n C, L) of x (B, C, L); those of an element see only earlier elements.

    `steps` is the same network, one element after another, without computing anything twice. For
    `OverTime` it also takes `past` (B, C, l), the first elements: the first call of the steps then
    gets the last of these.
    """

    def __call__(self, x: Tensor, features: Tensor | None, mask: Tensor | None) -> Tensor: ...

    def steps(self, like: Tensor, features: Tensor | None, mask: Tensor | None) -> Steps: ...


class Autoregressive(Bijection):
    """z_i = map(x_i; network(x_1 .. x_{i-1}, cond)), for each element i (Papamakarios et al. 2017).

    The Jacobian is triangular, so its log-determinant is the sum of the map's elementwise
    log-derivatives. `forward` is one pass of the network. `inverse` goes from element to element;
    a network with `steps` does each element's work once, any other is run on the whole signal for
    each element. Its `Inverse` is an inverse autoregressive flow (IAF, Kingma et al. 2016).

    `OverChannels` and `OverTime` say what an element is.

    Args:
        network: see `CausalNetwork`; `steps` is optional.
        map: the elementwise map.

    Raises:
        ValueError: the network makes parameters of another shape than the map needs.
    """

    axis: int

    def __init__(self, network: nn.Module, map: ElementwiseMap) -> None:
        super().__init__()
        self.network = network
        self.map = map

    @property
    def context(self) -> Context:
        return context_of(self.network)

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        features, mask = (None, None) if cond is None else cond
        params = self.network(x, features, mask)
        expected = (x.shape[0], self.map.n_params * x.shape[1], x.shape[2])
        if params.shape != expected:
            raise ValueError(
                f"{type(self.network).__name__} makes {tuple(params.shape)} of {tuple(x.shape)}; "
                f"{self.map!r} needs {expected}"
            )
        z, log_det = self.map.forward(x, params)
        return z, sum_log_det(log_det, cond)

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = self._continued([], self._steps(z, cond), z)
        return x, sum_log_det(log_det, cond)

    def _steps(self, z: Tensor, cond: Condition | None, *past: Tensor) -> Steps:
        steps: Any = getattr(self.network, "steps", self._whole)
        features, mask = (None, None) if cond is None else cond
        return steps(z, features, mask, *past)

    def _continued(
        self, known: list[Tensor], params_of_next: Steps, z: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x, its first elements known, of the z of the others; and their log-derivatives."""
        elements, log_dets = list(known), []
        for z_i in z.split(1, self.axis):
            params = params_of_next(elements[-1] if elements else None)
            element, log_det = self.map.inverse(z_i, params)
            elements.append(element)
            log_dets.append(log_det)
        return torch.cat(elements, self.axis), torch.cat(log_dets, self.axis)

    def _whole(
        self,
        like: Tensor,
        features: Tensor | None,
        mask: Tensor | None,
        past: Tensor | None = None,
    ) -> Steps:
        """The steps of a network that has none of its own: the whole network for each element."""
        known = [] if past is None else list(past.split(1, self.axis))[:-1]

        def params_of_next(element: Tensor | None) -> Tensor:
            known.extend([] if element is None else [element])
            n_left = like.shape[self.axis] - len(known)
            rest = torch.zeros_like(like.narrow(self.axis, len(known), n_left))
            params = self.network(torch.cat([*known, rest], self.axis), features, mask)
            params = params.unflatten(1, (self.map.n_params, like.shape[1]))
            return params.narrow(self.axis + 1, len(known), 1).flatten(1, 2)

        return params_of_next

    def extra_repr(self) -> str:
        return f"map={self.map!r}"


class OverChannels(Autoregressive):
    """The channels of a position one after another: C steps, whatever the length.

    MAF over blocks of samples (a MADE sees one position alone) and WaveFlow (its rows are the
    channels here, and its network sees positions on both sides in earlier rows).

    Args:
        channels: C.
    """

    axis = 1

    def __init__(self, network: nn.Module, map: ElementwiseMap, channels: int) -> None:
        super().__init__(network, map)
        self.channels = channels

    @property
    def inverse_context(self) -> Context:
        # Each channel sees the earlier ones around it, and these see as far again.
        left, right = context_of(self.network)
        return Context((self.channels - 1) * left, (self.channels - 1) * right)

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        check_channels(self, x, self.channels)
        return super().forward(x, cond)

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        check_channels(self, z, self.channels)
        return super().inverse(z, cond)


class OverTime(Autoregressive):
    """The positions of a signal of one channel one after another: L steps (WaveNet)."""

    axis = 2

    @property
    def inverse_context(self) -> Context:
        # A sample is made of all earlier ones, and those of all earlier noise.
        return Context(math.inf, context_of(self.network).right)

    @property
    def stream_context(self) -> Context:
        # The samples that the network sees; how they were made no longer matters.
        return context_of(self.network)

    def inverse_after(self, past: Tensor, z: Tensor, cond: Condition | None = None) -> Tensor:
        if not past.shape[2]:
            return self.inverse(z, cond)[0]
        if past.shape[2] == z.shape[2]:
            return past
        known = list(past.split(1, self.axis))
        return self._continued(known, self._steps(z, cond, past), z[:, :, len(known) :])[0]
