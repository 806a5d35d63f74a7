"""Arguments that several verbs share, and what they mean."""

import logging
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from waveflow.errors import ConfigError

if TYPE_CHECKING:
    from waveflow.checkpoint import ModelConfig
    from waveflow.engine.vocoder import Vocoder


class MelPreset(StrEnum):
    """Names in `waveflow.audio.mel.MEL_PRESETS`, which --help must not import."""

    hifigan = "hifigan"
    nvidia = "nvidia"


class PrecisionName(StrEnum):
    """Values of `waveflow.load`'s precision, which --help must not import."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME|PATH",
        help="A model that ships, or the folder of a checkpoint or a run. Without it: the default.",
    ),
]
Sigma = Annotated[
    float | None,
    typer.Option(
        "--sigma",
        min=0,
        max=10,
        metavar="X",
        help="Standard deviation of the noise. Without it: the model's own.",
    ),
]
Refine = Annotated[
    int | None,
    typer.Option(
        "--refine",
        min=0,
        max=4,
        metavar="K",
        help="Mel refinement steps after the draw. Without it: the model's own.",
    ),
]
Seed = Annotated[
    int,
    typer.Option("--seed", metavar="N", help="Of the noise: another seed is another draw."),
]
Precision = Annotated[
    PrecisionName,
    typer.Option(
        "--precision",
        help="Of the networks' products; int8 needs the extra `int8`, auto measures and says.",
    ),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="torch.compile: a slow first call, for long jobs.")
]
Denoise = Annotated[
    float | None,
    typer.Option(
        "--denoise",
        min=0,
        max=10,
        metavar="STRENGTH",
        help="Subtract the model's own hum: 0.01 to 0.1 for a WaveGlow.",
    ),
]
Device = Annotated[
    str, typer.Option("--device", metavar="NAME", help="Such as cpu, cuda, cuda:1 or mps.")
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, max=1024, metavar="N", help="CPU threads. Without it: torch's choice."
    ),
]
Float = Annotated[
    bool, typer.Option("--float", help="Write 32-bit floats instead of 16-bit integers (not FLAC).")
]
Verify = Annotated[
    bool,
    typer.Option(
        " /--no-verify",
        show_default=False,
        help="Load the model without checking the hashes of its files.",
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="In a folder job, also make outputs that are there already.")
]


def load_vocoder(
    model: str | None,
    device: str = "cpu",
    threads: int | None = None,
    verify: bool = True,
    precision: PrecisionName = PrecisionName.float32,
    compile: bool = False,
) -> "Vocoder":
    """The vocoder that the options of the same names ask for."""
    from waveflow.engine.vocoder import load

    set_threads(threads)
    check_device(device)
    if precision == PrecisionName.auto:
        # The choice is logged.
        logging.getLogger("waveflow.engine").setLevel(logging.INFO)
    return load(model, verify, device, precision.value, compile)


def read_config(model: str | None) -> "ModelConfig":
    """The config that --model asks for, without building the model."""
    from waveflow.checkpoint import CONFIG, parse_config, read_files, resolve_run
    from waveflow.pretrained import model_folder

    folder = resolve_run(model_folder(model), "best")
    return parse_config(read_files(folder)[CONFIG], folder / CONFIG)


def set_threads(threads: int | None) -> None:
    """Applies --threads."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def check_device(device: str) -> None:
    """Raises ConfigError unless torch can compute on the device here."""
    import torch

    try:
        # Brought back, because a device that holds no values (meta) is of no use either.
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used: {reason}") from error


def check_writable(path: Path) -> None:
    """Raises ConfigError where a file surely cannot be written: found before the long work."""
    import os

    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise ConfigError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"cannot write {path}: no permission to write in {path.parent}")
