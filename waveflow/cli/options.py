"""Options that several verbs share."""

import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from waveflow.errors import ConfigError
from waveflow.processes import local_device

if TYPE_CHECKING:
    from waveflow.audio.mel_config import MelConfig
    from waveflow.engine.options import SynthesisOptions
    from waveflow.engine.vocoder import Vocoder


class TimeMajor(StrEnum):
    """Whether frames are a mel's first axis."""

    no = "no"
    yes = "yes"
    auto = "auto"


class PrecisionName(StrEnum):
    """Values of `waveflow.load`'s precision, here for --help without imports."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"


class BackendName(StrEnum):
    """What runs a model."""

    torch = "torch"
    onnx = "onnx"


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME|PATH",
        help="A model that ships, the folder of a checkpoint or a run, or ORG/NAME[@REVISION] of "
        "the Hugging Face Hub.",
    ),
]
Sigma = Annotated[
    float | None,
    typer.Option(
        "--sigma",
        min=0,
        max=10,
        metavar="X",
        help="Standard deviation of the noise. Default: the model's own.",
    ),
]
Refine = Annotated[
    int | None,
    typer.Option(
        "--refine",
        min=0,
        metavar="K",
        help="Mel refinement steps after the draw. Default: the model's own.",
    ),
]
Seed = Annotated[
    int,
    typer.Option("--seed", metavar="N", help="Seed of the noise: another seed, another draw."),
]
Precision = Annotated[
    PrecisionName,
    typer.Option(
        "--precision",
        help="Precision of matrix products. auto picks the faster of float32 and bfloat16 and says "
        "which; int8 needs the extra `int8`.",
    ),
]
Backend = Annotated[
    BackendName,
    typer.Option(
        "--backend",
        help="onnx: --model is a .onnx file of `waveflow export`, and torch is not needed.",
    ),
]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="torch.compile: slow to start, for long jobs."),
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
Data = Annotated[
    list[Path] | None,
    typer.Option(
        "--data",
        metavar="CORPUS|CACHE",
        help="A cache, or a corpus. Give several corpora with --data for each.",
    ),
]
Device = Annotated[
    str, typer.Option("--device", metavar="NAME", help="Device, such as cpu, cuda, cuda:1 or mps.")
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, max=1024, metavar="N", help="CPU threads. Default: torch's choice."
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
    bool, typer.Option("--force", help="Of a folder, also make outputs that are there already.")
]


Convention = Annotated[
    str | None,
    typer.Option(
        "--convention",
        metavar="NAME|auto|FILE",
        help="What the mel is in: a system such as nemo-fastpitch or coqui, a scale such as log10 "
        "or db, auto, or a .toml file of mel settings. Default: the model's own.",
    ),
]
TimeMajorOption = Annotated[
    TimeMajor,
    typer.Option("--time-major", help="Whether the mel is (frames, bands); auto: by its sizes."),
]
Lossy = Annotated[
    bool,
    typer.Option("--lossy", help="Interpolate bands and frames that cannot be converted exactly."),
]

LookAhead = Annotated[
    float | None,
    typer.Option(
        "--look-ahead",
        metavar="SECONDS",
        help="From or to a pipe: the most mel to wait for behind a piece of audio.",
    ),
]


@dataclass(frozen=True)
class Loading:
    """Which model to load, and where."""

    model: Model = None
    device: Device = "cpu"
    threads: Threads = None
    verify: Verify = True

    def load(
        self, precision: PrecisionName = PrecisionName.float32, compile: bool = False
    ) -> "Vocoder":
        """Loads the vocoder; under torchrun --device cuda is this process's own GPU."""
        from waveflow.pretrained import model_folder

        # A wrong name is an error before torch is imported.
        folder = model_folder(self.model)
        from waveflow.engine.vocoder import load

        device = local_device(self.device)
        set_threads(self.threads)
        check_device(device)
        if precision == PrecisionName.auto:
            # The choice is logged.
            logging.getLogger("waveflow.engine").setLevel(logging.INFO)
        return load(folder, self.verify, device, precision.value, compile)


@dataclass(frozen=True)
class Sampling:
    """How to sample the model."""

    sigma: Sigma = None
    refine: Refine = None
    seed: Seed = 0

    def sampling(self) -> "SynthesisOptions":
        """Returns the options of the Python API.

        Raises:
            ConfigError: a value is out of range.
        """
        from waveflow.engine.options import SynthesisOptions

        return SynthesisOptions(self.sigma, self.seed, self.refine)


def flat(verb: Callable[..., None]) -> Callable[..., None]:
    """Replaces a verb's parameters that are dataclasses of options by the dataclasses' fields.

    Typer makes an option from each parameter, so verbs that share options can share a dataclass.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(verb, eval_str=True).parameters.values():
        if is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation
            parameters += inspect.signature(groups[parameter.name]).parameters.values()
        else:
            parameters.append(parameter)

    def call(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        verb(**values)

    # By name, so that options without a default may follow those that have one.
    named = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    call.__name__, call.__doc__ = verb.__name__, verb.__doc__
    call.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in named}
    return call


def axes(time_major: TimeMajor) -> "bool | Literal['auto']":
    """Returns `SynthesisOptions.time_major`."""
    return "auto" if time_major == TimeMajor.auto else time_major == TimeMajor.yes


def preset_named(name: str) -> "MelConfig":
    """Returns the mel settings of a system.

    Raises:
        ConfigError: no such name.
    """
    from waveflow.audio.mel_config import MEL_PRESETS

    if name not in MEL_PRESETS:
        raise ConfigError(f"--mel {name}: there is no such mel; give {', '.join(MEL_PRESETS)}")
    return MEL_PRESETS[name]


def set_threads(threads: int | None) -> None:
    """Sets the number of CPU threads; None leaves torch's choice."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def check_device(device: str) -> None:
    """Raises ConfigError unless torch can compute on the device here."""
    import torch

    try:
        # Copied back, which a device without values (meta) cannot do.
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used: {reason}") from error


def check_writable(path: Path) -> None:
    """Raises ConfigError if a file surely cannot be written, before the long work."""
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a folder")
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if not target.parent.is_dir():
        raise ConfigError(f"cannot write {path}: there is no folder {target.parent}")
    # A plain file is written beside its name and renamed; a pipe or device is written itself.
    plain = path.is_file() or not path.exists()
    if not os.access(target.parent if plain else path, os.W_OK):
        where = f" to write in {target.parent}" if plain else ""
        raise ConfigError(f"cannot write {path}: no permission{where}")
