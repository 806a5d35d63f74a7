"""Product: rows times a fixed matrix, by whichever of torch's routines is faster here."""

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

# oneDNN's operators, which torch.compile emits. They are not documented: without them, torch's
# own product is taken.
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name)
    for name in ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
)
# Multiply-adds of a product in the probe, a fraction of a millisecond; but rows enough to tell.
_PROBE_WORK = 8_000_000
_PROBE_ROWS = 64
_PROBE_RUNS = 3
# oneDNN's time must be less than this share of torch's own, or noise would choose.
_WORTHWHILE = 0.95


class Product:
    """rows (L, K) -> rows weight^T + bias, (L, N), of a weight that no longer changes.

    Two routines can compute it: torch's own, which calls MKL on x86, and oneDNN's, which takes
    weights packed beforehand. On an AMD Zen 5 oneDNN makes twice as many float32 multiply-adds a
    second; on a Zen 3 it makes a tenth fewer. A probe of a millisecond chooses, once for each
    shape in a process.

    Args:
        weight: (N, K), of any precision.
        dtype: of rows and result: float32 or bfloat16.
        n_rows: L as it will be in most calls; any L works.
        bias: (N,), or None.

    Attributes:
        packed: whether oneDNN computes it.
    """

    def __init__(
        self, weight: Tensor, dtype: torch.dtype, n_rows: int, bias: Tensor | None = None
    ) -> None:
        self._weight = weight.to(dtype).contiguous()
        self._bias = None if bias is None else bias.to(dtype)
        n_threads = torch.get_num_threads()
        self.packed = _onednn_has(weight.device, dtype) and _onednn_pays(
            *weight.shape, dtype, n_rows, n_threads
        )
        if self.packed:
            self._weight = _pack(self._weight, n_rows)

    def __call__(self, rows: Tensor) -> Tensor:
        """The product of rows (L, K)."""
        if self.packed:
            return _onednn(rows, self._weight, self._bias)
        return F.linear(rows, self._weight, self._bias)

    def plus(self, rows: Tensor, other: Tensor) -> Tensor:
        """The product of rows (L, K), and `other` (L, N) added to it."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise.binary(
                rows, other, self._weight, self._bias, "add"
            )
        return F.linear(rows, self._weight, self._bias).add_(other)


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def _pack(weight: Tensor, n_rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, n_rows)


def _onednn_has(device: torch.device, dtype: torch.dtype) -> bool:
    return (
        _HAS_ONEDNN
        and device.type == "cpu"
        and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


@cache
def _onednn_pays(n: int, k: int, dtype: torch.dtype, n_rows: int, n_threads: int) -> bool:
    """Whether oneDNN computes a product of this shape faster than torch's own routine."""
    rows = torch.ones(min(n_rows, max(_PROBE_ROWS, _PROBE_WORK // (n * k))), k, dtype=dtype)
    weight, bias = torch.ones(n, k, dtype=dtype), torch.ones(n, dtype=dtype)
    packed = _pack(weight, n_rows)
    onednn, own = _shortest(
        lambda: _onednn(rows, packed, bias), lambda: F.linear(rows, weight, bias)
    )
    return onednn < _WORTHWHILE * own


@torch.inference_mode()
@torch.autocast("cpu", enabled=False)
def _shortest(*works: Callable[[], object]) -> list[float]:
    """The shortest time of each, run in turns: what disturbs only adds."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(1 + _PROBE_RUNS):
        for work, its_times in zip(works, times, strict=True):
            begin = time.perf_counter()
            work()
            its_times.append(time.perf_counter() - begin)
    return [min(its_times) for its_times in times]
