"""`waveflow convert`: turns a published checkpoint into a model folder."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from waveflow.cli.console import show
from waveflow.errors import ConfigError

if TYPE_CHECKING:
    from waveflow.foreign.convert import Converted


class Lineage(StrEnum):
    """The values of `waveflow.foreign.convert.Lineage`; importing that would slow --help down."""

    auto = "auto"
    glow = "glow"
    glow_old = "glow_old"
    dle = "dle"


def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="A file of torch.save, or a state dict as .safetensors."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="FOLDER", help="The model's folder, for --model."),
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="JSON", help="The config.json that the model was trained with."
        ),
    ] = None,
    lineage: Annotated[
        Lineage, typer.Option("--lineage", help="The code that the weights belong to.")
    ] = Lineage.auto,
) -> None:
    """Turn a published WaveGlow checkpoint into a model folder.

    Reads checkpoints of NVIDIA's WaveGlow and of its DeepLearningExamples
    (torch.hub) since 2018, also wrapped in the checkpoints of other trainings. A
    process of its own reads the file, and nothing in the file is executed.
    Without --config the mel settings are NVIDIA's.

    \b
    Examples:
      waveflow convert waveglow_256channels.pt -o waveglow
      waveflow convert waveglow_4000 --config config.json -o waveglow
      waveflow vocode mel.npy -o out.wav --model waveglow
    """
    from waveflow.checkpoint import save_checkpoint
    from waveflow.foreign.convert import convert as read

    _check_new(out)
    converted = read(checkpoint, config, lineage.value)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {out.parent}: {error.strerror}") from error
    save_checkpoint(out, converted.config, converted.flow.state_dict())
    show(f"read {checkpoint}: {_summary(converted)}")
    show(f"wrote {out}: waveflow vocode mel.npy -o out.wav --model {out}")


def _check_new(folder: Path) -> None:
    is_empty = folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
    if (folder.exists() or folder.is_symlink()) and not is_empty:
        raise ConfigError(f"{folder} is there already: name another folder, or remove it")


def _summary(converted: "Converted") -> str:
    from waveflow.engine.cost import count_parameters
    from waveflow.models.waveglow import WaveGlowConfig

    header, model, mel = converted.header, converted.config.model, converted.config.mel
    assert isinstance(model, WaveGlowConfig)
    iteration = f", iteration {header.iteration:,}" if header.iteration else ""
    return (
        f"{converted.lineage} ({header.container}), {model.n_flows} flows of {model.n_layers} "
        f"layers of {model.hidden_channels} channels, "
        f"{count_parameters(converted.flow) / 1e6:.2f} M parameters{iteration}; mels of "
        f"{mel.n_mels} bands at {mel.sample_rate} Hz, hop {mel.hop_length}"
    )
