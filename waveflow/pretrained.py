"""Finds the models and recipes that ship, and the folder of any model."""

from pathlib import Path

from waveflow.errors import CheckpointError, ConfigError
from waveflow.hub import fetch_model, means_repository
from waveflow.model_files import CONFIG, resolve_run

DEFAULT_MODEL = "frameglow-cc0"
DEFAULT_VOICE = "kathleen"


def list_models() -> list[str]:
    """Returns the names of the models that ship with the package."""
    return sorted(path.parent.name for path in _root().glob(f"*/{CONFIG}"))


def shipped_model(name: str) -> Path | None:
    """Returns the folder of a model that ships, or None if none has this name."""
    folder = _root() / name
    return folder if Path(name).name == name and (folder / CONFIG).is_file() else None


def list_voices() -> list[str]:
    """Returns the names of the voices that ship: text to mels."""
    return sorted(path.parent.name for path in (_root() / "voices").glob(f"*/{CONFIG}"))


def voice_folder(voice: str | Path | None = None) -> Path:
    """Returns a voice's folder.

    Args:
        voice: the name of a voice that ships, or a folder; None for the default voice.

    Raises:
        CheckpointError: neither a shipped voice nor a folder.
    """
    name = DEFAULT_VOICE if voice is None else str(voice)
    if name in list_voices():
        return _root() / "voices" / name
    if Path(name).is_dir():
        return Path(name)
    raise CheckpointError(
        f"no voice {name!r}: give a folder, or one of {', '.join(list_voices()) or 'none shipped'}"
    )


def model_folder(model: str | Path | None = None) -> Path:
    """Returns a model's checkpoint folder.

    Args:
        model: the name of a model that ships, a checkpoint folder, or a run folder, which stands
            for its best checkpoint; or ORG/NAME or ORG/NAME@REVISION, a model of the Hugging Face
            Hub, which is fetched into its cache; None for the default model.

    Raises:
        CheckpointError: neither a shipped model nor a folder, nor to be had from the Hub.
    """
    name = DEFAULT_MODEL if model is None else str(model)
    shipped = shipped_model(name)
    if shipped is not None:
        return shipped
    if Path(name).is_dir():
        return resolve_run(Path(name), "best")
    if Path(name).is_file():
        raise CheckpointError(
            f"{name!r} is a file, a model is a folder: waveflow convert {name} -o FOLDER makes one"
        )
    if means_repository(name):
        return fetch_model(name)
    raise CheckpointError(
        f"no model {name!r}: give a folder, or one of {', '.join(list_models()) or 'none shipped'}"
    )


def zoo_models() -> list[str]:
    """Names of the models of the zoo that have a recipe here."""
    return sorted(path.stem for path in _root("recipes/zoo").glob("*.toml"))


def zoo_recipe(name: str) -> Path:
    """Returns the recipe of a model of the zoo.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in (known := zoo_models()):
        raise ConfigError(f"no model {name!r} in the zoo: there are {', '.join(known)}")
    return _root("recipes/zoo") / f"{name}.toml"


def _root(folder: str = "pretrained") -> Path:
    # A wheel has the files inside the package, a checkout beside it. (A folder without
    # __init__.py does not hide the module of its name.)
    inside = Path(__file__).parent / folder
    return inside if inside.is_dir() else Path(__file__).parent.parent / folder
