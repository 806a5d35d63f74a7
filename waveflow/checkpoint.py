"""Checkpoints: a folder of config.json, model.safetensors and a manifest of their hashes.

A run's checkpoints hold training.safetensors and state.json beside them. A folder is written
under a temporary name, synced and renamed, so that it is whole or not there. Nothing in it is
ever executed: weights are safetensors, configs are JSON that names no code.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from waveflow.audio.mel import MelConfig
from waveflow.errors import CheckpointError
from waveflow.flow import Flow
from waveflow.models.registry import AnyFlowConfig, build_flow, first_problem

FORMAT = 1
# The mel of a validation clip, with a model that ships.
EXAMPLE = "example.npy"
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

    sigma: float = Field(default=1.0, ge=0)
    refine_steps: int = Field(default=0, ge=0, le=4)
    refine_power: float = Field(default=1.0, gt=0)
    refine_momentum: float = Field(default=0.0, ge=0)


class Provenance(BaseModel):
    """Where weights come from.

    Attributes:
        data: the corpora, in words.
        licence: of the weights.
        steps, minutes: optimizer steps, and time spent in training.
        log_likelihood: of validation speech, nats per audio sample.
        draw_log_likelihood: of the model's own draws for the same mels.
        mel_range: lowest and highest value of each mel band in the training data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = ""
    licence: str = ""
    steps: int = 0
    minutes: float = 0.0
    log_likelihood: float | None = None
    draw_log_likelihood: float | None = None
    mel_range: tuple[tuple[float, ...], tuple[float, ...]] | None = None


class ModelConfig(BaseModel):
    """All of config.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    model: AnyFlowConfig
    mel: MelConfig
    synthesis: SynthesisConfig = SynthesisConfig()
    provenance: Provenance = Provenance()


def save_checkpoint(
    folder: Path,
    config: ModelConfig,
    weights: dict[str, Tensor],
    extra: dict[str, bytes] | None = None,
) -> None:
    """Writes a checkpoint folder; an older one of this name is replaced.

    A folder cannot be exchanged in one step everywhere: the older one is renamed to
    `.NAME.old` first and removed last, so that at every moment one of the two is there, whole.

    Args:
        folder: its parent exists.
        weights: the model's state dict.
        extra: further files by name, for runs.
    """
    files = {
        CONFIG: (config.model_dump_json(indent=1) + "\n").encode(),
        WEIGHTS: save_safetensors({k: v.detach().cpu().contiguous() for k, v in weights.items()}),
        **(extra or {}),
    }
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files[MANIFEST] = manifest_bytes(hashes)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for name, data in files.items():
            with open(temporary / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _exchange(temporary, folder, old)
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoint {folder}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(new: Path, folder: Path, old: Path) -> None:
    """Puts `new` in the place of `folder`, which stays if that fails."""
    if not folder.exists():
        os.rename(new, folder)
    else:
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        try:
            os.rename(new, folder)
        except BaseException:
            os.rename(old, folder)
            raise
    shutil.rmtree(old, ignore_errors=True)


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint folder; a half-removed one has no checkpoint's name."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(folder, old)
    shutil.rmtree(old, ignore_errors=True)


def manifest_bytes(hashes: dict[str, str]) -> bytes:
    """The manifest of files with these SHA-256 hashes, the only spelling of it that is read."""
    return (json.dumps({"format": FORMAT, "sha256": hashes}, indent=1) + "\n").encode()


def read_files(folder: Path, verify: bool = True) -> dict[str, bytes]:
    """The files of a checkpoint folder, their hashes checked against the manifest."""
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
        if Path(name).name != name:
            raise CheckpointError(f"{folder / MANIFEST} names a file outside the folder: {name!r}")
        files[name] = _read(folder, name)
        if verify and hashlib.sha256(files[name]).hexdigest() != expected:
            raise CheckpointError(f"{folder / name} is damaged: its SHA-256 is not the manifest's")
    # Nothing has the manifest's own hash: damage between its words shows in its spelling.
    if verify and data != manifest_bytes(hashes):
        raise CheckpointError(f"{folder / MANIFEST} is damaged: waveflow spells it otherwise")
    return files


def load_checkpoint(folder: Path, verify: bool = True) -> tuple[ModelConfig, Flow]:
    """Config and Flow, in evaluation mode, of a checkpoint folder or a run folder.

    A run folder gives its best checkpoint by validation likelihood.

    Raises:
        CheckpointError: missing, damaged, of another format, or weights that do not fit.
    """
    folder = resolve_run(folder, "best")
    files = read_files(folder, verify)
    config = parse_config(files[CONFIG], folder / CONFIG)
    flow = build_flow(config.model, config.mel)
    load_weights(flow, parse_tensors(files[WEIGHTS], folder / WEIGHTS), folder)
    return config, flow.eval()


def resolve_run(folder: Path, which: str) -> Path:
    """The `best` or `last` checkpoint of a run folder; a checkpoint folder is itself."""
    pointer = folder / RUN_POINTER
    if not pointer.is_file():
        return folder
    name = _json(pointer.read_bytes(), pointer).get(which)
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(f"{pointer} names no {which} checkpoint")
    return folder / name


def run_checkpoints(run: Path) -> list[Path]:
    """All checkpoints of a run folder, whole or not, the newest first."""
    return sorted(run.glob("step-*"), reverse=True)


def parse_config(data: bytes, path: Path) -> ModelConfig:
    """config.json, with its errors as one line."""
    try:
        return ModelConfig.model_validate_json(data)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {first_problem(error)}") from error


def parse_tensors(data: bytes, path: Path) -> dict[str, Tensor]:
    """A safetensors file, with its errors as one line."""
    try:
        return load_safetensors(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a type that torch lacks
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


def load_weights(flow: Flow, weights: dict[str, Tensor], source: Path) -> None:
    """Fills a flow; float16 weights become float32."""
    expected = flow.state_dict()
    missing, unknown = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    for problem, names in (("lacks", missing), ("has the unknown", unknown)):
        if names:
            raise CheckpointError(
                f"{source} {problem} tensor {min(names)!r} ({len(names)} such): "
                "weights and config do not fit"
            )
    fitted = {}
    for name, tensor in weights.items():
        own = expected[name]
        kinds_differ = tensor.is_floating_point() != own.is_floating_point()
        if tensor.shape != own.shape or kinds_differ:
            raise CheckpointError(
                f"{source}: {name} is {tensor.dtype} {tuple(tensor.shape)}, the config makes it "
                f"{own.dtype} {tuple(own.shape)}"
            )
        fitted[name] = tensor.to(own.dtype)
        if not torch.isfinite(fitted[name]).all():
            raise CheckpointError(f"{source}: {name} holds values that are not finite")
    flow.load_state_dict(fitted)


def _read(folder: Path, name: str) -> bytes:
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint folder {folder}")
    try:
        return (folder / name).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise CheckpointError(f"{folder} has no readable {name!r}: not a checkpoint") from error


def _json(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value
