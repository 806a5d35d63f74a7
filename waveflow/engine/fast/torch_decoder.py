"""The flow's own modules, run faster: half precision, faster products, torch.compile.

It calls `Flow.decode` of a copy of the flow, whose modules have chosen their stand-ins
(`waveflow.decoding`). In float32 on a CPU the linear layers go through `Product`.
"""

import importlib.util
import os
import shutil
import sys
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from waveflow.bijections import Bijection, Condition
from waveflow.engine.fast.packed import DecodingKit
from waveflow.errors import ConfigError
from waveflow.flow import Flow, State

# On a GPU lengths are padded up to a multiple of it at least.
_FEWEST_FRAMES = 64
_CXX = {"darwin": "clang++", "win32": "cl"}


class TorchDecoder:
    """The inverse of any flow, on any device: a decoder.

    It shares the flow's weights and keeps what it derives from them: make another when they
    change.

    Args:
        flow: on the device where it is to run.
        dtype: of the networks' matrix products: float32, bfloat16 or float16. Envelope, pitch,
            phase, lapped transforms, 1x1 convolutions and affine maps stay in float32.
        compile: compile the bijection's inverse (not the conditioner) with torch.compile, at
            the first call. The length is a variable of the compiled code. On a GPU lengths are
            padded up to some sizes, and a CUDA graph is recorded for each. (Not run on a GPU
            yet.)

    Raises:
        ConfigError: compile, where a compiler is missing.

    Example:
        >>> vocoder = waveflow.load()
        >>> decode = TorchDecoder(vocoder.flow, torch.bfloat16)
        >>> decode(vocoder.flow.noise(3, seeds=[0]), torch.full((1, 80, 3), -8.0)).shape
        torch.Size([1, 768])
    """

    def __init__(
        self, flow: Flow, dtype: torch.dtype = torch.float32, compile: bool = False
    ) -> None:
        self._device = device_of(flow)
        self._dtype = dtype
        self._compiled = compile
        kit = DecodingKit(dtype)
        bijection = cast(Bijection, kit.convert(flow.bijection))
        if compile:
            _check_compiler(self._device)
            bijection = _Compiled(bijection, self._device)
        self._flow = cast(Flow, kit.replaced(flow, bijection=bijection))

    @torch.inference_mode()
    def __call__(
        self,
        z: Tensor,
        mel: Tensor,
        lengths: Tensor | None = None,
        state: State = None,
        sigma: float = 1.0,
    ) -> Tensor:
        """Noise z (B, C, L) and mel (B, M, F) to audio (B, channels L), as `Flow.decode`."""
        n_samples = self._flow.channels * z.shape[2]
        if self._compiled:
            if self._device.type == "cuda":
                z, mel, lengths = _padded(z, mel, lengths)
            # Compiled code is for one memory layout: another would be compiled anew.
            z = z.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
        half = None if self._dtype == torch.float32 else self._dtype
        with torch.autocast(self._device.type, half, enabled=half is not None):
            return self._flow.decode(z, mel, lengths, state, sigma)[:, :n_samples]


class _Compiled(Bijection):
    """A bijection whose inverse is compiled."""

    def __init__(self, bijection: Bijection, device: torch.device) -> None:
        super().__init__()
        self.bijection = bijection
        settings = _compile_settings(device)
        self._inverse = torch.compile(bijection.inverse, dynamic=True, **settings)

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        return self._inverse(z, cond)

    def inverse_after(self, past: Tensor, z: Tensor, cond: Condition | None = None) -> Tensor:
        return self.bijection.inverse_after(past, z, cond)


def device_of(flow: Flow) -> torch.device:
    """Where a flow's weights are; the CPU if it has none."""
    return next((p.device for p in flow.parameters()), torch.device("cpu"))


def _padded(z: Tensor, mel: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros up to a size that other lengths share, at most a quarter more from 256 frames on."""
    n_frames = mel.shape[2]
    if lengths is None:
        lengths = torch.full((len(mel),), n_frames, device=mel.device)
    step = max(_FEWEST_FRAMES, 2 ** ((n_frames - 1).bit_length() - 3))
    extra = -n_frames % step
    return F.pad(z, (0, extra * (z.shape[2] // n_frames))), F.pad(mel, (0, extra)), lengths


def _check_compiler(device: torch.device) -> None:
    """Raises ConfigError where torch.compile could not work."""
    compiler = os.environ.get("CXX") or _CXX.get(sys.platform, "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(f"compile needs a C++ compiler: install {compiler}, or name one in CXX")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError("compile needs Triton on a GPU: pip install triton")


def _compile_settings(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        return {"mode": "reduce-overhead"}
    from torch._inductor import list_options

    # From an exponential, tanh takes a fifth of the time and is as good to 1e-7.
    faster = "cpp.use_decompose_tanh"
    return {"options": {faster: True} if faster in list_options() else {}}
