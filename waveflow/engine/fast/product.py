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
# The product that the probe times: rows, and columns of input and result. Half a second of a
# WaveGlow, because the two routines differ less on shorter ones, so that noise would choose.
_PROBE_SIZES = 512, 256, 256
_PROBE_RUNS = 10
# Multiply-adds, at the usual number of rows, from which oneDNN is tried. A call of it takes 10 us
# longer to begin. With fewer it was up to twice as slow as MKL (float32, one thread of a Zen 4 on
# which it makes large products faster).
_LEAST_WORK = 12_000_000


class Product:
    """rows (L, K) -> rows weight^T + bias, (L, N), of a weight that no longer changes.

    Two routines can compute it: torch's own, which calls MKL on x86, and oneDNN's, which takes
    weights packed beforehand. On an AMD Zen 5 oneDNN makes up to twice as many float32
    multiply-adds a second; on a Zen 3 it makes a tenth fewer. A probe of 20 ms chooses, once in a
    process for all large shapes: a choice for each shape would differ from process to process
    where the two are equal, and with it the last bits of the audio. Small ones are torch's own.

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
        self.packed = weight.device.type == "cpu" and onednn_pays(dtype, n_rows * weight.numel())
        if self.packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, n_rows)

    def __call__(self, rows: Tensor) -> Tensor:
        """The product of rows (L, K)."""
        if self.packed:
            return _onednn(rows, self._weight, self._bias)
        return F.linear(rows, self._weight, self._bias)

    def plus(self, rows: Tensor, other: Tensor) -> Tensor:
        """The product of rows (L, K), and `other` (L, N), which is overwritten, added to it."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise.binary(
                rows, other, self._weight, self._bias, "add"
            )
        if self._bias is None:
            return other.addmm_(rows, self._weight.T)
        return F.linear(rows, self._weight, self._bias).add_(other)


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def onednn_pays(dtype: torch.dtype, n_macs: int) -> bool:
    """Whether oneDNN computes products of so many multiply-adds faster than torch's own routine."""
    return n_macs >= _LEAST_WORK and _onednn_is_faster(dtype, torch.get_num_threads())


@cache
def _onednn_is_faster(dtype: torch.dtype, n_threads: int) -> bool:
    """What the probe says on so many threads."""
    if not _HAS_ONEDNN or dtype not in (torch.float32, torch.bfloat16):
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    n_rows, k, n = _PROBE_SIZES
    rows, weight = torch.ones(n_rows, k, dtype=dtype), torch.ones(n, k, dtype=dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, n_rows)
    onednn, own = _shortest(lambda: _onednn(rows, packed, None), lambda: F.linear(rows, weight))
    return onednn < own


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
