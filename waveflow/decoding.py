"""How a module says that it can be run faster from noise to audio.

A decoder makes a stand-in of each module of a flow. A module chooses its own stand-in:

    class MyStep(Bijection):
        def for_decoding(self, kit: Kit) -> nn.Module:
            return MyFastStep(kit.linear(self.inverted()))

The stand-in takes the same arguments and computes the same: `inverse` of a bijection, `forward`
of a network. It may keep values that it computes from the weights, because a decoder is made anew
when weights change. A module without `for_decoding` runs as it is, and its children are converted.

A declaration holds for the class whose body makes it. A subclass may compute something else, so
it runs as it is until it declares for itself.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from waveflow.context import Context

# A causal network, one element after another (bijections/autoregressive.py): takes the last element
# that is known, None at first, and returns the parameters of the next one.
Steps = Callable[[Tensor | None], Tensor]


class Kit(Protocol):
    """What a decoder offers to modules that make their stand-ins.

    Attributes:
        dtype: of the networks' matrix products.
    """

    dtype: torch.dtype

    def convert(self, module: nn.Module) -> nn.Module:
        """The stand-in of a child."""
        ...

    def replaced(self, module: nn.Module, **children: nn.Module) -> nn.Module:
        """A copy of a module with these children for its own; the others are converted."""
        ...

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
        """x weight^T + bias of x (..., K) with a fixed weight (N, K), never below float32."""
        ...


class NotInIntegers(Exception):
    """A network, or a part of it, cannot run in integers; it runs as it is."""


class IntegerKit(Kit, Protocol):
    """A kit for networks whose products run in 8-bit integers, on one unpadded item.

    A network declares `for_integers(kit)`, which returns its stand-in or raises NotInIntegers.
    Parts of a network declare `in_integers(graph, x)`, which adds them to the graph and returns
    their result.
    """

    def graph(self, n_rows: int, context: Context, channel_axis: int) -> "IntegerGraph":
        """An empty graph on blocks of `n_rows` rows.

        Args:
            n_rows: of a block.
            context: of the whole graph.
            channel_axis: of the layers' inputs in the network's own `forward`, 1 or 2.
        """
        ...


class IntegerGraph(Protocol):
    """Operations on the rows (L, C) of a signal, for networks that run in 8-bit integers.

    Convolutions look at rows that come later, so their results are late by some rows. The graph
    counts them and delays the other operand where two signals meet.
    """

    def input(self, n_channels: int) -> Any:
        """Another argument (L, n_channels) of the compiled graph."""
        ...

    def valid(self, x: Any) -> Any:
        """x with zeros outside the signal, as a convolution's padding has them."""
        ...

    def affine(self, x: Any, weight: Tensor, bias: Tensor) -> Any:
        """x weight^T + bias of a weight (N, K) in float32."""
        ...

    def apply(self, module: nn.Module, x: Any) -> Any:
        """The result of an `nn.Linear`, an `nn.LayerNorm`, or a module with `in_integers`.

        Raises:
            NotInIntegers: another module.
        """
        ...

    def integers(self, x: Any, layer: nn.Module, weight: Tensor) -> Any:
        """x (L, K) in integers: the input of `layer`, which multiplies it by `weight` (N, K)."""
        ...

    def taps(self, x: Any, layer: nn.Module, weights: Sequence[Tensor], dilation: int) -> Any:
        """The taps of a dilated convolution side by side, (L, k K) in integers.

        `weights` (N, K) of the k taps belong to `layer`, whose input x is.
        """
        ...

    def join(self, *parts: Any) -> Any:
        """Channels of integers side by side."""
        ...

    def product(self, x: Any, weight: Tensor, bias: Tensor) -> Any:
        """x weight^T + bias of integers x (L, K) and a weight (N, K), rounded to integers."""
        ...

    def gate(self, x: Any, weight: Tensor, bias: Tensor) -> Any:
        """tanh(a) sigmoid(b), a and b the halves of a `product`."""
        ...

    def add(self, first: Any, second: Any) -> Any:
        """The sum of two signals."""
        ...

    def compiled(self, result: Any) -> Callable[..., Tensor]:
        """A function of the inputs (L, C), in their order, to the result (L, N)."""
        ...


def declaration(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """The method `name` of a module, if the body of its own class defines it."""
    own = type_before_parametrizations(module)
    return getattr(module, name) if name in vars(own) else None


def is_exactly(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer is torch's own `kind`, so that its weights say all that it computes.

    It may be parametrized (its weight is then the computed one), but it has no hooks and is of no
    derived class.
    """
    has_hooks = layer._forward_hooks or layer._forward_pre_hooks
    return type_before_parametrizations(layer) is kind and not has_hooks
