"""MapCond: another view of the condition for an inner bijection."""

from torch import Tensor, nn

from waveflow.bijections.base import Bijection, Condition
from waveflow.bijections.squeeze import squeeze
from waveflow.context import Context, context_of


class MapCond(Bijection):
    """`bijection` under `network(cond)`; the condition outside stays as it is.

    Args:
        bijection: the inner bijection.
        network: module from Condition to Condition, such as `SqueezeCondition`.
    """

    def __init__(self, bijection: Bijection, network: nn.Module) -> None:
        super().__init__()
        self.bijection = bijection
        self.network = network
        self.factor, self.block = bijection.factor, bijection.block

    @property
    def context(self) -> Context:
        return context_of(self.bijection) + context_of(self.network)

    @property
    def inverse_context(self) -> Context:
        return self.bijection.inverse_context + context_of(self.network)

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection(x, self._view(cond))

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse(z, self._view(cond))

    def _view(self, cond: Condition | None) -> Condition | None:
        return None if cond is None else self.network(cond)


class SqueezeCondition(nn.Module):
    """Features and mask squeezed by n, for the audio of a deeper level.

    A squeezed position is valid if all of its n positions are.
    """

    context = Context()

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, cond: Condition) -> Condition:
        return Condition(squeeze(cond.features, self.n), _squeezed_mask(cond.mask, self.n))

    def extra_repr(self) -> str:
        return f"n={self.n}"


class EveryNth(nn.Module):
    """Every n-th position of features that are held for n or more positions.

    Unlike `SqueezeCondition` it keeps the number of features. The mask is as there.
    """

    context = Context()

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, cond: Condition) -> Condition:
        return Condition(cond.features[..., :: self.n], _squeezed_mask(cond.mask, self.n))

    def extra_repr(self) -> str:
        return f"n={self.n}"


def _squeezed_mask(mask: Tensor | None, n: int) -> Tensor | None:
    """1 at the squeezed positions of which all n positions are valid."""
    return None if mask is None else squeeze(mask, n).amin(1, keepdim=True)
