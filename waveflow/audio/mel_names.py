"""Names of mel conventions. Nothing here imports torch, so a wrong name is an error at once."""

import tomllib
from pathlib import Path

from pydantic import ValidationError

from waveflow.audio.mel_config import MEL_PRESETS, MelConfig
from waveflow.door import read_plain
from waveflow.errors import ConfigError
from waveflow.limits import RECIPE_BYTES

# A convention that is to be told by its values; the model's own, as it is.
AUTO, NATIVE = "auto", "native"

# Scales in which a mel of any bands may come: changes of its settings.
SCALES: dict[str, dict[str, object]] = {
    "log10": {"log": "10"},
    "log2": {"log": "2"},
    "db": {"log": "db"},
    "linear": {"log": "none"},
    # Decibels, reference 20 dB, range 100 dB, as Tacotron's and Coqui's preprocessing scale them.
    "to-4": {"log": "db", "scale": 0.08, "offset": 2.4, "clip": (-4.0, 4.0)},
    "to-1": {"log": "db", "scale": 0.02, "offset": 0.6, "clip": (-1.0, 1.0)},
    "to-01": {"log": "db", "scale": 0.01, "offset": 0.8, "clip": (0.0, 1.0)},
    "power": {"power": 2, "log_floor": 1e-10},
    "no-norm": {"norm": None},
    "int16": {"gain": 32768.0},
}


def check_convention(name: str) -> None:
    """Raises ConfigError unless this is the name of a convention; see `convention_named`."""
    if name.endswith(".toml") or name in (AUTO, NATIVE, *MEL_PRESETS):
        return
    if not set(name.split(",")) <= SCALES.keys():
        raise ConfigError(
            f"there is no convention {name!r}: give {AUTO}, {NATIVE}, a system ("
            f"{', '.join(MEL_PRESETS)}), scales of the model's own mel joined by commas ("
            f"{', '.join(SCALES)}), or the name of a .toml file"
        )


def convention_named(name: str, own: MelConfig) -> MelConfig:
    """The settings of a convention.

    Args:
        name: "native", the model's own mel; a preset; scales of the model's own mel, joined by
            commas ("power,log10"); or a .toml file with fields of MelConfig, all others being the
            model's own.
        own: the model's mel.

    Raises:
        ConfigError: no such name, or a file that cannot be read or has wrong settings.
    """
    check_convention(name)
    if name == NATIVE:
        return own
    if name in MEL_PRESETS:
        return MEL_PRESETS[name]
    changes: dict[str, object] = {}
    if name.endswith(".toml"):
        changes = _read(Path(name))
    else:
        for scale in name.split(","):
            changes |= SCALES[scale]
    try:
        return MelConfig.model_validate(own.model_dump() | changes)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        reason = f"{place}: {first['msg']}".removeprefix(": ")
        raise ConfigError(f"convention {name}: {reason.splitlines()[0]}") from error


def _read(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(read_plain(path, RECIPE_BYTES, ConfigError).decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read convention {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # of the parser, or of the encoding
        raise ConfigError(f"convention {path} is not TOML: {error}") from error
