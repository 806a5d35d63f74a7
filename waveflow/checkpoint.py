"""Checkpoints: a folder of config.json, model.safetensors and a manifest of their hashes.

A run's checkpoints hold training.safetensors and state.json beside them. A folder is written
under a temporary name, synced and renamed, so that it is whole or not there. Nothing in it is
ever executed: weights are safetensors, configs are JSON that names no code.
"""

import ctypes
import hashlib
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from waveflow.budget import Budget
from waveflow.errors import CheckpointError
from waveflow.files import temporary_folder
from waveflow.flow import Flow
from waveflow.limits import MODEL_TENSORS
from waveflow.model_files import CONFIG, MANIFEST, WEIGHTS, ModelCard, first_problem, read_header
from waveflow.model_files import EXAMPLE as EXAMPLE
from waveflow.model_files import FORMAT as FORMAT
from waveflow.model_files import RUN_POINTER as RUN_POINTER
from waveflow.model_files import Provenance as Provenance
from waveflow.model_files import SynthesisConfig as SynthesisConfig
from waveflow.model_files import manifest_bytes as manifest_bytes
from waveflow.model_files import read_files as read_files
from waveflow.model_files import resolve_run as resolve_run
from waveflow.model_files import run_checkpoints as run_checkpoints
from waveflow.models.registry import AnyFlowConfig, build_flow


class ModelConfig(ModelCard):
    """All of config.json, with the model's own settings."""

    model: AnyFlowConfig


def save_checkpoint(
    folder: Path,
    config: BaseModel,
    weights: dict[str, Tensor],
    extra: dict[str, bytes] | None = None,
) -> None:
    """Writes a checkpoint folder; an older one of this name is replaced.

    The two are exchanged in one step on Linux. Elsewhere the older one is renamed to `.NAME.old`
    first and removed last, so that at every moment one of the two is there, whole.

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
    try:
        with temporary_folder(folder) as temporary:
            for name, data in files.items():
                with open(temporary / name, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            _exchange(temporary, folder, folder.with_name(f".{folder.name}.old"))
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoint {folder}: {error}") from error


def _exchange(new: Path, folder: Path, old: Path) -> None:
    """Puts `new` in the place of `folder`, which stays if that fails."""
    if not folder.exists():
        os.rename(new, folder)
    elif _swapped(new, folder):
        shutil.rmtree(new, ignore_errors=True)
    else:
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        try:
            os.rename(new, folder)
        except BaseException:
            os.rename(old, folder)
            raise
    shutil.rmtree(old, ignore_errors=True)


def _swapped(one: Path, other: Path) -> bool:
    """Lets two folders change their names in one step, which Python has no call for; Linux alone.

    A run that is killed at any moment while it saves a checkpoint again then has it all the time.
    """
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of <fcntl.h> and <stdio.h>
    return rename is not None and rename(here, bytes(one), here, bytes(other), exchange) == 0


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint folder; a half-removed one has no checkpoint's name."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(folder, old)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path, verify: bool = True) -> tuple[ModelConfig, Flow]:
    """Config and Flow, in evaluation mode, of a checkpoint folder or a run folder.

    A run folder gives its best checkpoint by validation likelihood.

    Raises:
        CheckpointError: missing, damaged, of another format, or weights that do not fit.
    """
    folder = resolve_run(folder, "best")
    files = read_files(folder, verify)
    config = parse_config(files[CONFIG], folder / CONFIG)
    weights = parse_tensors(files[WEIGHTS], folder / WEIGHTS)
    # Inputs are float32, whatever torch's default type is when a model is loaded.
    flow = build_flow(config.model, config.mel, budget_of(weights, folder)).float()
    load_weights(flow, weights, folder)
    return config, flow.eval()


def budget_of(weights: Mapping[str, Tensor], source: Path) -> Budget:
    """How large a network may become that is built for these weights."""
    MODEL_TENSORS.check(f"the model in {source} has", len(weights), CheckpointError)
    n_numbers = sum(tensor.numel() for tensor in weights.values())
    reason = (
        f"{source}: the config asks for a larger model than its weights are, which have "
        f"{n_numbers:,} numbers in {len(weights)} tensors: weights and config do not fit"
    )
    return Budget(len(weights), n_numbers, reason, CheckpointError)


def parse_config(data: bytes, path: Path) -> ModelConfig:
    """config.json, with its errors as one line."""
    try:
        return ModelConfig.model_validate_json(data)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {first_problem(error)}") from error


def parse_tensors(data: bytes, path: Path) -> dict[str, Tensor]:
    """A safetensors file, with its errors as one line."""
    read_header(data, path, len(data))
    try:
        return load_safetensors(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a type that torch lacks
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Fills a model; float16 weights become float32."""
    expected = model.state_dict()
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
    model.load_state_dict(fitted)
