"""`waveflow export`: a model as a graph for another runtime."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from waveflow.cli import options
from waveflow.cli.jobs import note_written
from waveflow.errors import ConfigError
from waveflow.files import reason_of


class WeightsName(StrEnum):
    """Values of `export`'s weights, here for --help without imports."""

    float32 = "float32"
    float16 = "float16"
    int8 = "int8"


def export(
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FILE", help="A .onnx or a .pt2 file.")
    ],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A model that ships, the folder of a checkpoint or a run, or ORG/NAME of the "
            "Hub. Default: the model that ships.",
        ),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            "--inputs",
            metavar="NAMES",
            help="What an ONNX graph takes beside the mel: sigma, noise or sigma,noise. Without "
            "noise it draws its own in each call.",
        ),
    ] = None,
    sigma: options.Sigma = None,
    refine: options.Refine = None,
    weights: Annotated[
        WeightsName,
        typer.Option(
            "--weights", help="How an ONNX file stores matrices; float32 is computed with."
        ),
    ] = WeightsName.float32,
) -> None:
    """A model as an ONNX graph, or as a program of torch.export (.pt2).

    The graph takes `mel` (items, bands, frames), 3 frames or more, and gives
    `audio` (items, samples) in [-1, 1]. It is compared with the model at five
    lengths, and the largest difference is printed. Its metadata say what
    sherpa-onnx asks of a HiFi-GAN, and what `vocode --backend onnx` needs. A .pt2
    file takes `mel`, `sigma` and `noise`.

    \b
    Examples:
      waveflow export -o frameglow.onnx
      waveflow export runs/x -o small.onnx --weights int8 --refine 0
      waveflow export -o seeded.onnx --inputs sigma,noise
      waveflow vocode --backend onnx --model frameglow.onnx mel.npy -o out.wav
    """
    from waveflow.pretrained import model_folder

    folder = model_folder(model)
    options.check_writable(out)

    from waveflow.engine.vocoder import load
    from waveflow.export.onnx import export as write

    names = None if inputs is None else [name for name in inputs.split(",") if name]
    try:
        made = write(load(folder), out, names, sigma, refine, weights.value)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {reason_of(error, out)}") from error
    facts = f"{made.n_bytes / 1e6:.1f} MB, within {made.error:.1e} ({made.decibels:.0f} dB)"
    note_written(out, f"{facts} of the model's audio")
