"""How far a module looks: the declaration that windows and streams are cut by."""

import math
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from waveflow.errors import ConfigError


class Context(NamedTuple):
    """Positions on each side of a position that its result depends on.

    Attributes:
        left, right: whole numbers, or math.inf where there is no bound.

    Example:
        >>> Context(2, 1) + Context(3, 0)
        Context(left=5, right=1)
    """

    left: float = 0
    right: float = 0

    def __add__(self, other: tuple[Any, ...]) -> "Context":
        """The context of one module after another."""
        left, right = other
        return Context(self.left + left, self.right + right)


def context_of(module: nn.Module) -> Context:
    """The context that a module declares, or that torch's own layers are known to have.

    A module declares it as an attribute or property `context`, a pair (left, right). Nothing is
    guessed: a subclass of a torch layer may look further than the layer, so it declares too.

    Raises:
        ConfigError: the module declares no context, or no pair of numbers from 0 on.

    Example:
        >>> context_of(nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.ReLU()))
        Context(left=1, right=1)
    """
    declared = getattr(module, "context", None)
    if declared is None:
        declared = _of_torch_layer(module)
    if declared is None:
        raise ConfigError(
            f"{type(module).__name__} declares no context: set its `context = (left, right)`, the "
            "positions on each side that its result depends on, math.inf where there is no bound"
        )
    try:
        left, right = declared
        valid = all(side == math.inf or side == int(side) >= 0 for side in (left, right))
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ConfigError(
            f"{type(module).__name__} declares the context {declared!r}: give (left, right), whole "
            "numbers from 0 on or math.inf"
        )
    return Context(left, right)


def total_context(*modules: nn.Module) -> Context:
    """The context of modules that act one after another."""
    return sum((context_of(module) for module in modules), Context())


# Layers that treat every position by itself.
_POINTWISE = {
    nn.Identity, nn.Linear, nn.LayerNorm, nn.BatchNorm1d, nn.Dropout,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish,
}  # fmt: skip
# Layers whose statistics or state run over all positions.
_UNBOUNDED = {nn.GroupNorm, nn.InstanceNorm1d}


def _of_torch_layer(module: nn.Module) -> Context | None:
    # torch puts a parametrised layer (weight norm) into a subclass of the layer's own class.
    kind = type(module).__bases__[0] if is_parametrized(module) else type(module)
    if kind in _POINTWISE:
        return Context()
    if kind in _UNBOUNDED:
        return Context(math.inf, math.inf)
    if kind is nn.Sequential:
        return total_context(*module.children())
    if kind is nn.Conv1d:
        return _of_convolution(module)
    return None


def _of_convolution(convolution: Any) -> Context | None:
    """The taps before and after a position; None where the convolution changes the rate."""
    if convolution.stride != (1,):
        return None
    if convolution.padding_mode == "circular":
        return Context(math.inf, math.inf)
    taps = convolution.dilation[0] * (convolution.kernel_size[0] - 1)
    padding = {"same": taps // 2, "valid": 0}.get(convolution.padding)
    left = convolution.padding[0] if padding is None else padding
    return Context(min(left, taps), max(taps - left, 0))
