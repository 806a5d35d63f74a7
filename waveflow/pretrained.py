"""Where the models that ship are."""

from pathlib import Path

from waveflow.errors import CheckpointError

DEFAULT_MODEL = "frameglow-cc0"


def list_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(path.parent.name for path in _root().glob("*/config.json"))


def shipped_model(name: str) -> Path | None:
    """The folder of a model that ships; None if none has this name."""
    folder = _root() / name
    return folder if Path(name).name == name and (folder / "config.json").is_file() else None


def model_folder(model: str | Path | None = None) -> Path:
    """The folder of a model: None is the default, else a shipped name or a folder's path.

    Raises:
        CheckpointError: neither a shipped model nor a folder.
    """
    name = DEFAULT_MODEL if model is None else str(model)
    folder = shipped_model(name)
    if folder is not None:
        return folder
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise CheckpointError(
            f"{name!r} is a file, a model is a folder: waveflow convert {name} -o FOLDER makes one"
        )
    raise CheckpointError(
        f"no model {name!r}: give a folder, or one of {', '.join(list_models()) or 'none shipped'}"
    )


def _root() -> Path:
    # In a wheel the models lie inside the package, in a checkout beside it. (A folder without
    # __init__.py does not hide the module of its name.)
    inside = Path(__file__).parent / "pretrained"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "pretrained"
