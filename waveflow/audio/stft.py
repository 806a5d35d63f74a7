"""Short-time Fourier transform and its inverse, for both ways in which mels are framed.

"center" pads n_fft / 2 at each side, so that frame f is centred on sample f * hop: F = 1 + T // hop
(Tacotron 2, librosa). "hop" pads (n_fft - hop) / 2, so that frame f is centred on the middle of hop
f: F = T // hop (HiFi-GAN). torch.istft refuses the second, so the overlap-add is here.
"""

import torch
from torch import Tensor
from torch.nn import functional

from waveflow.audio.filters import hann_values
from waveflow.audio.mel_config import Padding, PadMode, edge_padding


def hann_window(
    win_length: int,
    n_fft: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Periodic Hann window of `win_length` in the middle of a frame of `n_fft` samples."""
    return torch.from_numpy(hann_values(win_length, n_fft)).to(dtype).to(device)


def pad_edges(audio: Tensor, amount: int, pad_mode: PadMode) -> Tensor:
    """Pads `amount` samples at each side of (B, T); with zeros where T is too short to reflect."""
    reflects = pad_mode == "reflect" and audio.shape[-1] > amount
    return functional.pad(audio, (amount, amount), mode="reflect" if reflects else "constant")


def frame(padded: Tensor, n_fft: int, hop_length: int) -> Tensor:
    """View of padded audio (B, T) as overlapping frames (B, F, n_fft)."""
    return padded.unfold(-1, n_fft, hop_length)


def overlap_add(frames: Tensor, hop_length: int) -> Tensor:
    """Sum of overlapping frames (B, F, n_fft), frame f starting at f * hop.

    Returns:
        (B, F * hop + n_fft - hop), rounded up to whole hops.
    """
    # Whole blocks of a hop are added at once: n_fft / hop additions of long rows.
    batch, n_frames, n_fft = frames.shape
    n_blocks = -(-n_fft // hop_length)
    if n_fft < n_blocks * hop_length:
        frames = functional.pad(frames, (0, n_blocks * hop_length - n_fft))
    blocks = frames.reshape(batch, n_frames, n_blocks, hop_length)
    total = frames.new_zeros(batch, n_frames + n_blocks - 1, hop_length)
    for k in range(n_blocks):
        total[:, k : k + n_frames] += blocks[:, :, k]
    return total.flatten(1)


def stft(
    audio: Tensor,
    n_fft: int,
    hop_length: int,
    window: Tensor,
    padding: Padding = "center",
    pad_mode: PadMode = "reflect",
) -> Tensor:
    """Spectrum of each frame.

    Args:
        audio: (B, T), float32 or float64.
        n_fft: Samples in a frame.
        hop_length: Samples between frames.
        window: (n_fft,), see `hann_window`.
        padding: Framing, see the module's docstring.
        pad_mode: Kind of the added samples; they are zeros where T is too short to reflect.

    Returns:
        (B, F, n_fft // 2 + 1), complex.
    """
    padded = pad_edges(audio, edge_padding(n_fft, hop_length, padding), pad_mode)
    return torch.fft.rfft(frame(padded, n_fft, hop_length) * window)


def istft(
    spectrum: Tensor,
    n_fft: int,
    hop_length: int,
    window: Tensor,
    padding: Padding = "center",
    length: int | None = None,
) -> Tensor:
    """Audio whose frames are closest to `spectrum` in least squares (Griffin and Lim 1984, eq. 6).

    Args:
        spectrum: (B, F, n_fft // 2 + 1), complex.
        n_fft: As in `stft`.
        hop_length: As in `stft`.
        window: As in `stft`.
        padding: As in `stft`.
        length: Samples wanted; by default as many whole hops as have given these frames,
            (F - 1) * hop when centred and F * hop else. Samples that no frame covers are zero.

    Returns:
        (B, length), real.
    """
    n_frames = spectrum.shape[1]
    edge = edge_padding(n_fft, hop_length, padding)
    if length is None:
        length = (n_frames - 1 if padding == "center" else n_frames) * hop_length
    total = overlap_add(torch.fft.irfft(spectrum, n_fft) * window, hop_length)
    energy = overlap_add(window.square().expand(1, n_frames, n_fft), hop_length)
    # Where the windows fade to nothing there is nothing to restore, only rounding to blow up.
    least = 1e-6 * window.square().sum() / hop_length
    audio = (total / energy.clamp_min(least))[:, edge : edge + length]
    return functional.pad(audio, (0, length - audio.shape[1]))
