"""Vocoder: a trained flow with its mel settings; what a person loads and calls."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from waveflow.audio.mel import MelSpectrogram, describe_foreign_mel
from waveflow.audio.refine import MelRefinement
from waveflow.checkpoint import ModelConfig, load_checkpoint
from waveflow.errors import AudioError, ConfigError, MelMismatchError
from waveflow.flow import Flow
from waveflow.pretrained import find_model

# Past _clipped (or its like), __call__ and the frame of its decorator.
_CALLER = 4


class VocoderWarning(UserWarning):
    """What a listener should know: a foreign mel, or a waveform that was clipped."""


class Vocoder:
    """Mel spectrograms to waveforms and back to noise.

    Args:
        config: the checkpoint's config: mel settings, sampling settings, provenance.
        flow: the model.

    Attributes:
        config, flow: as given.
        sample_rate: in Hz.
        hop_length: audio samples for each mel frame.
        mel_config: the mel that it takes.
        refine_steps: mel refinement steps of `__call__`, unless it is told otherwise.
        refinement: the mel refinement that `__call__` applies to a draw.

    Example:
        >>> import torch, waveflow
        >>> vocoder = waveflow.load()
        >>> vocoder(torch.full((80, 3), -8.0)).shape
        torch.Size([768])
    """

    def __init__(self, config: ModelConfig, flow: Flow) -> None:
        self.config = config
        self.flow = flow.prepare_for_inference()
        self.mel_config = config.mel
        self.sample_rate = config.mel.sample_rate
        self.hop_length = config.mel.hop_length
        self.refine_steps = config.synthesis.refine_steps
        self.mel_spectrogram = MelSpectrogram(config.mel)
        self.refinement = MelRefinement(
            config.mel, config.synthesis.refine_power, config.synthesis.refine_momentum
        )

    @property
    def device(self) -> torch.device:
        return next(self.flow.parameters()).device

    def to(self, device: str | torch.device) -> "Vocoder":
        """Moves the model; what it is given is moved to it, what it returns stays there."""
        try:
            for module in (self.flow, self.mel_spectrogram, self.refinement):
                module.to(device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"device {device!r} cannot be used: {reason}") from error
        self.flow.prepare_for_inference()
        return self

    @torch.inference_mode()
    def __call__(
        self,
        mel: Tensor | np.ndarray,
        sigma: float | None = None,
        seed: int | Sequence[int] = 0,
        refine: int | None = None,
    ) -> Tensor:
        """Speech for a mel.

        Args:
            mel: (B, M, F) or (M, F), in this model's convention (`mel_config`).
            sigma: standard deviation of the noise; default from the model's config.
            seed: of the noise; one for all items, or one for each.
            refine: mel refinement steps after the draw, 0 to 4; default from the config.

        Returns:
            (B, F hop_length) or (F hop_length,), float32 in [-1, 1].

        Raises:
            MelMismatchError: wrong number of bands, shape, or values that are not finite.
            ConfigError: sigma, seed or refine out of range.
        """
        batch, squeezed = self._checked_mel(mel)
        steps = self._checked_refine(refine)
        self._warn_of_foreign(batch)
        audio = self._clipped(self.refinement(self._drawn(batch, sigma, seed), batch, steps))
        return audio[0] if squeezed else audio

    @torch.inference_mode()
    def draw(
        self,
        mel: Tensor | np.ndarray,
        sigma: float | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Tensor:
        """A draw of the flow as it is, neither refined nor clipped; arguments as `__call__`.

        What `log_prob` can be asked about: a clipped sample has no likelihood to speak of.
        """
        batch, squeezed = self._checked_mel(mel)
        audio = self._drawn(batch, sigma, seed)
        return audio[0] if squeezed else audio

    def resynth(
        self,
        audio: Tensor | np.ndarray,
        sigma: float | None = None,
        seed: int = 0,
        refine: int | None = None,
    ) -> Tensor:
        """Copy-synthesis: audio (T,) to its mel, and new audio (T,) from the mel alone."""
        samples = self._checked_audio(audio)
        if samples.dim() != 1:
            raise AudioError(f"resynth takes one waveform (T,), not {tuple(samples.shape)}")
        n_samples = len(samples)
        padded = torch.nn.functional.pad(samples, (0, -n_samples % self.hop_length))
        mel = self.mel(padded)[:, : len(padded) // self.hop_length]
        return self(mel, sigma, seed, refine)[:n_samples]

    @torch.inference_mode()
    def mel(self, audio: Tensor | np.ndarray) -> Tensor:
        """The mel (B, M, F) or (M, F) of audio (B, T) or (T,) in this model's convention."""
        return self.mel_spectrogram(self._checked_audio(audio))

    @torch.inference_mode()
    def log_prob(self, audio: Tensor | np.ndarray, mel: Tensor | np.ndarray) -> Tensor:
        """The density at `audio`, (B,), in nats per audio sample; higher is better.

        Uses the first floor(T / hop_length) hops of the audio and as many frames. To compare
        16-bit recordings, dequantise them first (`waveflow.audio.dequantise`).
        """
        samples, batch = self._pair(audio, mel)
        return self.flow(samples, batch)

    @torch.inference_mode()
    def encode(self, audio: Tensor | np.ndarray, mel: Tensor | np.ndarray) -> Tensor:
        """The noise z (B, C, L) that `decode` turns into this audio; lengths as `log_prob`."""
        samples, batch = self._pair(audio, mel)
        return self.flow.encode(samples, batch)

    @torch.inference_mode()
    def decode(self, z: Tensor, mel: Tensor | np.ndarray) -> Tensor:
        """The audio (B, T) of noise z (B, C, L): the flow's exact inverse, never refined."""
        batch, _ = self._checked_mel(mel)
        channels = self.flow.channels
        expected = (len(batch), channels, batch.shape[2] * self.hop_length // channels)
        if tuple(z.shape) != expected:
            raise MelMismatchError(f"z is {tuple(z.shape)}; this mel needs {expected}")
        return self.flow.decode(z.to(self.device), batch)

    def _pair(self, audio: Tensor | np.ndarray, mel: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
        """Audio (B, T) and mel (B, M, F) cut to the same whole hops."""
        samples = self._checked_audio(audio)
        samples = samples[None] if samples.dim() == 1 else samples
        batch, _ = self._checked_mel(mel)
        n_frames = samples.shape[1] // self.hop_length
        if n_frames < 1:
            raise AudioError(
                f"audio of {samples.shape[1]} samples is shorter than one hop, {self.hop_length}"
            )
        if len(samples) != len(batch) or n_frames > batch.shape[2]:
            raise MelMismatchError(
                f"audio {tuple(samples.shape)} has {n_frames} whole hops in {len(samples)} items; "
                f"the mel {tuple(batch.shape)} has {batch.shape[2]} frames in {len(batch)}"
            )
        return samples[:, : n_frames * self.hop_length], batch[:, :, :n_frames]

    def _checked_mel(self, mel: Tensor | np.ndarray) -> tuple[Tensor, bool]:
        """(B, M, F) float32 on the device, and whether the batch axis was added."""
        batch = self._as_tensor(mel)
        squeezed = batch.dim() == 2
        batch = batch[None] if squeezed else batch
        n_mels = self.mel_config.n_mels
        if batch.dim() != 3:
            raise MelMismatchError(
                f"a mel is ({n_mels}, F) or (B, {n_mels}, F), not {tuple(batch.shape)}"
            )
        if batch.shape[1] != n_mels:
            hint = "; transpose it" if batch.shape[2] == n_mels else ""
            raise MelMismatchError(
                f"this mel has {batch.shape[1]} bands, the model takes {n_mels}{hint}"
            )
        if not batch.numel():
            raise MelMismatchError(f"this mel is empty: {tuple(batch.shape)}")
        if not torch.isfinite(batch).all():
            raise MelMismatchError("this mel holds NaN or infinite values")
        return batch, squeezed

    def _checked_audio(self, audio: Tensor | np.ndarray) -> Tensor:
        samples = self._as_tensor(audio)
        if samples.dim() not in (1, 2) or not samples.numel():
            raise AudioError(f"audio is (T,) or (B, T) and not empty, not {tuple(samples.shape)}")
        if not torch.isfinite(samples).all():
            raise AudioError("this audio holds NaN or infinite samples")
        return samples

    def _as_tensor(self, values: Tensor | np.ndarray) -> Tensor:
        if isinstance(values, np.ndarray):
            # A copy: torch takes no reversed, byte-swapped or read-only arrays.
            with np.errstate(over="ignore"):  # what overflows is refused as infinite
                values = torch.from_numpy(np.array(values, np.float32, order="C"))
        return torch.as_tensor(values, dtype=torch.float32, device=self.device)

    def _drawn(self, batch: Tensor, sigma: float | None, seed: int | Sequence[int]) -> Tensor:
        """A draw (B, T) for each mel of a batch that was checked."""
        sigma = self.config.synthesis.sigma if sigma is None else sigma
        if not 0 <= sigma <= 10:
            raise ConfigError(f"sigma {sigma} is out of range: give a number from 0 to 10")
        if isinstance(seed, int | np.integer):
            seeds = [int(seed)] * len(batch)
        elif isinstance(seed, Sequence):
            seeds = list(seed)
        else:
            raise ConfigError(f"seed {seed!r}: give an integer, or one for each mel")
        if len(seeds) != len(batch):
            raise ConfigError(f"{len(seeds)} seeds for {len(batch)} mels: give one for each")
        noise = self.flow.noise(batch.shape[2], seeds).to(self.device)
        return self.flow.decode(sigma * noise, batch)

    def _checked_refine(self, refine: int | None) -> int:
        if refine is None:
            return self.refine_steps
        if not 0 <= refine <= 4:
            raise ConfigError(f"refine {refine} is out of range: give 0 to 4 steps")
        return refine

    def _warn_of_foreign(self, batch: Tensor) -> None:
        mel_range = self.config.provenance.mel_range
        if mel_range is None:
            return
        low, high = (np.asarray(bound) for bound in mel_range)
        for item in batch.cpu().numpy():
            found = describe_foreign_mel(item, low, high)
            if found is not None:
                warnings.warn(
                    f"this mel looks {found}; the model takes natural logarithms of magnitudes",
                    VocoderWarning,
                    stacklevel=_CALLER,
                )
                return

    def _clipped(self, audio: Tensor) -> Tensor:
        """The one place where output is clipped."""
        share = (audio.abs() > 1).float().mean().item()
        if share > 0:
            warnings.warn(
                f"{100 * share:.2g} % of the samples were clipped to [-1, 1]",
                VocoderWarning,
                stacklevel=_CALLER,
            )
        return audio.clamp(-1, 1)


def load(model: str | Path | None = None, verify: bool = True) -> Vocoder:
    """The model that ships, another one by name, or a checkpoint or run folder.

    Args:
        model: None for the default; `list_models()` has the names.
        verify: check the files' hashes against the manifest.

    Raises:
        CheckpointError: unknown, missing or damaged.
    """
    return Vocoder(*load_checkpoint(find_model(model), verify))
