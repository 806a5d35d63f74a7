"""From a config to its Flow: models register their config and their builder here.

A model is a config and a builder that composes bijections and networks: one file, or one folder.

    class MyConfig(FlowConfig):
        type: Literal["my-flow"] = "my-flow"
        width: int = 64

    @register(MyConfig)
    def my_flow(config: MyConfig, mel: MelConfig) -> Flow: ...

Models in this folder are found by themselves. A file of your own registers when it is imported;
then its models train, save and load like ours. A config names a type and no code: a checkpoint
whose type no imported file has registered is refused.
"""

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, SerializeAsAny, ValidationError
from pydantic_core import PydanticCustomError

from waveflow.audio.mel import MelConfig
from waveflow.budget import Budget
from waveflow.errors import ConfigError
from waveflow.flow import Flow
from waveflow.model_files import NamedModel
from waveflow.model_files import first_problem as first_problem


class FlowConfig(NamedModel):
    """Base of the models' configs.

    Attributes:
        type: names the model in config.json and in recipes.
        denoiser_bias: which mel a denoiser listens to for this model's hum (audio/denoise.py).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    denoiser_bias: ClassVar[Literal["zeros", "normal", "silence"]] = "silence"

    type: str


Builder = TypeVar("Builder", bound=Callable[..., Flow])

_registered: dict[str, tuple[type[FlowConfig], Callable[..., Flow]]] = {}


def register(config: type[FlowConfig]) -> Callable[[Builder], Builder]:
    """Decorates a model's builder, `builder(config, mel) -> Flow`.

    Args:
        config: the model's config class; the default of its `type` is the model's name.

    Raises:
        ConfigError: the type has no default, or another config has registered it.
    """
    name = config.model_fields["type"].default
    if not isinstance(name, str):
        raise ConfigError(f"{config.__name__}.type needs a default, the name of the model")

    def decorate(builder: Builder) -> Builder:
        known = _registered.get(name)
        # The same file may be imported twice, as a module and as a script.
        if known is not None and known[0].__qualname__ != config.__qualname__:
            raise ConfigError(f"model type {name!r} is registered by {known[0].__name__} already")
        _registered[name] = config, builder
        return builder

    return decorate


def model_types() -> list[str]:
    """The types that are registered, by name."""
    _import_models()
    return sorted(_registered)


def build_flow(config: FlowConfig, mel: MelConfig, budget: Budget | None = None) -> Flow:
    """A freshly initialised Flow for mels of the given settings.

    Args:
        budget: how large it may become; None for the limits of `waveflow.limits`.

    Raises:
        ConfigError: nothing has registered this type, its builder refuses the config, the flow
            does not fit the mel, or it would be larger than the limits. A budget of its own
            raises its own error.
    """
    _import_models()
    if config.type not in _registered:
        raise ConfigError(_unknown(config.type))
    with budget or Budget.of_table():
        flow = _registered[config.type][1](config, mel)
    if flow.hop_length != mel.hop_length:
        raise ConfigError(
            f"type {config.type!r} builds a flow of {flow.hop_length} samples a frame, the mel has "
            f"{mel.hop_length}: give Flow(..., hop_length=mel.hop_length)"
        )
    squeezed = flow.bijection.factor
    if flow.channels != squeezed:
        raise ConfigError(
            f"type {config.type!r} builds a flow of {flow.channels} channels, its bijection "
            f"squeezes by {squeezed}: give Flow(..., channels={squeezed})"
        )
    return flow


def _parse(value: Any) -> Any:
    """A config of the class that its type belongs to."""
    if not isinstance(value, dict):
        return value
    _import_models()
    name = value.get("type")
    if not isinstance(name, str):
        raise PydanticCustomError("flow_config", "type: name the model's type")
    if name not in _registered:
        raise PydanticCustomError("flow_config", "{reason}", {"reason": _unknown(name)})
    try:
        return _registered[name][0].model_validate(value)
    except ValidationError as error:
        raise PydanticCustomError(
            "flow_config", "{reason}", {"reason": first_problem(error)}
        ) from error


# The config of any registered model, as a field of another config.
AnyFlowConfig = Annotated[SerializeAsAny[FlowConfig], BeforeValidator(_parse)]


def _unknown(name: str) -> str:
    return (
        f"type {name!r} is registered by no model here; there are {', '.join(sorted(_registered))}:"
        " import the file that registers it first"
    )


def _import_models() -> None:
    """Imports every file of this folder, so that each has registered its model."""
    from waveflow import models

    for module in pkgutil.iter_modules(models.__path__):
        import_module(f"{models.__name__}.{module.name}")
