"""Makes a model that ships from a run: its best checkpoint without training state.

    python recipes/ship.py RUN NAME EXAMPLE_CLIP --licence CC0-1.0

Writes pretrained/NAME with float16 weights and the mel of a validation clip as example.npy.
The model card, README.md, is written by hand and stays.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import torch

import waveflow
from waveflow.audio.dequantise import dequantise
from waveflow.audio.io import read_audio
from waveflow.checkpoint import EXAMPLE, load_checkpoint, save_checkpoint
from waveflow.cli.console import one_line_errors
from waveflow.engine.vocoder import Vocoder


def main() -> None:
    """Ships the run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("example", type=Path)
    parser.add_argument("--licence", required=True)
    args = parser.parse_args()
    config, flow = load_checkpoint(args.run)
    provenance = config.provenance.model_copy(update={"licence": args.licence})
    config = config.model_copy(update={"provenance": provenance})
    vocoder = Vocoder(config, flow)
    audio, _, _ = read_audio(args.example, vocoder.sample_rate)
    example = io.BytesIO()
    np.save(example, vocoder.mel(audio).numpy())
    weights = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in flow.state_dict().items()
    }
    folder = Path(__file__).parent.parent / "pretrained" / args.name
    card = folder / "README.md"
    text = card.read_bytes() if card.is_file() else b""
    folder.parent.mkdir(exist_ok=True)
    save_checkpoint(folder, config, weights, {EXAMPLE: example.getvalue()})
    # Not part of the checkpoint, whose manifest would call an edited card damaged.
    card.write_bytes(text)
    check_likelihood(vocoder, folder, audio)


def check_likelihood(vocoder: Vocoder, folder: Path, audio: np.ndarray) -> None:
    """Stops if rounding to float16 moved the likelihood of the example by more than 0.001."""
    speech = dequantise(torch.from_numpy(audio), 0)
    mel = vocoder.mel(audio)
    moved = (waveflow.load(folder).log_prob(speech, mel) - vocoder.log_prob(speech, mel)).abs()
    print(f"float16 weights move the likelihood by {moved.item():.1e} nats per sample")
    if moved > 0.001:
        raise SystemExit("that is too much: ship float32 weights")


if __name__ == "__main__":
    with one_line_errors(), torch.inference_mode():
        main()
