"""Mel refinement: pulls a waveform towards the mel that it was made from, keeping its phase."""

import numpy as np
import torch
from torch import Tensor

from waveflow.audio.filters import mel_filterbank
from waveflow.audio.mel import MelConfig, MelSpectrogram, natural_log
from waveflow.audio.mel_config import edge_padding
from waveflow.audio.stft import frame, overlap_add, pad_edges
from waveflow.buffers import ExactBuffers
from waveflow.context import Context
from waveflow.errors import AudioError, MelMismatchError

# A factor of e^6 in one step is more than any sensible start needs; without a bound a silent start
# under a loud mel would overshoot by the whole range of the mel, to the power p.
MAX_LOG_GAIN = 6.0
# Where the squared windows sum to less than this share of their usual sum (at the very ends), the
# correction is faded out instead of being blown up.
MIN_COVERAGE = 0.1


class MelRefinement(ExactBuffers):
    """Repeats: STFT, gain exp(power * W^T (mel - mel of the audio)) in each bin, inverse STFT.

    W is the mel filterbank normalised over bands in each bin; bins outside every band keep gain 1.
    A step starts from where the last two lead: momentum k / (k + 2) in step k = 0, 1, ... times
    `momentum` (Nesterov 1983). `power` 1 and `momentum` 0 converge from anything, white noise
    included; 1.2 and 1 are quicker from a good start. No parameters, no gradient.

    Example:
        >>> refine = MelRefinement(MelConfig(sample_rate=22050))
        >>> refine(torch.randn(1, 2560), torch.full((1, 80, 10), -5.0), steps=4).shape
        torch.Size([1, 2560])
    """

    def __init__(self, mel_config: MelConfig, power: float = 1.0, momentum: float = 0.0) -> None:
        super().__init__()
        self.spectrogram = MelSpectrogram(mel_config)
        self.power = power
        self.momentum = momentum
        weights = mel_filterbank(mel_config)
        total = weights.sum(axis=0)
        # (n_mels, bins): the share of each band in each bin's gain, in sum 1, or 0 without a band.
        shares = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
        self.register_exact("shares", shares)

    def context_of_steps(self, steps: int) -> Context:
        """Frames to the left and to the right that a frame of audio depends on after `steps`."""
        config = self.spectrogram.config
        n_fft, hop = config.n_fft, config.hop_length
        edge = edge_padding(n_fft, hop, config.padding)
        first, last = 0, hop - 1
        for _ in range(steps):
            # From the first sample of the first STFT frame that covers `first`, and so on.
            first = ((first + edge - n_fft) // hop + 1) * hop - edge
            last = (last + edge) // hop * hop - edge + n_fft - 1
        return Context(-(first // hop), last // hop)

    @torch.no_grad()
    def forward(
        self, audio: Tensor, mel: Tensor, steps: int, lengths: Tensor | None = None
    ) -> Tensor:
        """Refined audio.

        Args:
            audio: (B, F * hop), float32 or float64; the first F frames of its STFT are matched.
            mel: (B, n_mels, F), natural logarithm, in the config's convention.
            steps: Iterations; 0 returns the audio as it is.
            lengths: (B,) frames of each item in a padded batch. An item gets what it gets alone,
                and zeros beyond its end.

        Returns:
            (B, F * hop). It may exceed [-1, 1].

        Raises:
            MelMismatchError: If the mel has another number of bands than the config.
            AudioError: If the audio is not F hops long.
        """
        config = self.spectrogram.config
        n_frames, hop = mel.shape[2], config.hop_length
        if mel.shape[1] != config.n_mels:
            raise MelMismatchError(
                f"the mel has {mel.shape[1]} bands, this refinement is for {config.n_mels}"
            )
        if audio.shape[1] != n_frames * hop:
            raise AudioError(
                f"audio of {audio.shape[1]} samples does not fit a mel of {n_frames} frames; "
                f"give {n_frames} * {hop} = {n_frames * hop} samples"
            )
        if steps == 0:
            return audio
        items = _Items(config, self.spectrogram.exact("window", audio), audio, lengths)
        # Values under the floor (of a mel with another floor) could never be reached.
        target = mel.to(audio.dtype).clamp_min(float(np.log(config.log_floor))).transpose(1, 2)
        with torch.autocast(audio.device.type, enabled=False):
            refined = items.trim(audio)
            previous = refined
            for k in range(steps):
                # Only the start of a step is extrapolated, never the result.
                start = torch.lerp(previous, refined, 1.0 + self.momentum * k / (k + 2))
                previous = refined
                refined = start + self._correction(items, start, target)
        return refined

    def _correction(self, items: "_Items", audio: Tensor, target: Tensor) -> Tensor:
        """The change of one step: the least-squares inverse STFT of (gain - 1) . STFT."""
        config = self.spectrogram.config
        spectrum = torch.fft.rfft(items.frames(audio))
        mel = natural_log(self.spectrogram.of_spectrum(spectrum), config)
        log_gain = (target - mel).mul_(self.power / config.power) @ self.exact("shares", audio)
        # gain - 1, so that bins outside every band do not change by a bit.
        spectrum *= log_gain.clamp_(-MAX_LOG_GAIN, MAX_LOG_GAIN).expm1_()
        return items.combine(torch.fft.irfft(spectrum, config.n_fft))


class _Items:
    """Frames a batch, in which items may end early, and adds the frames up again."""

    def __init__(
        self, config: MelConfig, window: Tensor, audio: Tensor, lengths: Tensor | None
    ) -> None:
        self.config = config
        self.n_samples = audio.shape[1]
        self.n_frames = self.n_samples // config.hop_length
        self.edge = edge_padding(config.n_fft, config.hop_length, config.padding)
        self.window = window
        self.frame_mask: Tensor | None = None
        weights = self.window.square().expand(1, self.n_frames, config.n_fft)
        if lengths is not None:
            lengths = lengths.to(audio.device)[:, None]
            mask = torch.arange(self.n_frames, device=audio.device) < lengths
            self.frame_mask = mask[..., None].to(audio.dtype)
            weights = weights * self.frame_mask
            self._mirror(lengths * config.hop_length)
        usual = self.window.square().sum() / config.hop_length
        self.coverage = self._overlap_add(weights).clamp_min(MIN_COVERAGE * usual)

    def _mirror(self, n_samples: Tensor) -> None:
        """Finds the source of each sample of the padded batch, given each item's samples (B, 1)."""
        edge = self.edge
        position = torch.arange(-edge, self.n_samples + edge, device=n_samples.device)
        self.inside = (position >= 0) & (position < n_samples)
        reflects = (n_samples > edge) & (self.config.pad_mode == "reflect")
        self.filled = self.inside | (reflects & (position < n_samples + edge))
        source = position.abs().expand_as(self.filled)
        source = torch.where(source < n_samples, source, 2 * (n_samples - 1) - source)
        self.source = torch.where(self.filled, source, 0)

    def trim(self, audio: Tensor) -> Tensor:
        """The audio with zeros beyond each item's end."""
        if self.frame_mask is None:
            return audio
        # Selected, not multiplied: padding may hold NaN.
        inside = self.inside[:, self.edge : self.edge + self.n_samples]
        return audio.masked_fill(~inside, 0.0)

    def frames(self, audio: Tensor) -> Tensor:
        """Windowed frames (B, F, n_fft), each item padded at its own end as it is alone."""
        if self.frame_mask is None:
            padded = pad_edges(audio, self.edge, self.config.pad_mode)
        else:
            padded = audio.gather(1, self.source) * self.filled
        frames = frame(padded, self.config.n_fft, self.config.hop_length)
        return frames[:, : self.n_frames] * self.window

    def combine(self, frames: Tensor) -> Tensor:
        """Least-squares audio (B, T) of frames (B, F, n_fft), which it overwrites."""
        frames *= self.window
        if self.frame_mask is not None:
            frames *= self.frame_mask
        return self.trim(self._overlap_add(frames) / self.coverage)

    def _overlap_add(self, frames: Tensor) -> Tensor:
        total = overlap_add(frames, self.config.hop_length)
        return total[:, self.edge : self.edge + self.n_samples]
