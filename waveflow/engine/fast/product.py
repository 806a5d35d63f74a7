"""Product: rows times a fixed matrix, by the fastest routine that torch has for it."""

import torch
from torch import Tensor
from torch.nn import functional as F

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name)
    for name in ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
)


class Product:
    """rows (L, K) -> rows weight^T + bias, (L, N), of a weight that no longer changes.

    oneDNN's product, which torch.compile calls, takes weights packed beforehand and adds in the
    same pass. On AMD CPUs it does twice as many float32 multiply-adds a second as MKL's, which
    torch.mm calls. Where torch has no oneDNN, or oneDNN no bfloat16, torch's own is taken.

    Args:
        weight: (N, K), of any precision.
        dtype: of rows and result: float32 or bfloat16.
        n_rows: L as it will be in most calls, for the packing; any L works.
        bias: (N,), or None.

    Attributes:
        packed: whether it is oneDNN's.
    """

    def __init__(
        self, weight: Tensor, dtype: torch.dtype, n_rows: int, bias: Tensor | None = None
    ) -> None:
        self._weight = weight.to(dtype).contiguous()
        self._bias = None if bias is None else bias.to(dtype)
        self.packed = (
            _HAS_ONEDNN
            and weight.device.type == "cpu"
            and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
        if self.packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, n_rows)

    def __call__(self, rows: Tensor) -> Tensor:
        """The product of rows (L, K)."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(
                rows, self._weight, self._bias, "none", [], ""
            )
        return F.linear(rows, self._weight, self._bias)

    def plus(self, rows: Tensor, other: Tensor) -> Tensor:
        """The product of rows (L, K), and `other` (L, N) added to it."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise.binary(
                rows, other, self._weight, self._bias, "add"
            )
        return F.linear(rows, self._weight, self._bias).add_(other)
