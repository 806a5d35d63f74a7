"""OnnxVocoder: an exported graph under onnxruntime. Nothing here imports torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from waveflow.door import read_plain
from waveflow.engine.checks import Floats, clipping_notes, padding_notes, silence_padding
from waveflow.engine.incoming import IncomingMels
from waveflow.engine.options import OWN_OPTIONS, Speech, SynthesisOptions
from waveflow.errors import CheckpointError, ConfigError
from waveflow.export.card import AUDIO, CARD, FEWEST_FRAMES, MEL, NOISE, SIGMA, GraphCard
from waveflow.limits import WEIGHTS_BYTES

# onnxruntime's number of errors; warnings of its own would go to stderr.
_ERRORS_ONLY = 3


class OnnxVocoder:
    """Speech from mels by a graph that `waveflow export` has made.

    Args:
        path: of the .onnx file.
        threads: of the CPU; None: onnxruntime's choice.

    Attributes:
        card: what the graph says of itself.
        sample_rate: in Hz.

    Raises:
        CheckpointError: the file is missing, damaged, or no graph of ours.
        ConfigError: onnxruntime is missing.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ConfigError(
                "--backend onnx needs onnxruntime: pip install onnxruntime"
            ) from error
        try:
            content = read_plain(path, WEIGHTS_BYTES, CheckpointError)
        except OSError as error:
            raise CheckpointError(f"cannot read graph {path}: {error.strerror}") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = _ERRORS_ONLY
        try:
            providers = ["CPUExecutionProvider"]
            self._session: Any = onnxruntime.InferenceSession(content, options, providers)
        except Exception as error:  # onnxruntime's errors have no common class
            reason = str(error).splitlines()[0][:200]
            raise CheckpointError(f"{path} is no ONNX graph ({reason})") from error
        self.card = _card_of(self._session, path)
        self._inputs = {value.name for value in self._session.get_inputs()}
        outputs = {value.name for value in self._session.get_outputs()}
        if not {MEL} <= self._inputs <= {MEL, SIGMA, NOISE} or outputs != {AUDIO}:
            raise CheckpointError(f"{path} has other inputs than `waveflow export` makes")
        self.sample_rate = self.card.mel.sample_rate

    def synthesise(self, mel: Any, options: SynthesisOptions = OWN_OPTIONS) -> Speech:
        """Speech for a mel, which the graph takes as a whole; as `Vocoder.synthesise`.

        A seed gives another draw than torch's.

        Args:
            mel: (B, M, F) or (M, F).
            options: those that the graph does not fix.

        Returns:
            Its audio is an array (B, F hop_length) or (F hop_length,), float32 in [-1, 1].

        Raises:
            MelMismatchError: as `Vocoder.__call__`.
            ConfigError: an option that the graph fixes has another value.
        """
        card = self.card
        self._check(options)
        incoming = IncomingMels(card.mel, options, card.judges)
        batch, squeezed, _ = incoming.take(mel)
        silence = float(np.log(card.mel.log_floor))
        batch, n_padding = silence_padding(batch, silence)
        notes = incoming.notes + padding_notes(n_padding, len(batch) * batch.shape[2])
        audio = self._spoken(np.ascontiguousarray(batch), options, silence)
        notes += clipping_notes(int((np.abs(audio) >= 1).sum()), audio.size)
        audio = _moved(audio, incoming.delay_samples)
        return Speech(audio[0] if squeezed else audio, None, notes)

    def _check(self, options: SynthesisOptions) -> None:
        card = self.card
        if options.sigma not in (None, card.sigma) and SIGMA not in self._inputs:
            raise ConfigError(
                f"sigma {options.sigma:g}: this graph has {card.sigma:g} inside; export it with "
                "--inputs sigma"
            )
        if options.refine not in (None, card.refine):
            raise ConfigError(
                f"refine {options.refine}: this graph has {card.refine} inside; export it with "
                f"--refine {options.refine}"
            )
        if options.seed != 0 and NOISE not in self._inputs:
            raise ConfigError(
                f"seed {options.seed}: this graph draws its noise itself; export it with "
                "--inputs noise"
            )

    def _spoken(self, batch: Floats, options: SynthesisOptions, silence: float) -> Floats:
        n_samples = batch.shape[2] * self.card.mel.hop_length
        missing = max(0, FEWEST_FRAMES - batch.shape[2])
        batch = np.pad(batch, ((0, 0), (0, 0), (0, missing)), constant_values=silence)
        inputs: dict[str, Any] = {MEL: batch}
        if SIGMA in self._inputs:
            sigma = self.card.sigma if options.sigma is None else options.sigma
            inputs[SIGMA] = np.array(sigma, np.float32)
        if NOISE in self._inputs:
            shape = self.card.noise_channels, batch.shape[2] * self.card.noise_per_frame
            # The same for an item whatever comes behind it: time is drawn last.
            draws = [
                np.random.default_rng(abs(seed)).standard_normal(shape[::-1], np.float32).T
                for seed in options.seeds(len(batch))
            ]
            inputs[NOISE] = np.stack(draws)
        try:
            [audio] = self._session.run([AUDIO], inputs)
        except Exception as error:  # onnxruntime's errors have no common class
            reason = str(error).splitlines()[0][:200]
            raise CheckpointError(f"this graph fails on its own mels ({reason})") from error
        wanted = (len(batch), batch.shape[2] * self.card.mel.hop_length)
        if audio.shape != wanted or audio.dtype != np.float32:
            raise CheckpointError(f"this graph gives {audio.dtype} {audio.shape}, not {wanted}")
        if not np.isfinite(audio).all():
            raise CheckpointError("this graph gives samples that are not finite")
        return audio[:, :n_samples]


def _card_of(session: Any, path: Path) -> GraphCard:
    """The card of a graph, checked."""
    text = session.get_modelmeta().custom_metadata_map.get(CARD)
    if text is None:
        raise CheckpointError(
            f"{path} does not say what mel it takes: make it by `waveflow export`"
        )
    try:
        return GraphCard.model_validate(json.loads(text))
    except (ValidationError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} says something odd of its mel: export it again") from error


def _moved(audio: Floats, n_samples: int) -> Floats:
    """Audio (B, N) moved by some samples, back if negative, with zeros in the place."""
    if not n_samples:
        return audio
    moved = np.zeros_like(audio)
    if n_samples > 0:
        moved[:, n_samples:] = audio[:, :-n_samples]
    else:
        moved[:, :n_samples] = audio[:, -n_samples:]
    return moved
