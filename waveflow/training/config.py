"""Recipes: small TOML files with everything that decides a training run."""

import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from waveflow.audio.mel import MEL_PRESETS, MelConfig
from waveflow.checkpoint import SynthesisConfig
from waveflow.door import read_plain
from waveflow.errors import ConfigError
from waveflow.limits import KEY_PARTS, RECIPE_BYTES
from waveflow.models.registry import AnyFlowConfig, first_problem

# Names of checkpoints have eight digits, so that they sort by step.
MOST_STEPS = 10**8 - 1
# Of a whole step: 13 hours of audio at a hop of 256.
MOST_FRAMES = 2**22
# In steps. More than any run has stands for never.
Interval = Annotated[int, Field(gt=0, le=10**12)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class TrainConfig(BaseModel):
    """How a model is trained.

    Attributes:
        steps: number of optimizer steps.
        batch_size, segment_frames: items of a step and their length in mel frames.
        accumulate: number of parts into which a step's batch is cut. They are in memory one after
            another; the gradient is that of the whole batch.
        gain_range: random gain of each item, log-uniform.
        likelihood_weight: of the model's own objective, -log p in nats per audio sample.
        energy_weight: of the spectral energy distance of two draws; 0 leaves it out.
        calibration_weight: of calibration; 0 leaves it out.
        pitch_steps: first steps, which train only the pitch head. It is frozen afterwards.
        likelihood_steps: the next steps, which train the flow by likelihood alone, without energy
            and calibration. They are several times as fast, and a flow that is likely already
            learns to draw in few steps.
        teacher: name or folder of a trained model, for models that learn from another one. The
            run keeps a copy.
        learning_rate: the peak. The rate rises to it linearly in `warmup_steps`, then falls with
            1 / sqrt(1 + step / decay_steps), which does not need to know the end of the run.
        cooldown_steps: the last ones of `steps`, in which the rate falls to zero; 0: none. The
            second half of `pitch_steps` always ends at zero.
        rates: factors of the learning rate by the beginning of a parameter's name. The longest
            name that fits counts; 0 freezes. For fine-tuning:
            `{conditioner = 0.1, "bijection.steps.2" = 0}`.
        clip_norm: largest norm of the gradient; inf clips nothing.
        ema_decay: of the running mean of the weights, which is validated and shipped. Models with
            the step `BatchNorm` are not averaged.
        seed: of initial weights, data order and noise.
        validate_every, checkpoint_every: in steps.
        patience: the run ends after this many validations without a better likelihood; 0: never.
        precision: of the networks' matrix products; bijections stay in float32.
        recompute: whether the backward pass computes the activations of the couplings' networks
            again instead of keeping them. Memory then hardly grows with the number of flows, and a
            step takes 1.2 to 1.4 times as long. "auto" does so if the activations would fill more
            than half of the device's memory. Recipes of older versions call it `reversible`.
        compile: whether torch.compile fuses the couplings' networks. The first steps then wait
            minutes for a compiler; a CPU gains 1 to 3 %.
        threads: of torch on a CPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    steps: int = Field(default=200_000, gt=0, le=MOST_STEPS)
    batch_size: int = Field(default=8, gt=0)
    segment_frames: int = Field(default=64, ge=8)
    accumulate: int = Field(default=1, gt=0)
    gain_range: tuple[Weight, Weight] = (0.5, 4.0)
    likelihood_weight: Weight = 1.0
    energy_weight: Weight = 0.0
    calibration_weight: Weight = 0.0
    pitch_steps: int = Field(default=0, ge=0, le=MOST_STEPS)
    likelihood_steps: int = Field(default=0, ge=0, le=MOST_STEPS)
    teacher: str = ""
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    rates: dict[str, Weight] = {}
    warmup_steps: Interval = 200
    decay_steps: Interval = 4000
    cooldown_steps: int = Field(default=0, ge=0, le=MOST_STEPS)
    weight_decay: Weight = 0.0
    clip_norm: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    validate_every: Interval = 1000
    checkpoint_every: Interval = 500
    patience: int = Field(default=0, ge=0, le=10**12)
    precision: Literal["float32", "bf16"] = "float32"
    recompute: bool | Literal["auto"] = "auto"
    compile: bool = False
    threads: int = Field(default=1, gt=0, le=1024)

    @model_validator(mode="before")
    @classmethod
    def _older_names(cls, data: object) -> object:
        if isinstance(data, dict) and "reversible" in data and "recompute" not in data:
            data = dict(data)
            older = data.pop("reversible")
            data["recompute"] = True if older == "checked" else older
        return data

    @field_validator("precision", mode="before")
    @classmethod
    def _no_half(cls, value: object) -> object:
        if value in ("fp16", "float16", "half", "16-mixed"):
            raise ValueError(
                "fp16 is not offered: its range needs a scaled loss, and infinities lower the "
                'scale until the run learns nothing; use "bf16" or "float32"'
            )
        return value

    @model_validator(mode="after")
    def _a_step_is_not_too_large(self) -> Self:
        if self.batch_size * self.segment_frames > MOST_FRAMES:
            raise ValueError(
                f"batch_size {self.batch_size} segments of segment_frames {self.segment_frames} "
                f"are more than the {MOST_FRAMES} frames that a step can have: give fewer"
            )
        return self

    @model_validator(mode="after")
    def _likelihood_is_followed(self) -> Self:
        n_steps = self.likelihood_steps
        if n_steps and not (self.energy_weight or self.calibration_weight):
            raise ValueError(
                f"likelihood_steps {n_steps}: all steps train by likelihood alone; leave it out, "
                "or give energy_weight or calibration_weight"
            )
        if n_steps and not self.likelihood_weight:
            raise ValueError(
                f"likelihood_steps {n_steps}: likelihood_weight is 0, so they train nothing; "
                "give it a weight, or leave likelihood_steps out"
            )
        return self

    @model_validator(mode="after")
    def _parts_hold_items(self) -> Self:
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate {self.accumulate} parts of batch_size {self.batch_size}: each part "
                "needs an item"
            )
        return self


class Recipe(BaseModel):
    """A model, its mel and its training. The name of a preset may stand for `mel`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: AnyFlowConfig
    mel: MelConfig
    synthesis: SynthesisConfig = SynthesisConfig()
    train: TrainConfig = TrainConfig()

    @field_validator("mel", mode="before")
    @classmethod
    def _preset(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if value not in MEL_PRESETS:
            raise ValueError(f"no such mel preset; there are {', '.join(MEL_PRESETS)}")
        return MEL_PRESETS[value]

    @field_validator("mel")
    @classmethod
    def _fits_a_model(cls, mel: MelConfig) -> MelConfig:
        if mel.model_problem:
            raise ValueError(mel.model_problem)
        return mel


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe file: TOML, or the recipe.json in a run's folder.

    Raises:
        ConfigError: missing, not TOML or JSON, or a field that is unknown or out of range.
    """
    try:
        return _read_recipe(path)
    except RecursionError as error:
        raise ConfigError(f"recipe {path} is nested too deeply: no recipe needs that") from error


def _read_recipe(path: Path) -> Recipe:
    kind, parse = ("JSON", json.loads) if path.suffix == ".json" else ("TOML", tomllib.loads)
    try:
        data = parse(_recipe_text(path))
    except OSError as error:
        raise ConfigError(f"cannot read recipe {path}: {error.strerror}") from error
    except ValueError as error:  # of either parser, or of the encoding
        raise ConfigError(f"recipe {path} is not {kind}: {error}") from error
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"recipe {path}: {first_problem(error)}") from error


def _recipe_text(path: Path) -> str:
    text = read_plain(path, RECIPE_BYTES, ConfigError).decode("utf-8")
    # Between these characters stands one dotted key, a value, or a comment.
    n_parts = max(part.count(".") for part in re.split(r"[=,\[\]{}#\n]", text)) + 1
    KEY_PARTS.check(f"a key in recipe {path} has", n_parts, ConfigError)
    return text
