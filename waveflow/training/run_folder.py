"""A run's folder: what is written when a run starts, its checkpoints, and how it is taken up again.

A run folder holds `recipe.json` and `run.json`, written once; a copy of the `teacher`, if it has
one, so that it can be resumed wherever that was; `metrics.csv`; checkpoints
`step-NNNNNNNN`, each with the moments and the state that a resume needs; and `checkpoints.json`,
which names the last checkpoint, the one before it and the best. All others are removed.
"""

import functools
import json
import logging
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save as save_safetensors
from torch import Tensor

from waveflow.checkpoint import (
    CONFIG,
    MANIFEST,
    RUN_POINTER,
    WEIGHTS,
    ModelConfig,
    Provenance,
    load_checkpoint,
    load_weights,
    parse_config,
    parse_tensors,
    read_files,
    remove_checkpoint,
    run_checkpoints,
    save_checkpoint,
)
from waveflow.data.cache import AUDIO_FILE, MEL_FILE, TrainingCache, file_sha256
from waveflow.door import read_plain
from waveflow.errors import CheckpointError, ConfigError
from waveflow.files import atomic_path, lock, reason_of
from waveflow.flow import Flow
from waveflow.limits import DOCUMENT_BYTES
from waveflow.models.registry import first_problem
from waveflow.pretrained import model_folder
from waveflow.training.config import MOST_STEPS, Recipe

logger = logging.getLogger(__name__)

RECIPE, RUN_RECORD, TEACHER, LOCK = "recipe.json", "run.json", "teacher", ".lock"
TRAINING, STATE = "training.safetensors", "state.json"
# What AdamW keeps of each parameter.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class RunState(BaseModel):
    """state.json: where a run stands, beside its weights and moments.

    Attributes:
        step: steps done.
        minutes: of training.
        skipped: steps whose loss or gradient was not finite.
        pitch_steps: steps of the phases before the last; 0 if the run started from weights.
        best: highest validation log-likelihood.
        best_name: the checkpoint that has it.
        audio_sha256, mel_sha256: hashes of the data; the latter if mels were given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int = Field(ge=0, le=MOST_STEPS)
    minutes: float = Field(ge=0, allow_inf_nan=False)
    skipped: int = Field(ge=0, le=MOST_STEPS)
    pitch_steps: int = Field(ge=0, le=MOST_STEPS)
    best: Annotated[float, Field(allow_inf_nan=False)] | None
    best_name: Annotated[str, Field(pattern=r"\Astep-[0-9]{8}\z")] | None
    audio_sha256: str
    mel_sha256: str | None = None

    @property
    def name(self) -> str:
        """The name of the checkpoint of this step."""
        return checkpoint_name(self.step)


class Saved(NamedTuple):
    """A checkpoint of a run.

    Attributes:
        state: where the run stands.
        provenance: of the weights.
        averaged: the running mean of the weights.
        training: raw weights and moments, by name (`training_tensors`).
    """

    state: RunState
    provenance: Provenance
    averaged: dict[str, Tensor]
    training: dict[str, Tensor]


class Teacher(NamedTuple):
    """A trained model that another one learns from: its folder, and what was in it."""

    folder: Path
    config: ModelConfig
    flow: Flow


class RunFolder:
    """Writes and reads the folder of a run. Only rank 0 may write.

    Args:
        path: of the folder.
        recipe: the run's recipe.
        cache: the run's data.
    """

    def __init__(self, path: Path, recipe: Recipe, cache: TrainingCache) -> None:
        self.path, self.recipe, self.cache = path, recipe, cache

    def lock(self) -> AbstractContextManager[None]:
        """Keeps other processes out of the folder.

        Raises:
            ConfigError: another one trains in it.
        """
        return lock(self.path / LOCK, f"the run {self.path}")

    def load_teacher(self, goes_on: bool, device: torch.device) -> "Teacher | None":
        """The model that the recipe names as its teacher, in evaluation mode, its weights frozen.

        Args:
            goes_on: whether the run has begun; it then has a copy of its own.
            device: of the training.

        Raises:
            CheckpointError: the model is missing or damaged.
            ConfigError: its mel settings are not the recipe's.
        """
        name = self.recipe.train.teacher
        if not name:
            return None
        try:
            folder = self.path / TEACHER if goes_on else model_folder(name)
            config, flow = load_checkpoint(folder)
        except CheckpointError as error:
            raise CheckpointError(f"the teacher of this run: {error}") from error
        for field in type(config.mel).model_fields:
            its, own = (getattr(mel, field) for mel in (config.mel, self.recipe.mel))
            if its != own:
                raise ConfigError(
                    f"teacher {name} has other mel settings than the recipe: {field} {its}, "
                    f"not {own}"
                )
        return Teacher(folder, config, flow.requires_grad_(False).to(device))

    def start(
        self,
        device: torch.device,
        data: str,
        init: Path | None,
        teacher: "Teacher | None" = None,
    ) -> None:
        """Makes the folder with its recipe, the record of the run and a copy of its teacher.

        Args:
            device: of the training.
            data: the data in words.
            init: folder of the weights that the run starts from.
            teacher: see `load_teacher`.

        Raises:
            ConfigError: the folder holds a run or cannot be written.
        """
        if self.has_checkpoints():
            raise ConfigError(f"{self.path} holds a run: use --resume or name another folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _write_text(self.path / RECIPE, self.recipe.model_dump_json(indent=1) + "\n")
            origin = None if teacher is None else teacher.folder
            record = run_record(self.recipe, self.cache, device, data, init, origin)
            _write_text(self.path / RUN_RECORD, record)
            if teacher is not None:
                save_checkpoint(self.path / TEACHER, teacher.config, teacher.flow.state_dict())
        except OSError as error:
            reason = reason_of(error, self.path)
            raise ConfigError(f"cannot write the run {self.path}: {reason}") from error

    def has_checkpoints(self) -> bool:
        """Whether the folder holds a run that can be resumed."""
        return bool(run_checkpoints(self.path))

    def state(self, **fields: Any) -> RunState:
        """A state with these fields and the hashes of the run's data."""
        audio_sha256, mel_sha256 = self._data_hashes()
        return RunState(**fields, audio_sha256=audio_sha256, mel_sha256=mel_sha256)

    def save(self, saved: Saved) -> None:
        """Writes a checkpoint, then points to it, then removes older ones.

        A kill at any moment leaves the older checkpoints or the new one whole.
        """
        config = ModelConfig(
            model=self.recipe.model,
            mel=self.recipe.mel,
            synthesis=self.recipe.synthesis,
            provenance=saved.provenance,
        )
        tensors = {name: t.cpu().contiguous() for name, t in saved.training.items()}
        extra = {
            TRAINING: save_safetensors(tensors),
            STATE: (saved.state.model_dump_json(indent=1) + "\n").encode(),
        }
        save_checkpoint(self.path / saved.state.name, config, saved.averaged, extra)
        keep = self._point(saved.state.name, saved.state.best_name)
        with writing(self.path):
            self._clean(saved.state.name, keep)

    def drop(self, name: str, best: str | None) -> str | None:
        """Removes a checkpoint that a run cannot go on from, unless it is the best.

        Returns:
            The newest checkpoint that is left.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        with writing(self.path):
            if name != best and (self.path / name).is_dir():
                remove_checkpoint(self.path / name)
            left = run_checkpoints(self.path)
            if left:
                self._point(left[0].name, best)
                return left[0].name
            (self.path / RUN_POINTER).unlink(missing_ok=True)
        return None

    def load_newest(self, load: Callable[[Saved], None]) -> tuple[str, RunState]:
        """Loads the newest whole checkpoint; returns its name and state.

        The state names no best checkpoint if that one is damaged.

        Args:
            load: takes up a checkpoint. If it raises CheckpointError, the next older one is tried.

        Raises:
            CheckpointError: no checkpoint can be used.
            ConfigError: the recipe or the data are not those of the run.
        """
        before = self._check_recipe().train.learning_rate
        errors = []
        for folder in run_checkpoints(self.path):
            try:
                saved = self.read(folder.name)
                load(saved)
            except CheckpointError as error:
                errors.append(error)
                logger.warning("%s", error)
                continue
            if errors:
                logger.warning("going on from %s, the newest that is whole", folder)
            state = self._without_damaged_best(saved.state)
            # A kill between a checkpoint and its pointer leaves an older pointer.
            self._point(state.name, state.best_name)
            self._change_rate(before, state.step)
            return folder.name, state
        raise CheckpointError(
            f"no checkpoint in {self.path} can be resumed; the newest: {errors[0]}"
        )

    def read(self, name: str) -> Saved:
        """Reads a checkpoint of this run.

        Raises:
            CheckpointError: it is damaged, or not of the recipe's model.
            ConfigError: the run was trained on other data.
        """
        folder = self.path / name
        files = read_files(folder)
        if TRAINING not in files or STATE not in files:
            raise CheckpointError(f"{folder} holds no {TRAINING} and {STATE}: cannot resume")
        try:
            state = RunState.model_validate_json(files[STATE])
        except ValidationError as error:
            raise CheckpointError(f"{folder / STATE}: {first_problem(error)}") from error
        if state.name != name:
            raise CheckpointError(f"{folder / STATE} is that of {state.name}: not this checkpoint")
        if (state.audio_sha256, state.mel_sha256) != self._data_hashes():
            raise ConfigError(f"{self.cache.folder} is not the data of the run in {self.path}")
        config = parse_config(files[CONFIG], folder / CONFIG)
        if (config.model, config.mel) != (self.recipe.model, self.recipe.mel):
            raise CheckpointError(f"{folder / CONFIG} is not the model of the run's recipe")
        averaged = parse_tensors(files[WEIGHTS], folder / WEIGHTS)
        training = parse_tensors(files[TRAINING], folder / TRAINING)
        return Saved(state, config.provenance, averaged, training)

    def _data_hashes(self) -> tuple[str, str | None]:
        """The hashes of the audio and of the given mels, None without mels."""
        hashes = self.cache.manifest.sha256
        return hashes[AUDIO_FILE], hashes.get(MEL_FILE)

    def _check_recipe(self) -> Recipe:
        """Returns the recipe that the run had so far."""
        stored = self.path / RECIPE
        try:
            data = read_plain(stored, DOCUMENT_BYTES, ConfigError, self.path)
            recipe = Recipe.model_validate_json(data)
        except (OSError, ValidationError):
            recipe = None
        if recipe is None or _changeable(recipe) != _changeable(self.recipe):
            raise ConfigError(f"{stored} is not this recipe: resume with the recipe of the run")
        return recipe

    def _change_rate(self, before: float, step: int) -> None:
        """Writes the run's recipe anew if its learning rate is no longer the one before."""
        rate = self.recipe.train.learning_rate
        if rate != before:
            logger.warning("learning_rate %g from step %d on, %g before", rate, step, before)
            with writing(self.path):
                _write_text(self.path / RECIPE, self.recipe.model_dump_json(indent=1) + "\n")

    def _without_damaged_best(self, state: RunState) -> RunState:
        if state.best_name in (None, state.name):
            return state
        try:
            read_files(self.path / str(state.best_name))
        except CheckpointError as error:
            logger.warning("%s: the next validation makes a new best checkpoint", error)
            return state.model_copy(update={"best": None, "best_name": None})
        return state

    def _point(self, last: str, best: str | None) -> set[str]:
        """Writes the names of the last, the previous and the best checkpoint; returns them."""
        older = [f.name for f in run_checkpoints(self.path) if f.name < last]
        pointer = {
            "last": last,
            "previous": older[0] if older else last,
            "best": best or last,
        }
        with writing(self.path):
            _write_text(self.path / RUN_POINTER, json.dumps(pointer, indent=1) + "\n")
        return set(pointer.values())

    def _clean(self, name: str, keep: set[str]) -> None:
        """Removes checkpoints before `name`, and what a kill in the middle of a save left."""
        for folder in run_checkpoints(self.path):
            # Later ones stay: a newer waveflow may be able to read them.
            if folder.name < name and folder.name not in keep:
                remove_checkpoint(folder)
        for folder in self.path.glob(".step-*"):
            shutil.rmtree(folder, ignore_errors=True)
        for file in self.path.glob(".*.tmp.json"):
            file.unlink(missing_ok=True)


def checkpoint_name(step: int) -> str:
    """The name of a step's checkpoint; names sort by step."""
    return f"step-{step:08d}"


def training_tensors(flow: Flow, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Raw weights ("raw.NAME") and moments ("optimizer.KEY.NAME") by name."""
    tensors = {f"raw.{name}": tensor for name, tensor in flow.state_dict().items()}
    for name, parameter in flow.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    return tensors


def load_training_tensors(
    flow: Flow, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], source: Path
) -> None:
    """Takes up `training_tensors`.

    Raises:
        CheckpointError: they do not fit the flow; moments are then as before.
    """
    rest = dict(tensors)
    raw = {name: rest.pop(f"raw.{name}") for name in flow.state_dict() if f"raw.{name}" in rest}
    state: dict[Tensor, dict[str, Tensor]] = {}
    for name, parameter in flow.named_parameters():
        moments = {key: rest.pop(f"optimizer.{key}.{name}", None) for key in MOMENTS}
        if any(value is not None for value in moments.values()):
            state[parameter] = {
                key: _checked_moment(value, key, name, parameter, source)
                for key, value in moments.items()
            }
    if rest:
        raise CheckpointError(f"{source / TRAINING} has the unknown tensor {min(rest)!r}")
    load_weights(flow, raw, source / TRAINING)
    optimizer.state.update(state)


def _checked_moment(
    value: Tensor | None, key: str, name: str, parameter: Tensor, source: Path
) -> Tensor:
    """A moment of a parameter on its device. Others would crash the optimizer's kernels."""
    where = f"{source / TRAINING}: {key} of {name}"
    if value is None:
        raise CheckpointError(f"{where} is missing: cannot resume")
    shape = torch.Size() if key == "step" else parameter.shape
    dtype = torch.float32 if key == "step" else parameter.dtype
    if (value.shape, value.dtype) != (shape, dtype):
        raise CheckpointError(
            f"{where} is {value.dtype} {tuple(value.shape)}, expected {dtype} {tuple(shape)}"
        )
    if not value.isfinite().all() or (key != "exp_avg" and (value < 0).any()):
        raise CheckpointError(f"{where} holds values that are not finite, or negative ones")
    return value.to(parameter.device)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns OSError into a one-line CheckpointError."""
    try:
        yield
    except OSError as error:
        reason = reason_of(error, folder)
        raise CheckpointError(f"cannot write to the run {folder}: {reason}") from error


def run_record(
    recipe: Recipe,
    cache: TrainingCache,
    device: torch.device,
    data: str,
    init: Path | None,
    teacher: Path | None = None,
) -> str:
    """run.json: a record that lets a run be repeated.

    It holds the recipe with all its defaults, the command line, the versions of all installed
    packages, the machine, and the manifest of the data with its hashes. `waveflow train
    RUN/recipe.json` with a cache of the same hashes repeats the run, bit for bit if versions and
    CPU are the same.
    """
    record = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        # By JSON, where an infinite number is a string.
        "recipe": json.loads(recipe.model_dump_json()),
        "init": None if init is None else _origin(init),
        "teacher": None if teacher is None else _origin(teacher),
        "data": {
            "description": data,
            "folder": str(cache.folder.resolve()),
            "manifest": cache.manifest.model_dump(mode="json"),
        },
        "platform": _platform(device),
        "packages": _packages(),
    }
    return json.dumps(record, indent=1) + "\n"


@functools.cache
def _packages() -> dict[str, str]:
    """The version of every installed package."""
    metadata = [distribution.metadata for distribution in distributions()]
    return dict(sorted((m["Name"], m["Version"]) for m in metadata if m["Name"]))


def _origin(folder: Path) -> dict[str, str]:
    """The folder and the hash of its manifest, which holds the hashes of all its files."""
    manifest = folder / MANIFEST
    return {
        "folder": str(folder.resolve()),
        "manifest_sha256": file_sha256(manifest) if manifest.is_file() else "",
    }


def _platform(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if cuda else str(device),
        "cuda": torch.version.cuda,
    }


def _changeable(recipe: Recipe) -> Recipe:
    """The recipe without what a resume may change: its end and its learning rate."""
    train = recipe.train.model_copy(update={"steps": 1, "patience": 0, "learning_rate": 1.0})
    return recipe.model_copy(update={"train": train})


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
