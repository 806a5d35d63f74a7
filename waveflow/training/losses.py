"""The three objectives of training: likelihood, spectral energy distance and calibration."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from waveflow.audio.mel import MelConfig, MelSpectrogram
from waveflow.audio.stft import overlap_add
from waveflow.bijections import Bijection
from waveflow.flow import Flow, select_items
from waveflow.training.distributed import Share

WINDOWS = (128, 256, 512, 1024, 2048)
LOG_FLOOR = 1e-4


class Objectives(NamedTuple):
    """The terms of one step, each a scalar; those that are not asked for are None."""

    nll: Tensor
    energy: Tensor | None
    calibration: Tensor | None


class SpectralDistance(nn.Module):
    """d(a, b) of two batches of audio from magnitude spectra of several windows and log-mels.

    d is built from L1 norms and unsquared L2 norms, because with those the energy distance
    below is a proper scoring rule; squares would make it a distance of means.

        d = 1/9 sum_w (mean |S_w(a) - S_w(b)| / mean S_w(x)
                       + mean over frames of rms over bins of log S_w(a) - log S_w(b))
            + 4/3 mean |mel(a) - mel(b)|,        S_w = |STFT_w| sqrt(2 / w), hop w / 4
    """

    def __init__(self, mel: MelConfig) -> None:
        super().__init__()
        self.mel = MelSpectrogram(mel)

    @torch.no_grad()
    def levels(self, speech: Tensor) -> Tensor:
        """mean S_w(x) of speech (B, T), for each window (5,)."""
        return torch.stack([_Magnitudes.apply(speech, window).mean() for window in WINDOWS])

    def energy_distance(
        self, speech: Tensor, draws: Tensor, levels: Tensor | None = None
    ) -> Tensor:
        """[d(x, x') + d(x, x'') - d(x', x'')] / 2 (Gritsenko et al. 2020, equation 6).

        Args:
            speech: x (B, T).
            draws: x' and x'' of the same mels, (2 B, T).
            levels: `levels` of the whole batch, where `speech` is a part of it.

        Returns:
            A scalar whose expectation is least where draws are distributed as speech is.
        """
        both = torch.cat([speech, draws])
        total = torch.zeros((), device=speech.device)
        for index, window in enumerate(WINDOWS):
            linear = _Magnitudes.apply(both, window)
            level = linear[: len(speech)].detach().mean() if levels is None else levels[index]
            total = total + _energy(linear / level, _l1) / 9
            total = total + _energy(linear.clamp_min(LOG_FLOOR).log(), _frame_rms) / 9
        return total + 4 / 3 * _energy(self.mel(both), _l1)


def objectives(
    flow: Flow,
    spectral: SpectralDistance,
    audio: Tensor,
    mel: Tensor,
    energy: bool,
    calibration: bool,
    precision: Literal["float32", "bf16"] = "float32",
    share: Share | None = None,
    levels: Tensor | None = None,
) -> Objectives:
    """The terms for speech (B, T) and its mel (B, M, F), T = F hop_length.

    Two draws of every mel, at sigma 1, share the condition of the speech. Calibration is the
    mean over frames of relu(V(speech) - V(draw)), V the log-volume dx/dz, in nats per audio
    sample, of the steps along each path: it keeps draws as likely as speech, where the energy
    distance, which sees magnitudes only, would let their phase collapse.

    Where the speech is a share of a batch, the terms of all shares, weighted by their sizes, add
    up to those of the batch, given the `levels` of the batch's speech: each draws the random
    numbers of the whole batch from torch's generator and takes its own.
    """
    share = share or Share(0, len(audio), len(audio))
    state = flow.conditioner.random_state(share.total, audio.device) if flow.training else None
    state = select_items(state, slice(share.start, share.stop))
    autocast = torch.autocast(audio.device.type, torch.bfloat16, enabled=precision == "bf16")
    with autocast, log_volumes(flow.bijection) as speech_path:
        cond = flow.condition(mel, state=state)
        log_prob, _ = flow.log_prob(audio, cond)
    nll = -log_prob.mean()
    if not (energy or calibration):
        return Objectives(nll, None, None)
    n_positions = audio.shape[1] // flow.channels
    noise = torch.randn(2, share.total, n_positions, flow.channels, device=audio.device)
    noise = share.of(noise, axis=1).flatten(0, 1)
    with autocast, log_volumes(flow.bijection) as draw_path:
        draws, _ = flow.bijection.inverse(noise.transpose(1, 2), cond.repeat(2))
    distance = spectral.energy_distance(audio, draws[:, 0], levels) if energy else None
    gap = None
    if calibration:
        speech_volume = -by_frame(speech_path, mel.shape[2]) / flow.hop_length
        draw_volume = by_frame(draw_path, mel.shape[2]) / flow.hop_length
        gap = torch.relu(speech_volume.repeat(2, 1) - draw_volume).mean()
    return Objectives(nll, distance, gap)


@contextmanager
def log_volumes(bijection: Bijection) -> Iterator[list[Tensor]]:
    """Collects the log-derivatives of every elementwise map by position, (B, L), while open."""
    terms: list[Tensor] = []
    mapped: list[Any] = [module for module in bijection.modules() if hasattr(module, "map")]
    for module in mapped:
        module.map = _Observed(module.map, terms)
    try:
        yield terms
    finally:
        for module in mapped:
            module.map = module.map.map


class _Observed:
    """An elementwise map that notes its log-derivatives."""

    def __init__(self, map: Any, terms: list[Tensor]) -> None:
        self.map, self.terms, self.n_params = map, terms, map.n_params

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._noted(*self.map.forward(x, params))

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._noted(*self.map.inverse(z, params))

    def _noted(self, y: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        self.terms.append(log_det.sum(1))
        return y, log_det


def by_frame(terms: list[Tensor], n_frames: int) -> Tensor:
    """The sum (B, F) of terms (B, L_k) of several resolutions."""
    length = min(n_frames, *(term.shape[1] for term in terms))
    return torch.stack([term.unflatten(1, (length, -1)).sum(2) for term in terms]).sum(0)


class _Magnitudes(torch.autograd.Function):
    """|STFT| sqrt(2 / w) of audio (N, T), (N, frames, bins), frames inside the signal only.

    Its own backward, because autograd's takes a full complex FFT and a scatter for each frame:
    here an inverse real FFT and an overlap-add (the energy distance costs 0.6 times what it did
    with autograd's).
    """

    @staticmethod
    def forward(ctx: Any, audio: Tensor, window: int) -> Tensor:
        hann = torch.hann_window(window, device=audio.device) * (2 / window) ** 0.5
        spectrum = torch.fft.rfft(audio.unfold(1, window, window // 4) * hann)
        parts = torch.view_as_real(spectrum)
        magnitude = (parts.square().sum(-1) + 1e-12).sqrt()
        ctx.save_for_backward(spectrum, magnitude, hann)
        ctx.length = audio.shape[1]
        return magnitude

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        spectrum, magnitude, hann = ctx.saved_tensors
        window = len(hann)
        spectrum = spectrum * (grads[0] / magnitude)
        # irfft counts every bin but the first and last twice, and divides by the length.
        spectrum[..., 1:-1] *= 0.5
        frames = torch.fft.irfft(spectrum, n=window) * (hann * window)
        audio = overlap_add(frames, window // 4)
        return functional.pad(audio, (0, ctx.length - audio.shape[1])), None


def _energy(features: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    x, first, second = features.chunk(3)
    return (distance(x, first) + distance(x, second) - distance(first, second)) / 2


def _l1(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().mean()


def _frame_rms(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b).square().mean(-1) + 1e-8).sqrt().mean()
