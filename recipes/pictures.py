"""Draws spectrograms and F0 of recordings beside those of their copy-synthesis.

    python recipes/pictures.py OUT.png CLIP... [--model NAME|PATH]

Needs `pip install 'waveflow[eval,plot]'`. One column for each clip: the recording, the copy at
the model's default refinement, and the copy without refinement; F0 by dio and stonemask.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes

import waveflow
from waveflow.audio.f0 import track_f0
from waveflow.audio.io import read_audio
from waveflow.cli.console import one_line_errors
from waveflow.files import output_path

SECONDS = 3.0
F0_HOP = 110


def main() -> None:
    """Draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.add_argument("out", type=Path)
    parser.add_argument("clips", type=Path, nargs="+")
    parser.add_argument("--model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    vocoder = waveflow.load(args.model)
    rate = vocoder.sample_rate
    figure, axes = plt.subplots(
        3, len(args.clips), figsize=(5.2 * len(args.clips), 8), squeeze=False, sharex=True
    )
    for column, path in enumerate(args.clips):
        audio = read_audio(path, rate)[0][: int(SECONDS * rate)]
        steps = vocoder.refine_steps
        systems = {
            f"recording {path.stem}": audio,
            f"copy, {steps} refinement steps": vocoder.resynth(audio).numpy(),
            "copy, no refinement": vocoder.resynth(audio, refine=0).numpy(),
        }
        for row, (title, samples) in enumerate(systems.items()):
            draw(axes[row][column], title, samples, rate)
    for axis in axes[-1]:
        axis.set_xlabel("seconds")
    for row in axes:
        row[0].set_ylabel("kHz")
    figure.tight_layout()
    with output_path(args.out) as made:
        figure.savefig(made, dpi=72)


def draw(axis: Axes, title: str, samples: np.ndarray, rate: int) -> None:
    """Draws a spectrogram to 8 kHz, and ten times F0 on top."""
    frames = torch.from_numpy(np.ascontiguousarray(samples)).unfold(0, 512, 128)
    spectrum = torch.fft.rfft(frames * torch.hann_window(512)).abs().clamp_min(1e-5)
    seconds = len(samples) / rate
    axis.imshow(
        (20 * spectrum.log10()).T.numpy(),
        origin="lower",
        aspect="auto",
        extent=(0, seconds, 0, rate / 2000),
        vmin=-70,
        vmax=20,
        cmap="magma",
    )
    f0 = track_f0(samples, rate, F0_HOP)
    times = (np.arange(len(f0)) + 0.5) * F0_HOP / rate
    axis.plot(times, np.where(f0 > 0, f0 / 100, np.nan), color="cyan", linewidth=1.5)
    axis.set_ylim(0, 8)
    axis.set_title(f"{title}  (line: F0 x 10)", fontsize=9)


if __name__ == "__main__":
    with one_line_errors():
        main()
