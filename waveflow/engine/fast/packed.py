"""Makes the stand-ins of a flow's modules for synthesis: packed products, plain weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from waveflow.bijections.base import full_precision
from waveflow.decoding import declaration, is_exactly
from waveflow.engine.fast.product import Product

# What a product is packed for, four seconds of frames; any length works.
_USUAL_ROWS = 344


class PackedLinear(nn.Module):
    """x weight^T + bias of a weight (N, K) that no longer changes, never below float32.

    On a CPU by `Product`, which autocast and compilers leave as it is; elsewhere torch's own.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        # A network may ask its layers for their sizes.
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self._product: Product | None = None
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            product = Product(self.weight, torch.float32, _USUAL_ROWS, self.bias)
            self._product = product if product.packed else None

    @property
    def is_faster(self) -> bool:
        """Whether it runs another routine than torch's own layer."""
        return self._product is not None

    def forward(self, x: Tensor) -> Tensor:
        if self._product is None:
            if not torch.is_autocast_enabled(x.device.type):
                return F.linear(x, self.weight, self.bias)
            with full_precision(x):
                return F.linear(x, self.weight, self.bias)
        if torch.compiler.is_compiling():
            return torch.ops.waveflow.product(x, self.weight, self.bias)
        return self._product(x)


class DecodingKit:
    """Makes the stand-ins of modules (`waveflow.decoding.Kit`).

    Args:
        dtype: of the networks' matrix products.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        # By module, because one that is used in several places has one stand-in.
        self._made: dict[int, tuple[nn.Module, nn.Module]] = {}

    def convert(self, module: nn.Module) -> nn.Module:
        """The stand-in of a module: its own choice, or a twin with converted children."""
        if id(module) not in self._made:
            # With the module itself, so that no other can get its id.
            self._made[id(module)] = module, self._stand_in(module)
        return self._made[id(module)][1]

    def replaced(self, module: nn.Module, **children: nn.Module) -> nn.Module:
        """A copy of a module with these children for its own; the others are converted."""
        assert children.keys() <= module._modules.keys()
        return _twin_of(
            module, lambda name, own: children[name] if name in children else self.convert(own)
        )

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
        """A layer x weight^T + bias with a fixed weight (N, K), never below float32."""
        return PackedLinear(weight, bias)

    def _stand_in(self, module: nn.Module) -> nn.Module:
        choose = declaration(module, "for_decoding")
        if choose is not None:
            return choose(self)
        # torch's own layer cannot say it itself.
        if is_exactly(module, nn.Linear) and self.dtype == torch.float32:
            packed = PackedLinear(module.weight, module.bias)  # type: ignore[arg-type]
            if packed.is_faster:
                return packed
        return self.replaced(module)


def with_packed_linears(module: nn.Module) -> nn.Module:
    """A twin of a module, sharing its weights, with every `nn.Linear` packed."""
    return DecodingKit().convert(module)


@torch.no_grad()
def _twin_of(module: nn.Module, convert: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    """A shallow copy of a module with converted children and without parametrizations.

    A parametrized tensor, such as a weight with weight norm, is computed once. The class of a
    parametrized module is one that torch has made for it; the twin has the original class.
    """
    kind: Any = type_before_parametrizations(module)
    twin = kind.__new__(kind)
    twin.__dict__.update(module.__dict__)
    twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
    children = dict(module._modules)
    if is_parametrized(module):
        for name in children.pop("parametrizations"):  # type: ignore[union-attr]
            value = getattr(module, name).detach()
            twin._parameters[name] = nn.Parameter(value, requires_grad=False)
    twin._modules = {
        name: None if child is None else convert(name, child) for name, child in children.items()
    }
    return twin


# Compilers cannot take packed weights, and left to themselves they call MKL.
torch.library.define("waveflow::product", "(Tensor rows, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl("waveflow::product", "CPU")
def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


@torch.library.register_fake("waveflow::product")
def _product_shape(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], weight.shape[0])
