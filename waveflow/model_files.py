"""The files of a model's folder: their names, their hashes, and their facts without the network.

Nothing here imports torch, so `waveflow info` answers at once. `checkpoint` writes the folder and
builds the network.
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from waveflow.audio.mel_config import MelConfig
from waveflow.door import check_plain, is_plain_name, read_plain
from waveflow.errors import CheckpointError
from waveflow.limits import DOCUMENT_BYTES, TENSORS, WEIGHTS_BYTES

FORMAT = 1
# The mel of a validation clip, with a model that ships.
EXAMPLE = "example.npy"
# What a reader should know of the model. It has no hash, so that it can be edited.
CARD = "README.md"
CONFIG, WEIGHTS, MANIFEST, RUN_POINTER = (
    "config.json",
    "model.safetensors",
    "manifest.json",
    "checkpoints.json",
)


class SynthesisConfig(BaseModel):
    """How a model is meant to be sampled.

    Attributes:
        sigma: standard deviation of the noise.
        refine_steps: mel refinement steps after the draw (audio/refine.py).
        refine_power, refine_momentum: p and a of a refinement step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sigma: float = Field(default=1.0, ge=0, le=10)
    refine_steps: int = Field(default=0, ge=0, le=64)
    refine_power: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    refine_momentum: float = Field(default=0.0, ge=0, allow_inf_nan=False)


# What validation measures of speech and of draws alike (`Flow.measure`).
LIKELIHOODS = LOG_LIKELIHOOD, LOWER_BOUND = "log-likelihood", "lower bound"


class Provenance(BaseModel):
    """Origin of the weights.

    Attributes:
        data: the corpora, in words.
        licence: licence of the weights.
        steps, minutes: optimizer steps, and time spent in training.
        phase: the model's own first phase, such as "pitch head", if training was stopped in it: the
            flow is then as it began. Empty for a flow that was trained.
        measure: the name of what validation measured (`Flow.measure`).
        log_likelihood: its value for validation speech, nats per audio sample.
        draw_log_likelihood: of the model's own draws for the same mels.
        mel_range: lowest and highest value of each mel band in the training data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = ""
    licence: str = ""
    steps: int = Field(default=0, ge=0)
    minutes: float = Field(default=0.0, ge=0)
    phase: str = ""
    measure: str = LOG_LIKELIHOOD
    log_likelihood: float | None = None
    draw_log_likelihood: float | None = None
    mel_range: tuple[tuple[float, ...], tuple[float, ...]] | None = None


class NamedModel(BaseModel):
    """The part of every model's config that needs none of its code: its name."""

    model_config = ConfigDict(frozen=True, extra="allow")

    type: str


class ModelCard(BaseModel):
    """config.json, with the model's own settings unread."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    model: NamedModel
    mel: MelConfig
    synthesis: SynthesisConfig = SynthesisConfig()
    provenance: Provenance = Provenance()

    @model_validator(mode="after")
    def _mel_fits(self) -> Self:
        if self.mel.model_problem:
            raise ValueError(self.mel.model_problem)
        n_mels = self.mel.n_mels
        for bound in self.provenance.mel_range or ():
            if len(bound) != n_mels:
                raise ValueError(
                    f"provenance.mel_range has {len(bound)} values for {n_mels} mel bands"
                )
        return self


def read_card(folder: Path, verify: bool = True) -> ModelCard:
    """Reads the config of a checkpoint folder without knowing its model.

    Args:
        folder: a checkpoint folder.
        verify: whether to check the hashes of the folder's files.

    Raises:
        CheckpointError: missing, damaged, or of another format.
    """
    try:
        return ModelCard.model_validate_json(read_files(folder, verify)[CONFIG])
    except ValidationError as error:
        raise CheckpointError(f"{folder / CONFIG}: {first_problem(error)}") from error


def count_weights(folder: Path) -> int:
    """Counts the real numbers in a checkpoint's file of weights: the model's parameters.

    Raises:
        CheckpointError: missing, or not a safetensors file.
    """
    path = folder / WEIGHTS
    try:
        check_plain(path, folder)
        with open(path, "rb") as file:
            tensors = read_header(file.read(8 + DOCUMENT_BYTES.value), path, path.stat().st_size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    # Flags and counters are integers.
    return sum(math.prod(shape) for dtype, shape in tensors.values() if "F" in dtype)


def read_header(data: bytes, path: Path, n_bytes: int) -> dict[str, tuple[str, list[int]]]:
    """Reads the types and shapes of the tensors in a safetensors file, by name.

    Args:
        data: the file, or its beginning.
        path: for messages.
        n_bytes: of the whole file.

    Raises:
        CheckpointError: not a safetensors file, or its header is beyond the limits.
    """
    # The file begins with the length of a JSON object, which has all shapes.
    length = int.from_bytes(data[:8], "little")
    if length > n_bytes - 8:
        raise CheckpointError(f"{path} is not a safetensors file: its header is cut off")
    DOCUMENT_BYTES.check(f"the header of {path} has", length, CheckpointError)
    header = _json(data[8 : 8 + length], path, "a safetensors file")
    header.pop("__metadata__", None)
    TENSORS.check(f"{path} has", len(header), CheckpointError)
    tensors = {}
    for name, tensor in header.items():
        try:
            dtype, shape = str(tensor["dtype"]), list(tensor["shape"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not a safetensors file: no shape of {name!r:.60}"
            ) from error
        if len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
            raise CheckpointError(
                f"{path} is not a safetensors file: {name!r:.60} has an odd shape"
            )
        tensors[name] = dtype, shape
    return tensors


def read_files(folder: Path, verify: bool = True) -> dict[str, bytes]:
    """Reads the files of a checkpoint folder and checks their hashes against the manifest.

    Raises:
        CheckpointError: a file is missing or damaged, or the folder has another format.
    """
    data = _read(folder, MANIFEST)
    manifest = _json(data, folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {manifest.get('format')!r}; this waveflow reads "
            f"{FORMAT}: update waveflow"
        )
    hashes = manifest.get("sha256")
    if not isinstance(hashes, dict) or not {CONFIG, WEIGHTS} <= hashes.keys():
        raise CheckpointError(f"{folder / MANIFEST} does not list {CONFIG} and {WEIGHTS}")
    files = {}
    for name, expected in hashes.items():
        if not is_plain_name(name):
            raise CheckpointError(f"{folder / MANIFEST} names a file outside the folder: {name!r}")
        files[name] = _read(folder, name)
        if verify and hashlib.sha256(files[name]).hexdigest() != expected:
            raise CheckpointError(f"{folder / name} is damaged: its SHA-256 is not the manifest's")
    # The manifest has no hash of its own, so damage to it is found by its exact spelling.
    if verify and data != manifest_bytes(hashes):
        raise CheckpointError(f"{folder / MANIFEST} is damaged: waveflow spells it otherwise")
    return files


def manifest_bytes(hashes: dict[str, str]) -> bytes:
    """Returns the manifest of files with these SHA-256 hashes, in the only accepted spelling."""
    return (json.dumps({"format": FORMAT, "sha256": hashes}, indent=1) + "\n").encode()


def resolve_run(folder: Path, which: str) -> Path:
    """Returns the `best` or `last` checkpoint of a run folder, or the checkpoint folder itself."""
    pointer = folder / RUN_POINTER
    if not os.path.lexists(pointer):
        return folder
    name = _json(_read(folder, RUN_POINTER), pointer).get(which)
    if not is_plain_name(name):
        raise CheckpointError(f"{pointer} names no {which} checkpoint")
    checkpoint = folder / str(name)
    if checkpoint.is_symlink():
        raise CheckpointError(f"{checkpoint} is a link: a run's checkpoints are folders in it")
    return checkpoint


def run_checkpoints(run: Path) -> list[Path]:
    """Returns all checkpoints of a run folder, whole or not, the newest first."""
    # A link is none of them: it could lead anywhere.
    return sorted((f for f in run.glob("step-*") if not f.is_symlink()), reverse=True)


def first_problem(error: ValidationError) -> str:
    """Returns the first problem of a pydantic error as `field: message (got value)`."""
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"]) or "config"
    if problem["type"] == "flow_config":
        return f"{field}.{problem['msg']}"
    given = repr(problem.get("input"))
    given = given if len(given) <= 60 else given[:57] + "..."
    return f"{field}: {problem['msg']} (got {given})"


def _read(folder: Path, name: str) -> bytes:
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint folder {folder}")
    most = DOCUMENT_BYTES if name.endswith(".json") else WEIGHTS_BYTES
    try:
        return read_plain(folder / name, most, CheckpointError, folder)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no readable {name!r}: not a checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error.strerror}") from error


def _json(data: bytes, path: Path, kind: str = "JSON") -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not {kind}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not {kind}: it holds no JSON object")
    return value
