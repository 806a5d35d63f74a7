"""Linear layers whose weights no longer change, by the engine's product."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from waveflow.bijections.base import full_precision
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
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self._product: Product | None = None
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            product = Product(self.weight, torch.float32, _USUAL_ROWS, self.bias)
            self._product = product if product.packed else None

    def forward(self, x: Tensor) -> Tensor:
        if self._product is None:
            with full_precision(x):
                return F.linear(x, self.weight, self.bias)
        if torch.compiler.is_compiling():
            return torch.ops.waveflow.product(x, self.weight, self.bias)
        return self._product(x)


def with_packed_linears(module: nn.Module) -> nn.Module:
    """A twin of a module, sharing its weights, with every `nn.Linear` packed."""
    if type(module) is nn.Linear:
        return PackedLinear(module.weight, module.bias)
    return twin_of(module, with_packed_linears)


def twin_of(module: nn.Module, convert: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A shallow copy of a module whose children are converted."""
    twin = copy.copy(module)
    twin._modules = {
        name: None if child is None else convert(child) for name, child in module._modules.items()
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
