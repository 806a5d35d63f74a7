"""Rates the naturalness of a model's copies of recordings by Distill-MOS (1 to 5, no reference).

    python recipes/naturalness.py PATH/TO/wavs --ids PATH/TO/val.txt --model NAME --refine 4
    python recipes/naturalness.py FOLDER --as-is        # rates the files of a folder themselves

A check from outside: never a training loss, and never used to pick a seed. Means over six clips of
one voice differ by 0.1 by chance alone.

Install beside waveflow (the weights are inside the packages):

    pip install --no-deps distillmos xls-r-sqa

Without --no-deps pip would also install torchaudio and transformers. Neither is used here:
distillmos imports torchaudio for a file reader only, so an empty module takes its place below.

Reference: Stahl and Gamper, "Distillation and Pruning for Scalable Self-Supervised
    Representation-Based Speech Quality Assessment", 2025.
"""

import contextlib
import io
import sys
import types
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import nn

import waveflow
from waveflow.audio.io import find_files, read_audio
from waveflow.cli.console import one_line_errors
from waveflow.data.corpus import select_ids
from waveflow.engine.options import SynthesisOptions
from waveflow.metrics.copies import copies
from waveflow.metrics.quality import FloatArray, at_rate

DISTILLMOS_RATE = 16000
SUFFIXES = (".wav", ".flac")


def load_distillmos() -> nn.Module:
    """Returns the network, from audio (B, T) at 16 kHz to ratings (B, 1)."""
    sys.modules.setdefault("torchaudio", types.ModuleType("torchaudio"))
    try:
        from distillmos import ConvTransformerSQAModel
    except ImportError as error:
        sys.exit(f"{error}; first: pip install --no-deps distillmos xls-r-sqa")
    with contextlib.redirect_stdout(io.StringIO()):
        return ConvTransformerSQAModel().eval()


@torch.inference_mode()
def rate(network: nn.Module, audio: FloatArray, sample_rate: int) -> float:
    """Returns the Distill-MOS of a waveform (T,)."""
    samples = at_rate(audio, sample_rate, DISTILLMOS_RATE).astype(np.float32)
    return network(torch.from_numpy(samples)[None]).item()


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of recordings, wav or flac.")],
    model: Annotated[str | None, typer.Option(help="Name or folder.")] = None,
    sigma: Annotated[float | None, typer.Option(help="Standard deviation of the noise.")] = None,
    refine: Annotated[int | None, typer.Option(min=0, help="Refinement steps.")] = None,
    ids: Annotated[Path | None, typer.Option(help="List of ids to use, one a line.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws and of Griffin-Lim.")] = 0,
    as_is: Annotated[bool, typer.Option("--as-is", help="Rate the files, copy nothing.")] = False,
) -> None:
    """Print the mean Distill-MOS of the recordings, the model and Griffin-Lim."""
    torch.set_num_threads(1)
    with one_line_errors():
        options = SynthesisOptions(sigma=sigma, seed=seed, refine=refine)
        files = [folder / name for name in find_files(folder, SUFFIXES)[0]]
        files = files if ids is None else select_ids(files, ids)
        vocoder = None if as_is else waveflow.load(model)
        network = load_distillmos()
        ratings: dict[str, list[float]] = defaultdict(list)
        for path in files:
            audio, sample_rate, _ = read_audio(path, vocoder.sample_rate if vocoder else None)
            systems: Mapping[str, FloatArray] = {"as is": audio}
            if vocoder:
                systems = copies(vocoder, audio, options)
            for name, copy in systems.items():
                ratings[name].append(rate(network, copy, sample_rate))
            typer.echo(f"{len(ratings[name])} of {len(files)}", err=True)
    for name, values in ratings.items():
        typer.echo(f"{np.mean(values):5.2f}  {name}  ({len(values)} clips)")


if __name__ == "__main__":
    typer.run(main)
