"""Upsample: mel frames to audio samples."""

from typing import Any

from torch import Tensor, nn

from waveflow.context import Context
from waveflow.decoding import is_exactly


class Upsample(nn.Module):
    """Transposed convolution from mel rate to audio rate (WaveGlow, section 2.1).

    Frame f reaches samples f stride .. f stride + kernel_size - 1, so a sample depends on its own
    frame and earlier ones (`context`, in frames). Samples after the last frame's hop are cut off.

    Args:
        channels: M, bands in and out.
        kernel_size: taps, at least `stride`.
        stride: samples for each frame.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.context = Context((kernel_size - 1) // stride, 0)
        self.convolution = nn.ConvTranspose1d(channels, channels, kernel_size, stride)

    def forward(self, mel: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mel (B, M, F), valid where mask (B, 1, F) is 1, to (B, M, F stride)."""
        if mask is not None:
            # Selected, not multiplied: padding may hold NaN.
            mel = mel.masked_fill(mask == 0, 0.0)
        return self.convolution(mel)[..., : mel.shape[2] * self.stride]

    def is_plain(self) -> bool:
        """Whether its convolution is of the kind that `__init__` makes."""
        layer: Any = self.convolution
        if not is_exactly(layer, nn.ConvTranspose1d) or layer.bias is None:
            return False
        settings = layer.stride, layer.padding, layer.output_padding, layer.dilation, layer.groups
        return settings == ((self.stride,), (0,), (0,), (1,), 1)
