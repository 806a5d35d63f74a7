"""Graphs of the networks' layers in int8, on blocks of (L, C) rows, run by OpenVINO."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from waveflow.decoding import NotInIntegers, declaration, is_exactly

Array = NDArray[np.float32]
Node = Any  # of OpenVINO, which is imported where a graph is built

# Inputs are integers from -LARGEST to LARGEST, so that zero is one of them.
LARGEST = 127
# Weights are too, or go to half of it where 8 bits of both are too many (`largest_weight`).
WEIGHT_8_BITS, WEIGHT_7_BITS = 127, 63
# Of the largest channel's peak: what a channel that was silent in calibration may reach.
_SILENT = 1e-3


class Rows(NamedTuple):
    """A signal (L, C) in a graph.

    Attributes:
        node: of OpenVINO.
        lag: rows by which it is later than the graph's inputs.
        scale: (C,), the steps of integers; None for float32.
    """

    node: Node
    lag: int
    scale: Array | None = None


@cache
def _core() -> Any:
    """OpenVINO's runtime, one for the life of the process.

    Its CPU plug-in gives the thread that loads it another signal stack, and frees that stack when
    the last model goes. If another thread lets the last model go, the next signal crashes the
    process. A runtime that stays keeps the plug-in, and so the stack.
    """
    import openvino

    core = openvino.Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")  # loads the plug-in
    return core


class RowBlocks:
    """A compiled graph, run block by block over (L, C) rows; it keeps nothing between calls."""

    def __init__(self, compiled: Any, n_rows: int, lag: int) -> None:
        self._compiled = compiled
        self._n_rows = n_rows
        self._lag = lag

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Inputs (L, C) each to (L, N)."""
        request = self._compiled.create_infer_request()
        valid = inputs[0].new_ones(len(inputs[0]), 1)
        blocks = []
        for begin in range(0, len(valid) + self._lag, self._n_rows):
            parts = [self._block(x, begin) for x in (valid, *inputs)]
            blocks.append(torch.from_numpy(request.infer(parts, share_inputs=True)[0]))
        return torch.cat(blocks)[self._lag :][: len(valid)]

    def _block(self, x: Tensor, begin: int) -> Array:
        part = x[begin : begin + self._n_rows]
        return functional.pad(part, (0, 0, 0, self._n_rows - len(part))).contiguous().numpy()


class RowGraph:
    """The operations of the networks (`waveflow.decoding.IntegerGraph`) as an OpenVINO graph.

    Rows pass in blocks of one size, and a graph keeps the last rows of a signal from block to
    block where a layer looks back at them.

    Args:
        n_rows: of a block.
        reach: rows on each side that the whole graph looks at, and by which its result is late.
        largest_weight: weights are rounded to integers from minus this to this.
        peak: gives the largest absolute inputs (K,) of a layer.
    """

    def __init__(
        self,
        n_rows: int,
        reach: int,
        largest_weight: int,
        peak: Callable[[nn.Module], Array] | None = None,
    ) -> None:
        import openvino
        from openvino import opset15

        self._openvino, self._op = openvino, opset15
        self._n_rows, self._reach, self._largest_weight = n_rows, reach, largest_weight
        self._peak = peak
        self._inputs: list[Node] = []
        self._kept: list[Node] = []
        # A signal behind the rows before it, and how many these are, by the signal's name.
        self._histories: dict[str, tuple[Node, int]] = {}
        self._valid = self.input(1)

    def input(self, n_channels: int) -> Rows:
        node = self._op.parameter([self._n_rows, n_channels], self._openvino.Type.f32)
        self._inputs.append(node)
        return Rows(node, 0)

    def valid(self, x: Rows) -> Rows:
        return Rows(self._op.multiply(x.node, self._late(self._valid, x.lag)), x.lag)

    def affine(self, x: Rows, weight: Tensor, bias: Tensor) -> Rows:
        product = self._op.matmul(x.node, self._constant(weight), False, True)
        return Rows(self._op.add(product, self._constant(bias)), x.lag)

    def apply(self, module: nn.Module, x: Rows) -> Rows:
        layer: Any = module
        has_bias = getattr(layer, "bias", None) is not None
        if has_bias and is_exactly(layer, nn.Linear):
            integers = self.integers(x, layer, layer.weight)
            return self.product(integers, layer.weight, layer.bias)
        if has_bias and is_exactly(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1:
            return self._normalised(x, layer)
        describe = declaration(module, "in_integers")
        if describe is None:
            raise NotInIntegers
        return describe(self, x)

    def integers(self, x: Rows, layer: nn.Module, weight: Tensor) -> Rows:
        assert self._peak is not None
        return self._quantised(x, _scale(self._peak(layer), _array(weight)))

    def taps(self, x: Rows, layer: nn.Module, weights: Sequence[Tensor], dilation: int) -> Rows:
        assert self._peak is not None
        n_taps, n_channels = len(weights), weights[0].shape[1]
        # A layer that takes the taps side by side has peaks for each tap.
        peaks = self._peak(layer).reshape(-1, n_channels).max(0)
        scale = _scale(peaks, _array(torch.cat(list(weights))))
        reach = dilation * (n_taps // 2)
        history = self._history(x.node, 2 * reach)
        quantised = self._quantised(Rows(history[0], x.lag), scale).node
        first = history[1] - 2 * reach
        taps = [self._cut(quantised, first + k * dilation) for k in range(n_taps)]
        return Rows(self._op.concat(taps, 1), x.lag + reach, np.tile(scale, n_taps))

    def join(self, *parts: Rows) -> Rows:
        lag = max(part.lag for part in parts)
        nodes = [self._late(part, lag) for part in parts]
        scales = [part.scale for part in parts if part.scale is not None]
        return Rows(self._op.concat(nodes, 1), lag, np.concatenate(scales))

    def product(self, x: Rows, weight: Tensor, bias: Tensor) -> Rows:
        assert x.scale is not None
        # OpenVINO recognises the product of integers by one step for all of x.
        step = x.scale.max()
        rows = _array(weight) * (x.scale / step)
        row_steps = np.abs(rows).max(1, keepdims=True) / self._largest_weight
        row_steps = np.where(row_steps > 0, row_steps, 1)
        integers = self._op.constant(np.round(rows / row_steps).astype(np.int8))
        right = self._op.multiply(self._op.convert(integers, "f32"), self._constant(row_steps))
        left = self._op.multiply(self._op.convert(x.node, "f32"), self._constant(step))
        product = self._op.matmul(left, right, False, True)
        return Rows(self._op.add(product, self._constant(bias)), x.lag)

    def gate(self, x: Rows, weight: Tensor, bias: Tensor) -> Rows:
        # Two products: OpenVINO applies each function where it computes the product.
        (signal, gate), (signal_bias, gate_bias) = weight.chunk(2), bias.chunk(2)
        a = self._op.tanh(self.product(x, signal, signal_bias).node)
        b = self._op.sigmoid(self.product(x, gate, gate_bias).node)
        return Rows(self._op.multiply(a, b), x.lag)

    def add(self, first: Rows, second: Rows) -> Rows:
        lag = max(first.lag, second.lag)
        return Rows(self._op.add(self._late(first, lag), self._late(second, lag)), lag)

    def compiled(self, result: Rows) -> RowBlocks:
        """The graph's function, on as many threads as torch has."""
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
            "NUM_STREAMS": "1",
        }
        results = [self._op.result(result.node)]
        model = self._openvino.Model(results, self._kept, self._inputs, "int8")
        compiled = _core().compile_model(model, "CPU", settings)
        return RowBlocks(compiled, self._n_rows, result.lag)

    def _normalised(self, x: Rows, layer: nn.LayerNorm) -> Rows:
        axis = self._op.constant(np.array([1]))
        node = self._op.mvn(x.node, axis, True, layer.eps, "inside_sqrt")
        node = self._op.multiply(node, self._constant(layer.weight))
        return Rows(self._op.add(node, self._constant(layer.bias)), x.lag)

    def _quantised(self, x: Rows, scale: Array) -> Rows:
        """x in integer steps of `scale` (K,)."""
        limit = LARGEST * scale[None]
        ends = [self._constant(end) for end in (-limit, limit, -LARGEST, LARGEST)]
        rounded = self._op.fake_quantize(x.node, *ends, 2 * LARGEST + 1)
        return Rows(self._op.convert(rounded, "i8"), x.lag, scale)

    def _late(self, x: Rows, lag: int) -> Node:
        """x as late as `lag`."""
        if lag == x.lag:
            return x.node
        # Signals as early as the inputs meet the results of many layers: one history for all.
        most = self._reach if x.lag == 0 else 0
        joined, n = self._history(x.node, lag - x.lag, most)
        return self._cut(joined, n - (lag - x.lag))

    def _history(self, x: Node, n: int, most: int = 0) -> tuple[Node, int]:
        """x (L, C) behind n or more rows before it, zeros at the first block; and how many.

        `most` are the rows that will be asked for.
        """
        known = self._histories.get(x.get_friendly_name())
        if known is not None and known[1] >= n:
            return known
        if n == 0:
            return x, 0
        n = max(n, most)
        dtype, n_channels = x.get_output_element_type(0), x.get_output_shape(0)[1]
        zeros = self._op.constant(np.zeros((n, n_channels)), dtype)
        name = f"history {len(self._kept)}"
        before = self._op.read_value(zeros, name, dtype, self._openvino.PartialShape(zeros.shape))
        joined = self._op.concat([before, x], 0)
        self._kept.append(self._op.assign(self._cut(joined, self._n_rows, n), name))
        self._histories[x.get_friendly_name()] = joined, n
        return joined, n

    def _cut(self, x: Node, begin: int, n: int | None = None) -> Node:
        """`n` rows, by default a block, from `begin` on."""
        end = begin + (self._n_rows if n is None else n)
        return self._op.slice(x, *(self._op.constant(np.array([i])) for i in (begin, end, 1, 0)))

    def _constant(self, values: Any) -> Node:
        return self._op.constant(_array(values))


@cache
def largest_weight() -> int:
    """The largest integer of a weight whose products this CPU sums without loss.

    CPUs without VNNI add products of 8-bit integers in pairs, in 16 bits: two products of an
    input shifted to 0 .. 255 with a weight of 127 are more than 16 bits hold, two with a weight
    of 63 are not. A product of the largest integers, run once in a process (50 ms), says what
    OpenVINO does here. A list of CPU features would not: environment variables such as
    ONEDNN_MAX_CPU_ISA change what OpenVINO takes, and other CPUs have other instructions.
    """
    n = 64
    graph = RowGraph(n, 0, WEIGHT_8_BITS, lambda _: np.ones(n, np.float32))
    layer = nn.Linear(n, 2 * n)
    nn.init.ones_(layer.weight[:n])
    nn.init.constant_(layer.weight[n:], -1)
    nn.init.zeros_(layer.bias)
    run = graph.compiled(graph.apply(layer, graph.input(n)))
    with torch.no_grad():
        exact = all(
            torch.allclose(run(rows), layer(rows), rtol=1e-3)
            for rows in (torch.ones(n, n), -torch.ones(n, n))
        )
    return WEIGHT_8_BITS if exact else WEIGHT_7_BITS


def _array(values: Any) -> Array:
    if isinstance(values, Tensor):
        values = values.detach().numpy()
    return np.asarray(values, np.float32)


def _scale(peaks: Array, weight: Array) -> Array:
    """The steps (K,) of 8-bit inputs whose largest values are `peaks` (K,), for a weight (N, K).

    A channel's range is shared between input and weight, by their square roots (SmoothQuant,
    Xiao et al. 2023, equation 4 with alpha 1/2).
    """
    peaks = np.maximum(peaks, _SILENT * peaks.max())
    columns = np.abs(weight).max(0)
    columns = np.maximum(columns, _SILENT * columns.max())
    balance = np.sqrt(np.divide(peaks, columns, where=columns > 0, out=np.ones_like(peaks)))
    return balance * np.divide(peaks, balance, where=balance > 0, out=peaks).max() / LARGEST
