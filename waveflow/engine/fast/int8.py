"""The flow's inverse on a CPU with the matrix products of its networks in 8-bit integers.

In int8 run the coupling networks of a WaveGlow without their first layer (99.9 % of their
multiply-adds) and those of a FrameGlow. The rest is `Flow.decode` itself in float32.

- Weights are rounded to 8 bits with a scale for each output, or to 7 bits on a CPU that sums
  products in 16 bits (`int8_graph.largest_weight`). Inputs are rounded to 8 bits with a fixed
  scale for each channel, which is folded into the weights. These scales come from the largest
  inputs in a float32 synthesis of a calibration mel; larger inputs are clipped later.
- Exact folds: weight norm; `end` times each layer's skip matrix, so that the skip path of C
  channels is gone; a layer's taps and its features side by side, so that it is one product.
- Rows pass in blocks of one size, so that nothing is compiled for a length and memory does not
  grow with it. A network is not causal: each layer keeps the last rows of its input, and its
  result for a row comes as many rows later as the layer looks ahead.

The library is OpenVINO. On a CPU with VNNI (one thread, one network of the published WaveGlow,
2,752 rows, the same scales), times the plain path: OpenVINO 6.8, onnxruntime 5.2 with
MatMulInteger and 1.7 with QDQ. OpenVINO also needs no second package to build a graph. In
blocks and with all the rest of the model, a WaveGlow gains 5.7 times at 1 s and 6.5 at 4 s, a
FrameGlow of 256 bins 1.2 and 1.3.
"""

import copy
import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from waveflow.bijections import Condition, Coupling
from waveflow.context import context_of
from waveflow.engine.contract import each_item
from waveflow.engine.fast.int8_graph import (
    LARGEST,
    Array,
    Node,
    RowBlocks,
    RowGraph,
    largest_weight,
)
from waveflow.errors import ConfigError
from waveflow.flow import Conditioner, Flow, State
from waveflow.models.frameglow import FrameNetwork
from waveflow.nn.frame import GatedStack
from waveflow.nn.wavenet import WaveNet

# Rows of a block: of a WaveGlow, enough for the products to be efficient and few enough for the
# cache; of a FrameGlow, one second at 22,050 Hz and the rows that its networks lag behind.
_GROUP_ROWS = 512
_FRAME_ROWS = 96
# Of the largest channel's peak: what a channel that was silent in calibration may reach.
_SILENT = 1e-3


class Int8Decoder:
    """A flow's inverse with networks in int8, on a CPU: a decoder; `int8_decoder` makes it.

    It holds its own copy of the weights, and the number of torch's threads, as they are when it
    is made: make another when either changes. Threads of a program may share it.
    """

    def __init__(self, flow: Flow) -> None:
        self._flow = flow

    @torch.inference_mode()
    def __call__(
        self,
        z: Tensor,
        mel: Tensor,
        lengths: Tensor | None = None,
        state: State = None,
    ) -> Tensor:
        """Noise z (B, C, L) and mel (B, M, F) to audio (B, C L), as `Flow.decode`.

        `lengths` (B,) are the frames of each padded item; its audio beyond them is zero.
        `state` is the conditioner's.
        """
        return each_item(self._item, self._flow.hop_length, z, mel, lengths, state)

    def _item(self, z: Tensor, mel: Tensor, state: State) -> Tensor:
        return self._flow.decode(z, mel, None, state)


def int8_decoder(flow: Flow, calibration_mel: Tensor) -> Int8Decoder:
    """Calibrates a flow and compiles its networks: some seconds for a WaveGlow of 256 channels.

    Args:
        flow: a WaveGlow, or a FrameGlow with `network="wavenet"`, on the CPU.
        calibration_mel: (M, F) or (B, M, F), speech as loud as any to come; a second is enough.
            Without speech at hand, `speech_like_mel`.

    Raises:
        ConfigError: OpenVINO is not installed, or the flow has no network that runs in int8.

    Example:
        >>> vocoder = waveflow.load()
        >>> decode = int8_decoder(vocoder.flow, vocoder.example_mel())
        >>> decode(vocoder.flow.noise(3, seeds=[0]), torch.zeros(1, 80, 3)).shape
        torch.Size([1, 768])
    """
    if importlib.util.find_spec("openvino") is None:
        raise ConfigError("int8 needs OpenVINO: pip install 'waveflow[int8]'")
    networks = _networks(flow)
    if not networks:
        raise ConfigError(
            "this model has no network that runs in int8: give float32, a WaveGlow, or a "
            "FrameGlow whose network is wavenet"
        )
    if any(parameter.device.type != "cpu" for parameter in flow.parameters()):
        raise ConfigError("int8 runs on the CPU: move the model there first")
    mel = calibration_mel if calibration_mel.dim() == 3 else calibration_mel[None]
    peaks = _input_peaks(flow, networks, mel)
    # deepcopy takes what its memo holds for an object in the place of a copy.
    memo: dict[int, Any] = {id(flow.conditioner): _InRows(copy.deepcopy(flow.conditioner))}
    for network in networks:
        if isinstance(network, WaveNet):
            memo[id(network)] = _Int8WaveNet(network, peaks)
        else:
            memo[id(network)] = _int8_frame_network(network, peaks)
    return Int8Decoder(copy.deepcopy(flow, memo))


def speech_like_mel(n_mels: int, n_frames: int = 64) -> Tensor:
    """A log-magnitude mel (M, F) that sweeps what speech covers, for want of a recording.

    From silence to loud and back, falling towards the upper bands, with harmonics and noise.
    """
    generator = torch.Generator().manual_seed(0)
    frames, bands = torch.arange(n_frames), torch.arange(n_mels)[:, None]
    level = -11.5 + 12.5 * torch.sin(torch.pi * (frames + 0.5) / n_frames) ** 0.5
    tilt = -3.0 * bands / n_mels * torch.sin(2 * torch.pi * frames / 16)
    harmonics = torch.cos(bands * (0.8 + 0.2 * torch.sin(frames / 9)))
    noise = 0.5 * torch.randn(n_mels, n_frames, generator=generator)
    return (level + tilt + harmonics + noise).clamp(min=-11.5)


def _networks(flow: Flow) -> list[WaveNet | FrameNetwork]:
    """The coupling networks that have an int8 form."""
    couplings = [step for step in flow.bijection.modules() if isinstance(step, Coupling)]
    return [
        coupling.network
        for coupling in couplings
        if isinstance(coupling.network, WaveNet)
        or (
            isinstance(coupling.network, FrameNetwork)
            and isinstance(coupling.network.body, GatedStack)
        )
    ]


@torch.inference_mode()
def _input_peaks(flow: Flow, networks: Sequence[nn.Module], mel: Tensor) -> dict[nn.Module, Array]:
    """The largest absolute input (K,) of every layer in a synthesis of a mel (B, M, F)."""
    peaks: dict[nn.Module, Array] = {}

    def observe(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        axes = (0, 2) if isinstance(layer, nn.Conv1d) else (0, 1)
        peaks[layer] = inputs[0].abs().amax(axes).numpy()

    handles = [
        layer.register_forward_pre_hook(observe)
        for network in networks
        for layer in network.modules()
        if isinstance(layer, nn.Conv1d | nn.Linear)
    ]
    try:
        flow.decode(flow.noise(mel.shape[2], range(len(mel))), mel)
    finally:
        for handle in handles:
            handle.remove()
    return peaks


class _InRows(Conditioner):
    """A conditioner whose features lie in memory as the graphs read them, (L, M)."""

    def __init__(self, conditioner: Conditioner) -> None:
        super().__init__()
        self.conditioner = conditioner
        self.context = conditioner.context

    def forward(self, mel: Tensor, mask: Tensor | None = None, state: State = None) -> Condition:
        features, mask = self.conditioner(mel, mask, state)
        return Condition(features.transpose(1, 2).contiguous().transpose(1, 2), mask)


class _Int8WaveNet(nn.Module):
    """A `WaveNet` as a graph, for one item without padding."""

    def __init__(self, network: WaveNet, peaks: dict[nn.Module, Array]) -> None:
        super().__init__()
        width = network.hidden_channels
        steer, end = _weight(network.cond_layer)[:, :, 0], _weight(network.end)[:, :, 0]
        steer_scale = _scale(peaks[network.cond_layer], steer)
        result_bias = _bias(network.end)
        graph = RowGraph(_GROUP_ROWS, int(network.context.left), largest_weight())
        passive, features = graph.input(network.start.in_channels), graph.input(steer.shape[1])
        features = graph.history(graph.quantised(features, steer_scale), int(network.context.left))
        start = graph.affine(passive, _weight(network.start)[:, :, 0], _bias(network.start))
        h, result = graph.valid(start), None
        layers: Iterable[tuple[Any, Any, Array, Array]] = zip(
            network.in_layers,
            network.res_skip_layers,
            np.split(steer, len(network.in_layers)),
            np.split(_bias(network.cond_layer), len(network.in_layers)),
            strict=True,
        )
        for dilated, res_skip, steer_rows, steer_bias in layers:
            taps = np.moveaxis(_weight(dilated), 2, 0)
            scale = _scale(peaks[dilated], np.concatenate(taps))
            inputs, h = graph.taps(h, scale, len(taps), dilated.dilation[0])
            gated = graph.gate(
                graph.join([*inputs, graph.now(features)]),
                np.concatenate([*taps, steer_rows], 1),
                np.concatenate([*[scale] * len(taps), steer_scale]),
                _bias(dilated) + steer_bias,
            )
            out, out_bias = _weight(res_skip)[:, :, 0], _bias(res_skip)
            scale = _scale(peaks[res_skip], out)
            gated = graph.quantised(gated, scale)
            share = graph.product(gated, end @ out[-width:], scale, end @ out_bias[-width:])
            if result is not None:
                share = graph.add(graph.delayed(result, dilated.padding[0]), share)
            result = share
            if len(out) > width:
                residual = graph.product(gated, out[:width], scale, out_bias[:width])
                h = graph.valid(graph.add(residual, h))
        self._run = graph.compiled(graph.add(result, graph.constant(result_bias)))

    def forward(self, x: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._run(x[0].T, features[0].T).T[None]


def _int8_frame_network(network: FrameNetwork, peaks: dict[nn.Module, Array]) -> FrameNetwork:
    """A copy whose body is a graph of all layers, from `enter` to `leave`, for one item."""
    body: Any = network.body
    graph = RowGraph(_FRAME_ROWS, int(context_of(body).left), largest_weight())

    def linear(x: Node, layer: nn.Linear) -> Node:
        scale = _scale(peaks[layer], _weight(layer))
        return graph.product(graph.quantised(x, scale), _weight(layer), scale, _bias(layer))

    h = graph.valid(linear(graph.input(network.enter.in_features), network.enter))
    for layer in body.layers:
        weight, n_taps = _weight(layer.dilated), layer.kernel_size
        tap_peaks = np.split(peaks[layer.dilated], n_taps)
        scale = _scale(np.max(tap_peaks, 0), np.concatenate(np.split(weight, n_taps, 1)))
        inputs, h = graph.taps(h, scale, n_taps, layer.dilation)
        scales = np.concatenate([scale] * n_taps)
        gated = graph.gate(graph.join(inputs), weight, scales, _bias(layer.dilated))
        h = graph.valid(graph.add(linear(gated, layer.out), h))
    run = graph.compiled(linear(graph.normalised(h, network.norm), network.leave))
    memo: dict[int, Any] = {id(body): _Body(run)}
    for layer in (network.enter, network.norm, network.leave):
        memo[id(layer)] = nn.Identity()
    return copy.deepcopy(network, memo)


class _Body(nn.Module):
    """A graph in the place of a stack of layers, for one item (1, L, C) without padding."""

    def __init__(self, run: RowBlocks) -> None:
        super().__init__()
        self._run = run

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._run(x[0])[None]


def _weight(layer: Any) -> Array:
    return layer.weight.detach().numpy()


def _bias(layer: Any) -> Array:
    return layer.bias.detach().numpy()


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
