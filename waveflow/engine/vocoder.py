"""Vocoder: a trained flow with its mel settings; what a person loads and calls."""

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, get_args, overload

import numpy as np
import torch
from torch import Tensor

from waveflow.audio.denoise import Bias, Denoiser
from waveflow.audio.mel import MelConfig, MelSpectrogram, describe_foreign_mel
from waveflow.audio.refine import MelRefinement
from waveflow.checkpoint import EXAMPLE, ModelConfig, load_checkpoint, resolve_run
from waveflow.engine.checks import checked_audio, checked_lengths, checked_mel
from waveflow.engine.contract import Decoder
from waveflow.engine.decoder import (
    Precision,
    choose_decoder,
    make_decoder,
    weights_version,
)
from waveflow.engine.fast.int8 import speech_like_mel
from waveflow.engine.windows import WINDOW_FRAMES, WindowedSynthesis, window_context
from waveflow.errors import AudioError, ConfigError, MelMismatchError
from waveflow.flow import Flow
from waveflow.pretrained import find_model

logger = logging.getLogger(__name__)

# Past what warns and the method that was called.
_CALLER = 3


class VocoderWarning(UserWarning):
    """What a listener should know: a foreign mel, or a waveform that was clipped."""


class Vocoder:
    """Mel spectrograms to waveforms and back to noise.

    Args:
        config: the checkpoint's config: mel settings, sampling settings, provenance.
        flow: the model.
        decoder_of: makes what runs the flow from noise to audio (engine/decoder.py).

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

    def __init__(
        self,
        config: ModelConfig,
        flow: Flow,
        decoder_of: Callable[[Flow], Decoder] = make_decoder,
    ) -> None:
        self.config = config
        self.flow = flow.prepare_for_inference()
        self._decoder_of = decoder_of
        self._decoder: tuple[object, Decoder] | None = None
        self._denoisers: dict[Bias, Denoiser] = {}
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

    @property
    def decoder(self) -> Decoder:
        """Noise and mel to audio: what every synthesis calls. Made anew when weights change."""
        version = weights_version(self.flow)
        if self._decoder is None or self._decoder[0] != version:
            self._denoisers.clear()
            self._decoder = version, self._decoder_of(self.flow)
        return self._decoder[1]

    def __getstate__(self) -> dict[str, object]:
        # What is made from the weights is made again: packed weights cannot be copied.
        return self.__dict__ | {"_decoder": None, "_denoisers": {}}

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

    @overload
    def __call__(
        self,
        mel: Tensor | np.ndarray,
        sigma: float | None = None,
        seed: int | Sequence[int] = 0,
        refine: int | None = None,
        lengths: None = None,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        mel: Tensor | np.ndarray,
        sigma: float | None = None,
        seed: int | Sequence[int] = 0,
        refine: int | None = None,
        *,
        lengths: Tensor | np.ndarray | Sequence[int],
    ) -> tuple[Tensor, Tensor]: ...

    def __call__(
        self,
        mel: Tensor | np.ndarray,
        sigma: float | None = None,
        seed: int | Sequence[int] = 0,
        refine: int | None = None,
        lengths: Tensor | np.ndarray | Sequence[int] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Speech for a mel of any length; a long one is made in windows, in bounded memory.

        Args:
            mel: (B, M, F) or (M, F), in this model's convention (`mel_config`).
            sigma: standard deviation of the noise; default from the model's config.
            seed: of the noise; one for all items, or one for each.
            refine: mel refinement steps after the draw, 0 to 4; default from the config.
            lengths: (B,) frames of each item of a padded batch. An item gets what it gets
                alone, whatever its padding holds.

        Returns:
            (B, F hop_length) or (F hop_length,), float32 in [-1, 1]. With lengths, that (zeros
            beyond an item's end) and the items' samples (B,).

        Raises:
            MelMismatchError: wrong number of bands, shape, lengths, or values that are not finite.
            ConfigError: sigma, seed or refine out of range.
        """
        frames = None if lengths is None else checked_lengths(mel, lengths, self.device)
        batch, squeezed = checked_mel(mel, self.mel_config.n_mels, self.device, frames)
        steps = self._checked_refine(refine)
        synthesis = self._synthesis(len(batch), sigma, seed, steps, frames)
        self._warn_of_foreign(batch, frames)
        audio = self._all_of(synthesis, batch)
        self._warn_of_clipping(_n_clipped(audio, batch), audio.numel())
        audio.clamp_(-1, 1)
        if frames is None:
            return audio[0] if squeezed else audio
        return audio, frames * self.hop_length

    def stream(
        self,
        mels: Iterable[Tensor | np.ndarray],
        sigma: float | None = None,
        seed: int = 0,
        refine: int | None = None,
        least_frames: int | None = None,
    ) -> Iterator[Tensor]:
        """Speech for a mel that comes in pieces, each as soon as it is final.

        The pieces joined are what `__call__` makes of the mels joined. Audio is final once
        `look_ahead` further frames of the mel are known.

        Args:
            mels: the pieces (M, f), f >= 1; may be slow.
            sigma, seed, refine: as `__call__`.
            least_frames: how many final frames are waited for. Few mean less delay and more
                work, since each time the context is computed again: left and right of the
                frames about `look_ahead` each. Default: `look_ahead`.

        Returns:
            Pieces (n hop_length,) of the audio, float32 in [-1, 1].

        Raises:
            MelMismatchError: a piece as `__call__` refuses it, before audio that it would have
                made final; or no piece at all.
            ConfigError: an option out of range.

        Example:
            >>> mel = torch.full((80, 200), -8.0)
            >>> pieces = list(waveflow.load().stream(mel.split(50, dim=1)))
            >>> torch.cat(pieces).shape
            torch.Size([51200])
        """
        least = max(1, self.look_ahead(refine)) if least_frames is None else least_frames
        if least < 1:
            raise ConfigError(f"least_frames {least} is out of range: give 1 or more")
        synthesis = self._synthesis(1, sigma, seed, self._checked_refine(refine))
        return self._streamed(mels, synthesis, least)

    def look_ahead(self, refine: int | None = None) -> int:
        """Frames of the mel behind a frame of audio that it depends on."""
        return window_context(self.flow, self.refinement, self._checked_refine(refine))[1]

    def draw(
        self,
        mel: Tensor | np.ndarray,
        sigma: float | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Tensor:
        """A draw of the flow as it is, neither refined nor clipped; arguments as `__call__`.

        What `log_prob` can be asked about: a clipped sample has no likelihood to speak of.
        """
        batch, squeezed = checked_mel(mel, self.mel_config.n_mels, self.device)
        audio = self._all_of(self._synthesis(len(batch), sigma, seed, 0), batch)
        return audio[0] if squeezed else audio

    def resynth(
        self,
        audio: Tensor | np.ndarray,
        sigma: float | None = None,
        seed: int = 0,
        refine: int | None = None,
    ) -> Tensor:
        """Copy-synthesis: audio (T,) to its mel, and new audio (T,) from the mel alone."""
        samples = checked_audio(audio, self.device)
        if samples.dim() != 1:
            raise AudioError(f"resynth takes one waveform (T,), not {tuple(samples.shape)}")
        n_samples = len(samples)
        padded = torch.nn.functional.pad(samples, (0, -n_samples % self.hop_length))
        mel = self.mel(padded)[:, : len(padded) // self.hop_length]
        return self(mel, sigma, seed, refine)[:n_samples]

    def denoise(
        self, audio: Tensor | np.ndarray, strength: float = 0.1, bias: Bias | None = None
    ) -> Tensor:
        """Audio (B, T) or (T,) without this model's own hum; see `waveflow.audio.denoise`.

        Args:
            strength: how often the bias is subtracted, 0 to 10.
            bias: what the hum is heard in. Default: "zeros", as NVIDIA, for a WaveGlow;
                "silence" for models that speak for the loud mel of zeros.
        """
        return self.denoiser(bias)(checked_audio(audio, self.device), strength)

    def denoiser(self, bias: Bias | None = None) -> Denoiser:
        """What `denoise` applies; its bias, a second of synthesis, is computed once."""
        if bias is None:
            bias = "zeros" if self.config.model.type == "waveglow" else "silence"
        _ = self.decoder  # forgets denoisers of other weights
        if bias not in self._denoisers:
            self._denoisers[bias] = Denoiser.of_model(
                lambda mel: self.draw(mel, sigma=0.0), self.mel_config, bias
            )
        return self._denoisers[bias]

    @torch.inference_mode()
    def mel(self, audio: Tensor | np.ndarray) -> Tensor:
        """The mel (B, M, F) or (M, F) of audio (B, T) or (T,) in this model's convention."""
        return self.mel_spectrogram(checked_audio(audio, self.device))

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
        """The audio (B, T) of noise z (B, C, L): the flow's inverse, never refined.

        It undoes `encode` as exactly as the vocoder's precision allows.
        """
        batch, _ = checked_mel(mel, self.mel_config.n_mels, self.device)
        channels = self.flow.channels
        expected = (len(batch), channels, batch.shape[2] * self.hop_length // channels)
        if tuple(z.shape) != expected:
            raise MelMismatchError(f"z is {tuple(z.shape)}; this mel needs {expected}")
        return self.decoder(z.to(self.device), batch)

    def _pair(self, audio: Tensor | np.ndarray, mel: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
        """Audio (B, T) and mel (B, M, F) cut to the same whole hops."""
        samples = checked_audio(audio, self.device)
        samples = samples[None] if samples.dim() == 1 else samples
        batch, _ = checked_mel(mel, self.mel_config.n_mels, self.device)
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

    def _synthesis(
        self,
        n_items: int,
        sigma: float | None,
        seed: int | Sequence[int],
        steps: int,
        lengths: Tensor | None = None,
    ) -> WindowedSynthesis:
        sigma = self.config.synthesis.sigma if sigma is None else sigma
        if not 0 <= sigma <= 10:
            raise ConfigError(f"sigma {sigma} is out of range: give a number from 0 to 10")
        if isinstance(seed, int | np.integer):
            seeds = [int(seed)] * n_items
        elif isinstance(seed, Sequence):
            seeds = list(seed)
        else:
            raise ConfigError(f"seed {seed!r}: give an integer, or one for each mel")
        if len(seeds) != n_items:
            raise ConfigError(f"{len(seeds)} seeds for {n_items} mels: give one for each")
        return WindowedSynthesis(
            self.flow, self.decoder, self.refinement, sigma, seeds, steps, lengths
        )

    def _all_of(self, synthesis: WindowedSynthesis, batch: Tensor) -> Tensor:
        """Audio (B, F hop) of a whole batch that was checked."""
        audio = batch.new_empty(len(batch), batch.shape[2] * self.hop_length)
        done = 0
        for piece in chain(synthesis.push(batch), synthesis.finish()):
            audio[:, done : done + piece.shape[1]] = piece
            done += piece.shape[1]
        return audio

    def _streamed(
        self, mels: Iterable[Tensor | np.ndarray], synthesis: WindowedSynthesis, least_frames: int
    ) -> Iterator[Tensor]:
        foreign, n_clipped, n_samples = False, 0, 0

        def clipped(pieces: Iterator[Tensor], mel: Tensor) -> Iterator[Tensor]:
            nonlocal n_clipped, n_samples
            for audio in pieces:
                n_clipped += _n_clipped(audio, mel)
                n_samples += audio.shape[1]
                yield audio[0].clamp(-1, 1)

        piece = None
        for mel in mels:
            piece, _ = checked_mel(mel, self.mel_config.n_mels, self.device)
            if len(piece) != 1:
                raise MelMismatchError(f"a stream is of one mel (M, f), not {tuple(piece.shape)}")
            foreign = foreign or self._warn_of_foreign(piece)
            yield from clipped(synthesis.push(piece, least_frames), piece)
        if piece is None:
            raise MelMismatchError("this stream is empty: it holds no mel")
        yield from clipped(synthesis.finish(), piece)
        self._warn_of_clipping(n_clipped, n_samples)

    def _checked_refine(self, refine: int | None) -> int:
        if refine is None:
            return self.refine_steps
        if not 0 <= refine <= 4:
            raise ConfigError(f"refine {refine} is out of range: give 0 to 4 steps")
        return refine

    def _warn_of_foreign(self, batch: Tensor, lengths: Tensor | None = None) -> bool:
        """Whether there was something to warn of in the first seconds of an item."""
        mel_range = self.config.provenance.mel_range
        if mel_range is None:
            return False
        low, high = (np.asarray(bound) for bound in mel_range)
        frames = [batch.shape[2]] * len(batch) if lengths is None else lengths.tolist()
        for item, n_frames in zip(batch, frames, strict=True):
            seen = item[:, : min(n_frames, WINDOW_FRAMES)].cpu().numpy()
            found = describe_foreign_mel(seen, low, high)
            if found is not None:
                warnings.warn(
                    f"this mel looks {found}; the model takes natural logarithms of magnitudes",
                    VocoderWarning,
                    stacklevel=_CALLER,
                )
                return True
        return False

    def _warn_of_clipping(self, n_clipped: int, n_samples: int) -> None:
        if n_clipped:
            warnings.warn(
                f"{100 * n_clipped / n_samples:.2g} % of the samples were clipped to [-1, 1]",
                VocoderWarning,
                stacklevel=_CALLER,
            )


def _n_clipped(audio: Tensor, mel: Tensor) -> int:
    """Samples beyond [-1, 1]. Raises MelMismatchError where there is no audio at all."""
    # Neither this nor the count makes a second array of the audio's size.
    if not all(math.isfinite(end) for end in audio.aminmax()):
        low, high = mel.aminmax()
        raise MelMismatchError(
            f"this mel, {low:.3g} to {high:.3g}, gives samples that are not finite: speech lies "
            "between -12 and 3 in natural logarithms"
        )
    return int((audio > 1).count_nonzero() + (audio < -1).count_nonzero())


def load(
    model: str | Path | None = None,
    verify: bool = True,
    device: str | torch.device = "cpu",
    precision: Precision | Literal["auto"] = "float32",
    compile: bool = False,
) -> Vocoder:
    """The model that ships, another one by name, or a checkpoint or run folder.

    Args:
        model: None for the default; `list_models()` has the names.
        verify: check the files' hashes against the manifest.
        device: where it runs.
        precision: of the networks' matrix products: float32, bfloat16, float16 (GPU) or int8
            (CPU, extra `int8`); "auto" measures and logs which of the first two it takes.
        compile: torch.compile; the first call then takes half a minute or more.

    Raises:
        CheckpointError: unknown, missing or damaged.
        ConfigError: a device or precision that is not to be had here.
    """
    folder = resolve_run(find_model(model), "best")
    config, flow = load_checkpoint(folder, verify)
    if precision not in (*get_args(Precision), "auto"):
        names = ", ".join((*get_args(Precision), "auto"))
        raise ConfigError(f"precision {precision!r} is none of {names}")
    if precision == "auto":
        decoder_of = partial(_chosen, n_mels=config.mel.n_mels, compile=compile)
    else:
        mel = _calibration_mel(folder, config.mel) if precision == "int8" else None
        decoder_of = partial(
            make_decoder, precision=precision, compile=compile, calibration_mel=mel
        )
    return Vocoder(config, flow, decoder_of).to(device)


def _chosen(flow: Flow, n_mels: int, compile: bool) -> Decoder:
    decoder, reason = choose_decoder(flow, n_mels, compile)
    logger.info("precision %s", reason)
    return decoder


def example_mel(folder: Path) -> Tensor | None:
    """The mel (M, F) of a validation clip in a checkpoint's folder; None where there is none."""
    # It comes with soundfile, which those who bring their own mels can do without.
    from waveflow.audio.io import read_mel

    path = folder / EXAMPLE
    return torch.from_numpy(read_mel(path)) if path.is_file() else None


def _calibration_mel(folder: Path, config: MelConfig) -> Tensor:
    """The example (M, F) that came with a checkpoint, or something like speech."""
    example = example_mel(folder)
    return speech_like_mel(config.n_mels) if example is None else example
