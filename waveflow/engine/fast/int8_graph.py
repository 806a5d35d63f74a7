"""Graphs of the networks' layers in int8, on blocks of (L, C) rows, run by OpenVINO."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

Array = NDArray[np.float32]
Node = Any  # of OpenVINO, which is imported where a graph is built

# Inputs are integers from -LARGEST to LARGEST, so that zero is one of them.
LARGEST = 127
# Weights are too, or go to half of it where 8 bits of both are too many (`largest_weight`).
WEIGHT_8_BITS, WEIGHT_7_BITS = 127, 63


class RowBlocks:
    """A compiled graph, run block by block over (L, C) rows; it keeps nothing between calls."""

    def __init__(self, compiled: Any, n_rows: int, reach: int) -> None:
        self._compiled = compiled
        self._n_rows = n_rows
        self._reach = reach

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Inputs (L, C) each to (L, N)."""
        request = self._compiled.create_infer_request()
        valid = inputs[0].new_ones(len(inputs[0]), 1)
        blocks = []
        for begin in range(0, len(valid) + self._reach, self._n_rows):
            parts = [self._block(x, begin) for x in (valid, *inputs)]
            blocks.append(torch.from_numpy(request.infer(parts, share_inputs=True)[0]))
        return torch.cat(blocks)[self._reach :][: len(valid)]

    def _block(self, x: Tensor, begin: int) -> Array:
        part = x[begin : begin + self._n_rows]
        return functional.pad(part, (0, 0, 0, self._n_rows - len(part))).contiguous().numpy()


class RowGraph:
    """The operations of the networks, as an OpenVINO graph on a block of (L, C) rows.

    Args:
        n_rows: of a block.
        reach: rows on each side that the whole graph looks at, and by which its result lags.
        largest_weight: weights are rounded to integers from minus this to this.
    """

    def __init__(self, n_rows: int, reach: int, largest_weight: int) -> None:
        import openvino
        from openvino import opset15

        self._openvino, self._op = openvino, opset15
        self._largest_weight = largest_weight
        self._n_rows, self._reach, self._lag = n_rows, reach, 0
        self._inputs: list[Node] = []
        self._kept: list[Node] = []
        self._valid = self.history(self.input(1), reach)

    def input(self, n_channels: int) -> Node:
        """Another input (L, n_channels) of the graph."""
        node = self._op.parameter([self._n_rows, n_channels], self._openvino.Type.f32)
        self._inputs.append(node)
        return node

    def constant(self, values: Any) -> Node:
        return self._op.constant(np.asarray(values, np.float32))

    def add(self, first: Node, second: Node) -> Node:
        return self._op.add(first, second)

    def join(self, parts: Sequence[Node]) -> Node:
        """Channels side by side."""
        return self._op.concat(list(parts), 1)

    def affine(self, x: Node, weight: Array, bias: Array) -> Node:
        """In float32."""
        product = self._op.matmul(x, self.constant(weight), False, True)
        return self.add(product, self.constant(bias))

    def normalised(self, x: Node, layer: nn.LayerNorm) -> Node:
        axis = self._op.constant(np.array([1]))
        x = self._op.mvn(x, axis, True, layer.eps, "inside_sqrt")
        return self.add(
            self._op.multiply(x, self.constant(layer.weight.detach().numpy())),
            self.constant(layer.bias.detach().numpy()),
        )

    def quantised(self, x: Node, scale: Array) -> Node:
        """x in steps of `scale` (K,), as int8."""
        limit = LARGEST * scale[None]
        ends = [self.constant(end) for end in (-limit, limit, -LARGEST, LARGEST)]
        return self._op.convert(self._op.fake_quantize(x, *ends, 2 * LARGEST + 1), "i8")

    def product(self, x: Node, weight: Array, scale: Array, bias: Array) -> Node:
        """x (L, K) int8, in steps of `scale` (K,), times weight (N, K) in integers."""
        # OpenVINO recognises the product of integers by one step for all of x.
        step = scale.max()
        weight = weight * (scale / step)
        row_steps = np.abs(weight).max(1, keepdims=True) / self._largest_weight
        row_steps = np.where(row_steps > 0, row_steps, 1)
        integers = self._op.constant(np.round(weight / row_steps).astype(np.int8))
        rows = self._op.multiply(self._op.convert(integers, "f32"), self.constant(row_steps))
        x = self._op.multiply(self._op.convert(x, "f32"), self.constant(step))
        return self.add(self._op.matmul(x, rows, False, True), self.constant(bias))

    def gate(self, x: Node, weight: Array, scale: Array, bias: Array) -> Node:
        """tanh(a) sigmoid(b) of a product's halves, each applied where it is computed."""
        (signal, gate), (signal_bias, gate_bias) = np.split(weight, 2), np.split(bias, 2)
        return self._op.multiply(
            self._op.tanh(self.product(x, signal, scale, signal_bias)),
            self._op.sigmoid(self.product(x, gate, scale, gate_bias)),
        )

    def history(self, x: Node, n: int) -> Node:
        """x (L, C) behind the n rows before it, which are zeros at the first block."""
        if n == 0:
            return x
        dtype, n_channels = x.get_output_element_type(0), x.get_output_shape(0)[1]
        zeros = self._op.constant(np.zeros((n, n_channels)), dtype)
        name = f"history {len(self._kept)}"
        before = self._op.read_value(zeros, name, dtype, self._openvino.PartialShape(zeros.shape))
        joined = self._op.concat([before, x], 0)
        self._kept.append(self._op.assign(self._rows(joined, self._n_rows, n), name))
        return joined

    def delayed(self, x: Node, n: int) -> Node:
        """x as it was n rows ago."""
        return self._rows(self.history(x, n), 0, self._n_rows)

    def now(self, history: Node) -> Node:
        """The rows of a `history` over the graph's whole reach that the current layer is at."""
        return self._rows(history, self._reach - self._lag, self._n_rows)

    def valid(self, x: Node) -> Node:
        """x with zeros outside the signal, as a convolution's padding has them."""
        return self._op.multiply(x, self.now(self._valid))

    def taps(self, x: Node, scale: Array, n_taps: int, dilation: int) -> tuple[list[Node], Node]:
        """A dilated convolution's inputs (L, C) in int8, and x as late as they are."""
        reach = dilation * (n_taps // 2)
        history = self.history(x, 2 * reach)
        quantised = self.quantised(history, scale)
        taps = [self._rows(quantised, k * dilation, self._n_rows) for k in range(n_taps)]
        self._lag += reach
        return taps, self._rows(history, reach, self._n_rows)

    def compiled(self, result: Node) -> RowBlocks:
        """The graph that gives `result` (L, N), on as many threads as torch has."""
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
            "NUM_STREAMS": "1",
        }
        model = self._openvino.Model([self._op.result(result)], self._kept, self._inputs, "int8")
        compiled = self._openvino.Core().compile_model(model, "CPU", settings)
        return RowBlocks(compiled, self._n_rows, self._reach)

    def _rows(self, x: Node, begin: int, n: int) -> Node:
        ends = (self._op.constant(np.array([i])) for i in (begin, begin + n, 1, 0))
        return self._op.slice(x, *ends)


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
    graph = RowGraph(n, 0, WEIGHT_8_BITS)
    scale = np.full(n, 1 / LARGEST, np.float32)
    ones = np.ones((n, n), np.float32)
    weight = np.concatenate([ones, -ones])
    x = graph.quantised(graph.input(n), scale)
    run = graph.compiled(graph.product(x, weight, scale, np.zeros(2 * n, np.float32)))
    exact = all(
        torch.allclose(run(rows), rows @ torch.from_numpy(weight).T, rtol=1e-3)
        for rows in (torch.ones(n, n), -torch.ones(n, n))
    )
    return WEIGHT_8_BITS if exact else WEIGHT_7_BITS
