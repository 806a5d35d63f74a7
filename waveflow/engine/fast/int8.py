"""The flow's inverse on a CPU with the matrix products of its networks in 8-bit integers.

A network says itself how it runs in integers (`waveflow.decoding.IntegerKit`). Of a WaveGlow's
network all but the first layer does (99.9 % of its multiply-adds), of a FrameGlow's all layers
do. Everything else runs in float32.

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
FrameGlow of 256 bins 1.2 and 1.3. On a CPU without VNNI it gains nothing over float32
(`engine.decoder.choose_decoder` measures that).
"""

import importlib.util
import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from waveflow.bijections import Condition
from waveflow.context import Context
from waveflow.decoding import NotInIntegers, declaration
from waveflow.engine.contract import each_item
from waveflow.engine.fast.int8_graph import Array, RowGraph, largest_weight
from waveflow.engine.fast.packed import DecodingKit
from waveflow.errors import ConfigError
from waveflow.flow import Conditioner, Flow, State


class Int8Decoder:
    """A decoder: a flow's inverse with networks in int8, on a CPU; `int8_decoder` makes it.

    It keeps its own copy of the weights and the number of torch's threads: make another when
    either changes. Threads may share it.
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
        sigma: float = 1.0,
    ) -> Tensor:
        """Noise z (B, C, L) and mel (B, M, F) to audio (B, C L), as `Flow.decode`."""

        def item(z: Tensor, mel: Tensor, state: State) -> Tensor:
            return self._flow.decode(z, mel, None, state, sigma)

        return each_item(item, self._flow.hop_length, z, mel, lengths, state)


def int8_decoder(flow: Flow, calibration_mel: Tensor) -> Int8Decoder:
    """Calibrates a flow and compiles its networks: some seconds for a WaveGlow of 256 channels.

    Args:
        flow: with networks that run in int8, on the CPU.
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
    if any(parameter.device.type != "cpu" for parameter in flow.parameters()):
        raise ConfigError("int8 runs on the CPU: move the model there first")
    mel = calibration_mel if calibration_mel.dim() == 3 else calibration_mel[None]
    kit = Int8Kit(_input_peaks(flow, mel))
    conditioner = _InRows(cast(Conditioner, kit.convert(flow.conditioner)))
    converted = cast(Flow, kit.replaced(flow, conditioner=conditioner))
    if not kit.n_networks:
        raise ConfigError(
            "this model has no network that runs in int8: give float32, a WaveGlow, or a "
            "FrameGlow whose network is wavenet"
        )
    return Int8Decoder(converted)


def speech_like_mel(n_mels: int, n_frames: int = 64) -> Tensor:
    """A log-magnitude mel (M, F) with the levels of speech, where there is no recording.

    It goes from silence to loud and back, falls towards the upper bands, and has harmonics and
    noise.
    """
    generator = torch.Generator().manual_seed(0)
    frames, bands = torch.arange(n_frames), torch.arange(n_mels)[:, None]
    level = -11.5 + 12.5 * torch.sin(torch.pi * (frames + 0.5) / n_frames) ** 0.5
    tilt = -3.0 * bands / n_mels * torch.sin(2 * torch.pi * frames / 16)
    harmonics = torch.cos(bands * (0.8 + 0.2 * torch.sin(frames / 9)))
    noise = 0.5 * torch.randn(n_mels, n_frames, generator=generator, dtype=torch.float32)
    return (level + tilt + harmonics + noise).clamp(min=-11.5)


class Int8Kit(DecodingKit):
    """Makes the stand-ins of networks in integers (`waveflow.decoding.IntegerKit`).

    Args:
        peaks: of the layers' inputs, as `_input_peaks` finds them.

    Attributes:
        n_networks: networks that were converted to integers.
    """

    def __init__(self, peaks: dict[nn.Module, tuple[Tensor, ...]]) -> None:
        super().__init__()
        self._peaks = peaks
        self.n_networks = 0

    def graph(self, n_rows: int, context: Context, channel_axis: int) -> RowGraph:
        if math.inf in context:
            raise NotInIntegers

        def peak(layer: nn.Module) -> Array:
            if layer not in self._peaks:
                raise NotInIntegers  # The calibration has not passed through it.
            return self._peaks[layer][channel_axis - 1].numpy()

        return RowGraph(n_rows, int(max(context)), largest_weight(), peak)

    def _stand_in(self, module: nn.Module) -> nn.Module:
        choose = declaration(module, "for_integers")
        if choose is not None:
            try:
                stand_in = choose(self)
                self.n_networks += 1
                return stand_in
            except NotInIntegers:
                pass
        return super()._stand_in(module)


@torch.inference_mode()
def _input_peaks(flow: Flow, mel: Tensor) -> dict[nn.Module, tuple[Tensor, ...]]:
    """The largest absolute inputs of each layer of the networks in a synthesis of a mel (B, M, F).

    For each layer two vectors: one value for each index of the input's axis 1, and of its axis 2.
    """
    peaks: dict[nn.Module, tuple[Tensor, ...]] = {}

    def observe(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not inputs or not isinstance(inputs[0], Tensor) or inputs[0].dim() != 3:
            return
        largest = inputs[0].abs().amax(0)
        found = largest.amax(1), largest.amax(0)
        # A layer that is used more than once sees as many channels each time.
        peaks[layer] = tuple(
            new.maximum(old) if new.shape == old.shape else new
            for new, old in zip(found, peaks.get(layer, found), strict=True)
        )

    networks = [m for m in flow.modules() if declaration(m, "for_integers") is not None]
    layers = {layer for network in networks for layer in network.modules()}
    handles = [layer.register_forward_pre_hook(observe) for layer in layers]
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

    def forward(self, mel: Tensor, mask: Tensor | None = None, state: State = None) -> Condition:
        return self.conditioner(mel, mask, state)

    def tempered(
        self, z: Tensor, cond: Condition, sigma: float | Tensor
    ) -> tuple[Tensor, Condition]:
        # Here and not in `forward`: a conditioner may make features anew for its sigma.
        z, (features, mask) = self.conditioner.tempered(z, cond, sigma)
        return z, Condition(features.transpose(1, 2).contiguous().transpose(1, 2), mask)
