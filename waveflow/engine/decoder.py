"""Chooses the decoder of a flow: what runs it from noise and mel to audio.

    flow, device              float32         bfloat16, float16        int8
    has `rows`, on a CPU      rows.py         rows.py (bfloat16)       int8.py
    any other                 torch_decoder   torch_decoder            int8.py (CPU)

A WaveGlow has `rows`. `compile` always takes torch_decoder. The plain path is `flow.decode`; all
others are compared with it in the tests and in `benchmarks/`.
"""

import time
from collections.abc import Iterator
from operator import is_
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from waveflow.engine.contract import Decoder
from waveflow.engine.fast.int8 import int8_decoder
from waveflow.engine.fast.int8_graph import WEIGHT_8_BITS, largest_weight
from waveflow.engine.fast.rows import RowsWaveGlow, rows_of
from waveflow.engine.fast.torch_decoder import TorchDecoder, device_of
from waveflow.errors import ConfigError
from waveflow.flow import Flow

Precision = Literal["float32", "bfloat16", "float16", "int8"]

# What is decoded to choose a precision: a tenth of a second at the usual hop for half precision,
# some blocks of rows for int8.
PROBE_FRAMES = {"bfloat16": 8, "int8": 64}
PROBE_RUNS = 3
# How many times as fast as float32 a lower precision must be, because it costs some quality. One
# that nobody asked for by name must be clearly faster. bfloat16 by name is left only where a CPU
# emulates it (0.6 and less): so short a probe is a fifth too low for it.
WORTHWHILE = {"auto": 1.3, "bfloat16": 0.7, "int8": 1.0}


class Choice(NamedTuple):
    """The decoder that was chosen, its precision, and why, in words."""

    decoder: Decoder
    precision: Precision
    reason: str


def choose_decoder(
    flow: Flow,
    mel: Tensor,
    wish: Literal["auto", "bfloat16", "int8"] = "auto",
    compile: bool = False,
) -> Choice:
    """The decoder in a lower precision, where a short probe finds that it pays, or in float32.

    Measured, never taken from the processor's flags: of two CPUs with avx512_bf16 one ran
    bfloat16 products at half the rate of float32 and the other at four times it. And with the
    decoders themselves, because a small network gains less than its products. int8 is measured
    only where the CPU's sums of 8-bit products overflow.

    Args:
        mel: (M, F), speech in the model's convention: to decode, and for int8's scales.
        wish: the lower precision; "auto" for bfloat16 if it is much faster.

    Raises:
        ConfigError: as `make_decoder`.
    """
    device = device_of(flow)
    lower: Literal["bfloat16", "int8"] = "bfloat16" if wish == "auto" else wish
    if wish == "bfloat16" and (compile or device.type != "cpu"):
        # Half precision is there for GPUs, and a compiled decoder would be compiled twice.
        return Choice(make_decoder(flow, wish, compile), wish, "asked for by name")
    probe = mel[None, :, : PROBE_FRAMES[lower]].to(device)
    noise = flow.noise(probe.shape[2], [0]).to(device)
    full = make_decoder(flow, "float32", compile)
    try:
        decoder = make_decoder(flow, lower, compile, mel)
        if lower == "int8" and largest_weight() == WEIGHT_8_BITS:
            return Choice(decoder, lower, "this CPU sums products of 8-bit integers")
        gain = _seconds(full, noise, probe) / _seconds(decoder, noise, probe)
    except RuntimeError as error:
        return Choice(full, "float32", f"{lower} fails here: {str(error).splitlines()[0]}")
    reason = f"{lower} runs this model at {gain:.2g} times float32's speed here"
    if gain >= WORTHWHILE[wish]:
        return Choice(decoder, lower, reason)
    return Choice(full, "float32", reason)


def make_decoder(
    flow: Flow,
    precision: Precision = "float32",
    compile: bool = False,
    calibration_mel: Tensor | None = None,
) -> Decoder:
    """The fastest decoder of a flow in a precision, on the device where its weights are.

    It keeps what it derives from the weights: make another one when they change.

    Args:
        flow: in evaluation mode.
        precision: of the networks' matrix products.
        compile: torch.compile; the first call then takes half a minute.
        calibration_mel: (M, F), real speech in the model's convention, for int8's scales.

    Raises:
        ConfigError: a precision that this device or installation does not have.
    """
    device = device_of(flow)
    on_cpu = device.type == "cpu"
    if precision == "int8":
        if calibration_mel is None:
            raise ConfigError("int8 needs a calibration mel: give speech in the model's convention")
        if not on_cpu or compile:
            raise ConfigError("int8 runs on a CPU and is not compiled: leave --device, --compile")
        return int8_decoder(flow, calibration_mel)
    if precision == "float16" and on_cpu:
        raise ConfigError("float16 is for GPUs: give float32, bfloat16 or int8 on a CPU")
    dtype = getattr(torch, precision)
    rows = rows_of(flow) if on_cpu and not compile else None
    if rows is not None:
        return RowsWaveGlow(rows, dtype)
    return TorchDecoder(flow, dtype, compile)


class WeightsVersion:
    """The modules, parameters and buffers of a flow at a moment; two are equal if nothing changed.

    A change is a module or tensor that was replaced, moved, loaded or changed in place. Not seen
    are changes in place through `.data`, changes of tensors made in inference mode (torch does not
    count these), and attributes that are neither modules nor tensors.
    """

    def __init__(self, flow: Flow) -> None:
        modules = list(_modules(flow))
        tensors = [
            tensor
            for module in modules
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        ]
        # The objects themselves, because an id may be given again.
        self._objects = [*modules, *tensors]
        self._counts = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, WeightsVersion)
            and self._counts == other._counts
            and len(self._objects) == len(other._objects)
            and all(map(is_, self._objects, other._objects))
        )


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all in it, as often as they are used."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _modules(child)


def _seconds(decoder: Decoder, noise: Tensor, mel: Tensor) -> float:
    """The shortest of some runs: what disturbs only adds."""
    times = []
    for _ in range(1 + PROBE_RUNS):
        begin = time.perf_counter()
        decoder(noise, mel).cpu()  # copied, or an accelerator would still be at work
        times.append(time.perf_counter() - begin)
    return min(times)
