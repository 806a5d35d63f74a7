"""The flow's own modules, run faster: half precision, oneDNN's products, torch.compile.

It computes what `Flow.decode` does, without the log-determinants that no one asks of a decoder.
In float32 on a CPU the linear layers go through `Product`. The pitch head stays as it is in
every precision and is never compiled: the harmonic source's phase is integrated from its F0, and
another rounding there would set the waveform off by 1e-4 after a second, 2e-3 after a minute.
"""

import importlib.util
import os
import shutil
import sys
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from waveflow.bijections import Bijection, Condition, Coupling, InvertibleConv1x1, LappedSqueeze
from waveflow.bijections.base import zero_log_det
from waveflow.engine.fast.packed import PackedLinear, twin_of
from waveflow.errors import ConfigError
from waveflow.flow import Flow, State
from waveflow.nn.pitch import PitchHead

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
        like = next(flow.parameters())
        self._device = like.device
        self._dtype = dtype
        self._compiled = compile
        self._flow = cast(Flow, _for_decoding(flow, dtype, like))
        if compile:
            _check_compiler(self._device)
            self._flow.bijection.inverse = torch.compile(  # type: ignore[method-assign]
                self._flow.bijection.inverse, dynamic=True, **_compile_settings(self._device)
            )

    @torch.inference_mode()
    def __call__(
        self,
        z: Tensor,
        mel: Tensor,
        lengths: Tensor | None = None,
        state: State = None,
    ) -> Tensor:
        """Noise z (B, C, L) and mel (B, M, F) to audio (B, C L), as `Flow.decode`."""
        n_samples = z.shape[1] * z.shape[2]
        if self._compiled:
            if self._device.type == "cuda":
                z, mel, lengths = _padded(z, mel, lengths)
            # Compiled code is for one memory layout: another would be compiled anew.
            z = z.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
        half = None if self._dtype == torch.float32 else self._dtype
        with torch.autocast(self._device.type, half, enabled=half is not None):
            return self._flow.decode(z, mel, lengths, state)[:, :n_samples]


def _for_decoding(module: nn.Module, dtype: torch.dtype, like: Tensor) -> nn.Module:
    """A module for one direction, which shares the weights of the one given.

    `like` is one of them.
    """
    if isinstance(module, PitchHead):
        return module
    if is_parametrized(module):
        return _folded(module)
    if isinstance(module, InvertibleConv1x1):
        return _Unmix(module)
    if isinstance(module, LappedSqueeze):
        return _Lapped(module, like)
    if type(module) is nn.Linear and dtype == torch.float32:
        return PackedLinear(module.weight, module.bias)
    twin = twin_of(module, lambda child: _for_decoding(child, dtype, like))
    if isinstance(twin, Coupling):
        return _Decoupling(twin.network, twin.map, twin.split)
    return twin


@torch.no_grad()
def _folded(module: nn.Module) -> nn.Module:
    """A convolution with weight norm as one without."""
    assert isinstance(module, nn.Conv1d)
    folded = nn.utils.skip_init(
        nn.Conv1d,
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        padding=module.padding,
        dilation=module.dilation,
        device=module.weight.device,
        dtype=module.weight.dtype,
    )
    folded.weight, folded.bias = nn.Parameter(module.weight.detach()), module.bias
    return folded


class _Unmix(Bijection):
    """The inverse of an invertible 1x1 convolution."""

    @torch.no_grad()
    def __init__(self, conv: InvertibleConv1x1) -> None:
        super().__init__()
        self.linear = PackedLinear(conv.inverted())

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        return self.linear(z.transpose(1, 2)).transpose(1, 2), zero_log_det(z)


class _Lapped(LappedSqueeze):
    """A lapped transform that holds its tables."""

    def __init__(self, lapped: LappedSqueeze, like: Tensor) -> None:
        super().__init__(lapped.n, lapped.quadrature)
        self.to(like)
        self.linear = PackedLinear(lapped.exact("matrix", like))

    def transform(self, blocks: Tensor) -> Tensor:
        return self.linear(blocks)


class _Decoupling(Coupling):
    """A coupling whose inverse leaves the log-determinant out."""

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        passive, active = self.split.split(z)
        active, _ = self.map.inverse(active, self._params(passive, active, cond))
        return self.split.merge(passive, active), zero_log_det(z)


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
