"""The one place that chooses how a flow is run: noise and mel to audio.

    model, device          float32         bfloat16, float16        int8
    WaveGlow on a CPU      rows.py         rows.py (bfloat16)       int8.py
    everything else        torch_decoder   torch_decoder            int8.py (CPU)

`compile` always means torch_decoder's `torch.compile`. The plain path is `flow.decode`; every
other is compared with it in the tests and in `waveflow bench`.
"""

import time
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from waveflow.engine.product import Product
from waveflow.errors import ConfigError
from waveflow.flow import Flow

Precision = Literal["float32", "bfloat16", "float16", "int8"]

# Rows, inner and columns of the products of a WaveGlow's networks.
PROBE_SHAPE = (512, 512, 512)
# Half precision costs some quality: it must be clearly faster to be chosen.
WORTHWHILE = 1.3


class Decoder(Protocol):
    """Noise z (B, C, L) and mel (B, M, F) to audio (B, F hop): the flow's inverse.

    `lengths` (B,) are the frames of each item of a padded batch, `start` (B,) the running phase
    of a harmonic source at the first sample, in cycles (`Flow.decode`).
    """

    def __call__(
        self,
        z: Tensor,
        mel: Tensor,
        lengths: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Tensor: ...


class Choice(NamedTuple):
    """A precision and why it was chosen, in words."""

    precision: Precision
    reason: str


def choose_precision(device: torch.device) -> Choice:
    """Float32 or bfloat16, whichever a probe of some milliseconds finds to pay on this device.

    Measured, never taken from the processor's flags: of two CPUs with avx512_bf16 one ran
    bfloat16 products at half the rate of float32 and the other at four times it.
    """
    gain = _seconds(torch.float32, device) / _seconds(torch.bfloat16, device)
    precision: Precision = "bfloat16" if gain >= WORTHWHILE else "float32"
    return Choice(precision, f"bfloat16 products run at {gain:.2g} times float32's rate here")


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
    device = next(flow.parameters()).device
    on_cpu = device.type == "cpu"
    if precision == "int8":
        if calibration_mel is None:
            raise ConfigError("int8 needs a calibration mel: give speech in the model's convention")
        if not on_cpu or compile:
            raise ConfigError("int8 runs on a CPU and is not compiled: leave --device, --compile")
        from waveflow.engine.int8 import int8_decoder

        return int8_decoder(flow, calibration_mel)
    if precision == "float16" and on_cpu:
        raise ConfigError("float16 is for GPUs: give float32, bfloat16 or int8 on a CPU")
    dtype = getattr(torch, precision)
    from waveflow.engine.rows import RowsWaveGlow

    if on_cpu and not compile and RowsWaveGlow.takes(flow):
        return RowsWaveGlow(flow, dtype)
    from waveflow.engine.torch_decoder import TorchDecoder

    return TorchDecoder(flow, dtype, compile)


def weights_version(flow: Flow) -> tuple[tuple[int, int], ...]:
    """Changes whenever a weight is changed in place, loaded, or moved."""
    return tuple((p.data_ptr(), p._version) for p in flow.parameters())


def _seconds(dtype: torch.dtype, device: torch.device, runs: int = 5) -> float:
    """The shortest of some products, by the decoders' own routine: what disturbs only adds."""
    n_rows, inner, columns = PROBE_SHAPE
    rows = torch.ones(n_rows, inner, dtype=dtype, device=device)
    product = Product(torch.ones(columns, inner, device=device), dtype, n_rows)
    times = []
    for _ in range(1 + runs):
        begin = time.perf_counter()
        product(rows)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times)
