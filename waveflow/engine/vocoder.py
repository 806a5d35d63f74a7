"""Vocoder: a trained flow with its mel settings, to load and to call."""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from waveflow.audio.denoise import Bias, Denoiser
from waveflow.audio.mel import MelConfig, MelSpectrogram
from waveflow.audio.mel_names import NATIVE
from waveflow.audio.refine import MelRefinement
from waveflow.audio.samples import (
    MOST_PEAK,
    MOST_PEAK_OF_DRAW,
    audio_tensor,
    check_range,
    check_shape,
    offset_of,
    without_offset,
)
from waveflow.checkpoint import EXAMPLE, ModelConfig, load_checkpoint
from waveflow.door import check_plain
from waveflow.engine.checks import (
    Floats,
    checked_mel,
    clipping_notes,
    padding_notes,
    silence_padding,
)
from waveflow.engine.contract import Decoder
from waveflow.engine.decoder import (
    Precision,
    WeightsVersion,
    choose_decoder,
    make_decoder,
)
from waveflow.engine.evidence import likelier_bands
from waveflow.engine.fast.int8 import speech_like_mel
from waveflow.engine.incoming import IncomingMels
from waveflow.engine.options import OWN_OPTIONS, Speech, SynthesisOptions
from waveflow.engine.streaming import WindowedSynthesis, delayed, window_context
from waveflow.errors import AudioError, CheckpointError, ConfigError, MelMismatchError
from waveflow.flow import Flow
from waveflow.models.registry import build_flow
from waveflow.pretrained import model_folder

logger = logging.getLogger(__name__)

# Frames between a warning and the caller of the method that warns.
_CALLER = 3


class VocoderWarning(UserWarning):
    """Tells the listener of clipped samples, of a mel's convention, and of what was mended."""


class Vocoder:
    """Mel spectrograms to waveforms and back to noise.

    Args:
        config: the checkpoint's config: mel settings, sampling settings, provenance.
        flow: the model.
        decoder_of: makes the decoder, which runs the flow from noise to audio (engine/decoder.py).
        folder: the checkpoint's folder, where the model was loaded from one.

    Attributes:
        config, flow, folder: as given.
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
        folder: Path | None = None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.flow = flow.eval()
        self._decoder_of = decoder_of
        self._decoder: tuple[object, Decoder] | None = None
        self._denoisers: dict[Bias, Denoiser] = {}
        self.mel_config = config.mel
        self.sample_rate = config.mel.sample_rate
        self.hop_length = config.mel.hop_length
        self.refine_steps = config.synthesis.refine_steps
        self.mel_spectrogram = MelSpectrogram(config.mel).float()
        self.refinement = MelRefinement(
            config.mel, config.synthesis.refine_power, config.synthesis.refine_momentum
        ).float()

    @property
    def device(self) -> torch.device:
        return next(self.flow.parameters()).device

    @property
    def is_bound(self) -> bool:
        """Whether its likelihoods are lower bounds (`Flow.is_bound`)."""
        return self.flow.is_bound

    @property
    def judges_mels(self) -> bool:
        """Whether a mel that is clearly in another convention is refused.

        What speech is like is known; a model that does not tell its data may be of anything.
        """
        return self.config.provenance.mel_range is not None and self.mel_config.n_mels >= 20

    @property
    def decoder(self) -> Decoder:
        """Noise and mel to audio, for every synthesis. Made anew when weights change."""
        version = WeightsVersion(self.flow)
        if self._decoder is None or self._decoder[0] != version:
            self._denoisers.clear()
            self._decoder = version, self._decoder_of(self.flow)
        return self._decoder[1]

    def __getstate__(self) -> dict[str, object]:
        # Packed weights cannot be copied; a copy makes its own.
        state = self.__dict__ | {"_decoder": None, "_denoisers": {}}
        if any(map(is_parametrized, self.flow.modules())):  # torch pickles none of these
            state["flow"] = self.flow.state_dict()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not isinstance(self.flow, Flow):
            weights, self.flow = self.flow, build_flow(self.config.model, self.config.mel)
            self.flow.load_state_dict(weights, assign=True)
            # For constants that are no part of the weights.
            self.flow.to(self.device).eval()

    def to(self, device: str | torch.device) -> "Vocoder":
        """Moves the model. Inputs are moved to its device; results stay there.

        Raises:
            ConfigError: no such device. A precision is none: `load` takes one.
        """
        if not isinstance(device, str | int | torch.device):
            raise ConfigError(
                f"to({device!r}): a vocoder is moved to a device; load(precision=...) chooses the "
                "precision"
            )
        try:
            for module in (self.flow, self.mel_spectrogram, self.refinement):
                module.to(device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"device {device!r} cannot be used: {reason}") from error
        return self

    def __repr__(self) -> str:
        config, n = self.config, sum(p.numel() for p in self.flow.parameters())
        return (
            f"Vocoder({config.model.type}, {n:,} parameters, {self.sample_rate} Hz, hop "
            f"{self.hop_length}, {config.mel.n_mels} mel bands, {self.device}"
            f"{'' if self.folder is None else f', {self.folder.name}'})"
        )

    @property
    def _silence(self) -> float:
        """The value of a mel where nothing is heard."""
        return math.log(self.mel_config.log_floor)

    def __call__(
        self,
        mel: Tensor | np.ndarray,
        options: SynthesisOptions = OWN_OPTIONS,
        lengths: Tensor | np.ndarray | Sequence[int] | None = None,
        **changes: Any,
    ) -> Any:
        """Speech for a mel of any length; a long one is made in windows, in bounded memory.

        Args:
            mel: (B, M, F) or (M, F), in this model's convention (`mel_config`) or the one that
                the options name.
            options: sigma, seed, refinement steps; convention and axes of the mel.
            lengths: (B,) frames of each item of a padded batch. An item gets what it gets
                alone, whatever its padding holds.
            changes: fields of the options by name: `vocoder(mel, sigma=0.5)`.

        Returns:
            (B, F hop_length) or (F hop_length,), float32 in [-1, 1]. With lengths, that (zeros
            beyond an item's end) and the items' samples (B,).

        Raises:
            MelMismatchError: wrong number of bands, shape, lengths, values that are not finite, or
                a mel that is clearly in another convention, or cannot be converted.
            ConfigError: an option out of range, or a part of the flow that declares no context.
        """
        speech = self.synthesise(mel, options.changed(changes), lengths)
        warn_caller(speech.notes)
        return speech.audio if speech.n_samples is None else (speech.audio, speech.n_samples)

    def synthesise(
        self,
        mel: Tensor | np.ndarray,
        options: SynthesisOptions = OWN_OPTIONS,
        lengths: Tensor | np.ndarray | Sequence[int] | None = None,
    ) -> Speech:
        """As `__call__`, with its warnings as notes in the result: for servers and threads."""
        incoming = self._incoming(options)
        given, squeezed, ends = incoming.take(mel, lengths)
        given, n_padding = silence_padding(given, self._silence, ends)
        notes = incoming.notes + padding_notes(n_padding, given.shape[0] * given.shape[2])
        batch = self._on_device(given)
        frames = None if ends is None else torch.from_numpy(ends).to(self.device)
        audio = self._all_of(self._synthesis(len(batch), options, frames), batch)
        notes += clipping_notes(_n_clipped(audio, batch), audio.numel())
        audio.clamp_(-1, 1)
        if delay := incoming.delay_samples:
            audio = torch.cat(list(delayed(iter([audio]), lambda: delay)), 1)
            if frames is not None:
                n_samples = frames[:, None] * self.hop_length
                audio *= torch.arange(audio.shape[1], device=self.device) < n_samples
        if frames is None:
            return Speech(audio[0] if squeezed else audio, None, notes)
        return Speech(audio, frames * self.hop_length, notes)

    def stream(
        self,
        mels: Iterable[Tensor | np.ndarray],
        options: SynthesisOptions = OWN_OPTIONS,
        least_frames: int | None = None,
        on_note: Callable[[str], None] | None = None,
        **changes: Any,
    ) -> Iterator[Tensor]:
        """Speech for a mel that comes in pieces, each as soon as it is final.

        The pieces joined equal the result of `__call__` for the mels joined. Audio is final once
        `look_ahead` further frames of the mel are known, or as much as the option of that name
        says: then it comes sooner, and is no longer the same.

        Args:
            mels: the pieces (M, f), f >= 1; may be slow.
            options: as `__call__`.
            changes: as `__call__`.
            least_frames: final frames to wait for before the next piece. Fewer mean less delay
                and more work, since each piece computes its context again: about `look_ahead`
                frames on each side. Default: `look_ahead`.
            on_note: called with each note (`Speech.notes`); by default it becomes a warning.

        Returns:
            Pieces (n hop_length,) of the audio, float32 in [-1, 1].

        Raises:
            MelMismatchError: a piece as `__call__` refuses it, before audio that it would have
                made final; or no piece at all.
            ConfigError: as `__call__`.

        Example:
            >>> mel = torch.full((80, 200), -8.0)
            >>> pieces = list(waveflow.load().stream(mel.split(50, dim=1)))
            >>> torch.cat(pieces).shape
            torch.Size([51200])
        """
        options = options.changed(changes)
        synthesis = self._synthesis(1, options, look_ahead=self._frames(options.look_ahead))
        if least_frames is None:
            # Without a bound no audio is final before the end.
            least_frames = 1 if math.isinf(synthesis.right) else max(1, int(synthesis.right))
        if least_frames < 1:
            raise ConfigError(f"least_frames {least_frames} is out of range: give 1 or more")
        incoming = self._incoming(options)
        audio = self._streamed(mels, incoming, synthesis, least_frames, on_note or _warn)
        # The convention, and with it the delay, may be known only after the first piece.
        return delayed(audio, lambda: incoming.delay_samples)

    def look_ahead(self, refine: int | None = None) -> float:
        """Frames of the mel behind a frame of audio that it depends on; may be infinite."""
        steps = self.refine_steps if refine is None else refine
        return window_context(self.flow, self.refinement, steps).right

    def draw(
        self,
        mel: Tensor | np.ndarray,
        options: SynthesisOptions = OWN_OPTIONS,
        **changes: Any,
    ) -> Tensor:
        """A draw of the flow as it is, neither refined nor clipped; arguments as `__call__`.

        `log_prob` can be asked about it: a clipped sample has no likelihood to speak of.
        """
        options = options.changed(changes | {"refine": 0})
        given, squeezed, _ = IncomingMels(self.mel_config, options).take(mel)
        batch = self._on_device(given)
        audio = self._all_of(self._synthesis(len(batch), options), batch)
        return audio[0] if squeezed else audio

    def resynth(
        self,
        audio: Tensor | np.ndarray,
        options: SynthesisOptions = OWN_OPTIONS,
        **changes: Any,
    ) -> Tensor:
        """Copy-synthesis: audio (T,) to its mel, and new audio (T,) from the mel alone."""
        options = options.changed(changes)
        if options.convention not in (None, NATIVE):
            raise ConfigError("resynth makes the mel itself: leave the convention out")
        mel, notes = self._mel_to_copy(audio)
        speech = self.synthesise(mel, options.changed({"convention": NATIVE}))
        warn_caller(notes + speech.notes)
        return speech.audio[: len(audio)]

    def mel_to_copy(self, audio: Tensor | np.ndarray) -> Tensor:
        """The mel (M, F) of audio (T,) extended by zeros to F whole hops.

        A DC offset is removed first, with a warning: the copy would have rumble in its place.
        """
        mel, notes = self._mel_to_copy(audio)
        warn_caller(notes)
        return mel

    @torch.no_grad()
    def _mel_to_copy(self, audio: Tensor | np.ndarray) -> tuple[Tensor, list[str]]:
        samples = _checked_audio(audio, self.device)
        if samples.dim() != 1:
            raise AudioError(f"resynth takes one waveform (T,), not {tuple(samples.shape)}")
        mended, notes = without_offset(samples.cpu().numpy(), self.sample_rate)
        if notes:
            samples = torch.from_numpy(mended).to(samples)
        padded = torch.nn.functional.pad(samples, (0, -len(samples) % self.hop_length))
        return self.mel_spectrogram(padded)[:, : len(padded) // self.hop_length], notes

    def example_mel(self) -> Tensor | None:
        """The mel (M, F) of a validation clip that came with the model; None where none did."""
        return None if self.folder is None else _example_mel(self.folder)

    def denoise(
        self, audio: Tensor | np.ndarray, strength: float = 0.1, bias: Bias | None = None
    ) -> Tensor:
        """Audio (B, T) or (T,) without this model's own hum; see `waveflow.audio.denoise`.

        Args:
            strength: how often the bias is subtracted, 0 to 10.
            bias: the mel that the hum is heard in; default: the model's own (`denoiser_bias`).
        """
        return self.denoiser(bias)(_checked_audio(audio, self.device), strength)

    def denoiser(self, bias: Bias | None = None) -> Denoiser:
        """The denoiser of `denoise`; its bias, a second of synthesis, is computed once."""
        if bias is None:
            bias = self.config.model.denoiser_bias
        _ = self.decoder  # forgets denoisers of other weights
        if bias not in self._denoisers:
            self._denoisers[bias] = Denoiser.of_model(
                lambda mel: self.draw(mel, sigma=0.0), self.mel_config, bias
            )
        return self._denoisers[bias]

    def mel(self, audio: Tensor | np.ndarray) -> Tensor:
        """The mel (B, M, F) or (M, F) of audio (B, T) or (T,) in this model's convention.

        A warning tells of a DC offset, which becomes rumble in speech made from the mel.
        """
        samples = _checked_audio(audio, self.device)
        items = torch.atleast_2d(samples).cpu().numpy()
        offset = max(offset_of(item, self.sample_rate) for item in items)
        if offset:
            warn_caller([f"this audio has a DC offset of {offset:.1g}, and its mel gives rumble"])
        return self.mel_spectrogram(samples)

    @torch.no_grad()
    def log_prob(self, audio: Tensor | np.ndarray, mel: Tensor | np.ndarray) -> Tensor:
        """The density at `audio`, (B,), in nats per audio sample; higher is better.

        Where `is_bound` holds it is a lower bound: an estimate of one for a VAE, and for a
        FrameGlow the density given the best phase path, with the prior of that path.
        Uses the first floor(T / hop_length) hops of the audio and as many frames. To compare
        16-bit recordings, dequantise them first (`waveflow.audio.dequantise`).
        """
        samples, batch = self._pair(audio, mel)
        return self.flow(samples, batch)

    @torch.no_grad()
    def log_prob_by_frame(self, audio: Tensor | np.ndarray, mel: Tensor | np.ndarray) -> Tensor:
        """Where the model believes the audio, (B, F): nats per sample of each frame.

        Their mean is `log_prob`; arguments as there.

        Raises:
            ConfigError: the model's likelihood is a bound, or no sum over frames.
        """
        problem = f"the likelihood of a {self.config.model.type} is no sum over frames"
        try:
            frames, log_prob, _ = self.flow.by_frame(*self._pair(audio, mel))
        except RuntimeError as error:  # positions that are no part of a frame
            raise ConfigError(problem) from error
        if not torch.allclose(frames.mean(1), log_prob, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ConfigError(problem)
        return frames

    @torch.no_grad()
    def encode(self, audio: Tensor | np.ndarray, mel: Tensor | np.ndarray) -> Tensor:
        """The noise z (B, C, L) that `decode` turns into this audio; lengths as `log_prob`."""
        samples, batch = self._pair(audio, mel)
        return self.flow.encode(samples, batch)

    @torch.no_grad()
    def decode(self, z: Tensor, mel: Tensor | np.ndarray) -> Tensor:
        """The audio (B, T) of noise z (B, C, L): the flow's inverse, never refined.

        It undoes `encode` as exactly as the vocoder's precision allows.
        """
        batch = self._on_device(checked_mel(mel, self.mel_config.n_mels)[0])
        n_positions = batch.shape[2] * self.hop_length // self.flow.channels
        expected = (len(batch), self.flow.latent_channels, n_positions)
        if tuple(z.shape) != expected:
            raise MelMismatchError(f"z is {tuple(z.shape)}; this mel needs {expected}")
        # Decoders run in inference mode, and training cannot use a tensor of it.
        return self.decoder(z.to(self.device), batch).clone()

    def _pair(self, audio: Tensor | np.ndarray, mel: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
        """Audio (B, T) and mel (B, M, F) cut to the same whole hops."""
        samples = _checked_audio(audio, self.device, MOST_PEAK_OF_DRAW)
        samples = samples[None] if samples.dim() == 1 else samples
        batch = self._on_device(checked_mel(mel, self.mel_config.n_mels)[0])
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

    def _incoming(self, options: SynthesisOptions) -> IncomingMels:
        likelier = partial(likelier_bands, self)
        return IncomingMels(self.mel_config, options, self.judges_mels, likelier)

    def _on_device(self, mel: Floats) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(mel)).to(self.device)

    def _synthesis(
        self,
        n_items: int,
        options: SynthesisOptions,
        lengths: Tensor | None = None,
        look_ahead: float = math.inf,
    ) -> WindowedSynthesis:
        own = self.config.synthesis
        sigma = own.sigma if options.sigma is None else options.sigma
        steps = self.refine_steps if options.refine is None else options.refine
        seeds = options.seeds(n_items)
        return WindowedSynthesis(
            self.flow, self.decoder, self.refinement, sigma, seeds, steps, lengths, look_ahead
        )

    def _frames(self, seconds: float | None) -> float:
        """Whole frames in seconds; infinitely many in None."""
        if seconds is None or math.isinf(seconds):
            return math.inf
        return int(seconds * self.sample_rate / self.hop_length)

    def _all_of(self, synthesis: WindowedSynthesis, batch: Tensor) -> Tensor:
        """Audio (B, F hop) of a whole batch that was checked."""
        audio = batch.new_empty(len(batch), batch.shape[2] * self.hop_length)
        done = 0
        for piece in chain(synthesis.push(batch), synthesis.finish()):
            audio[:, done : done + piece.shape[1]] = piece
            done += piece.shape[1]
        return audio

    def _streamed(
        self,
        mels: Iterable[Tensor | np.ndarray],
        incoming: IncomingMels,
        synthesis: WindowedSynthesis,
        least_frames: int,
        on_note: Callable[[str], None],
    ) -> Iterator[Tensor]:
        n_clipped, n_samples = 0, 0
        n_padding, n_frames = 0, 0

        def clipped(pieces: Iterator[Tensor], mel: Tensor) -> Iterator[Tensor]:
            nonlocal n_clipped, n_samples
            for audio in pieces:
                n_clipped += _n_clipped(audio, mel)
                n_samples += audio.shape[1]
                yield audio[0].clamp(-1, 1)

        piece = None
        for mel in mels:
            given = incoming.piece(mel)
            for note in incoming.notes if not n_frames else ():
                on_note(note)
            given, more = silence_padding(given, self._silence, after_speech=n_frames > n_padding)
            piece = self._on_device(given)
            n_padding, n_frames = n_padding + more, n_frames + piece.shape[2]
            yield from clipped(synthesis.push(piece, least_frames), piece)
        if piece is None:
            raise MelMismatchError("this stream is empty: it holds no mel")
        incoming.finish()
        yield from clipped(synthesis.finish(), piece)
        for note in padding_notes(n_padding, n_frames) + clipping_notes(n_clipped, n_samples):
            on_note(note)


def _checked_audio(audio: Any, device: torch.device, most_peak: float = MOST_PEAK) -> Tensor:
    """(T,) or (B, T) float32 on the device; integers are scaled by their type's range.

    Raises:
        AudioError: another shape, empty, no real numbers, samples that are not finite or beyond
            `most_peak`.
    """
    samples = audio_tensor(audio).detach().to(device, torch.float32)
    check_shape(samples.shape)
    low, high = samples.aminmax()
    check_range(float(low), float(high), most_peak)
    return samples


def warn_caller(notes: Sequence[str]) -> None:
    """Makes warnings of notes, which name the line that called the vocoder's method."""
    for note in notes:
        warnings.warn(note, VocoderWarning, stacklevel=_CALLER)


def _warn(note: str) -> None:
    # Past this function and two generators, to the line that asks for the next piece.
    warnings.warn(note, VocoderWarning, stacklevel=_CALLER + 1)


def _n_clipped(audio: Tensor, mel: Tensor) -> int:
    """Samples beyond [-1, 1].

    Raises:
        MelMismatchError: samples that are not finite.
        CheckpointError: the same, for a mel that is like speech.
    """
    # Neither this nor the count makes a second array of the audio's size.
    if not all(math.isfinite(end) for end in audio.aminmax()):
        low, high = mel.aminmax()
        if low > -24 and high < 4:
            raise CheckpointError(
                "this model gives samples that are not finite for a mel as speech has it: its "
                "training has diverged, or its weights were changed; use another checkpoint"
            )
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
    """The model that ships, another one by name, a checkpoint or run folder, or one of the Hub.

    Args:
        model: None for the default; `list_models()` has the names. "ORG/NAME", or
            "ORG/NAME@REVISION" for a branch, tag or commit, is a model of the Hugging Face Hub
            (extra `hub`), unless a folder here has that name.
        verify: check the files' hashes against the manifest.
        device: where it runs.
        precision: of the networks' matrix products: float32, bfloat16, float16 (GPU) or int8
            (CPU, extra `int8`); "auto" picks the faster of the first two. A CPU that emulates
            bfloat16 or int8, more slowly than float32, gets float32. The choice is logged.
        compile: torch.compile; the first call then takes half a minute or more.

    Raises:
        CheckpointError: unknown, missing or damaged, or not to be had from the Hub.
        ConfigError: this machine or installation lacks the device or the precision.
    """
    # A pool of OpenMP belongs to the thread that starts it and ends with it. One that is left in
    # the caller's thread would hang every process that a server forks from this one.
    with ThreadPoolExecutor(1) as loader:
        vocoder = loader.submit(_loaded, model, verify, precision, compile).result()
    return vocoder if str(device) == "cpu" else vocoder.to(device)


def _loaded(
    model: str | Path | None,
    verify: bool,
    precision: Precision | Literal["auto"],
    compile: bool,
) -> Vocoder:
    """The vocoder on the CPU."""
    folder = model_folder(model)
    config, flow = load_checkpoint(folder, verify)
    if config.provenance.phase:
        logger.warning(
            "the flow of %s is not trained: its training was stopped in its first phase (%s)",
            folder,
            config.provenance.phase,
        )
    if precision not in (*get_args(Precision), "auto"):
        names = ", ".join((*get_args(Precision), "auto"))
        raise ConfigError(f"precision {precision!r} is none of {names}")
    probed = precision in ("auto", "bfloat16", "int8")
    mel = _calibration_mel(folder, config.mel) if probed else None
    decoder_of = partial(_decoder_of, wish=precision, mel=mel, compile=compile)
    return Vocoder(config, flow, decoder_of, folder)


def _decoder_of(
    flow: Flow, wish: Precision | Literal["auto"], mel: Tensor | None, compile: bool
) -> Decoder:
    if mel is None:
        return make_decoder(flow, cast(Precision, wish), compile)
    decoder, precision, reason = choose_decoder(flow, mel, cast(Any, wish), compile)
    refused = wish not in ("auto", precision)
    logger.log(logging.WARNING if refused else logging.INFO, "runs in %s: %s", precision, reason)
    return decoder


def _example_mel(folder: Path) -> Tensor | None:
    # It comes with soundfile, which users who bring their own mels can do without.
    from waveflow.audio.io import read_mel

    path = folder / EXAMPLE
    if not os.path.lexists(path):
        return None
    try:
        check_plain(path, folder)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return torch.from_numpy(read_mel(path))


def _calibration_mel(folder: Path, config: MelConfig) -> Tensor:
    """The example (M, F) that came with a checkpoint, or something like speech."""
    example = _example_mel(folder)
    return speech_like_mel(config.n_mels) if example is None else example
