"""Speed of text to speech: the first sentence of a new process, and those that follow.

    python benchmarks/say.py --threads 1

The first is `waveflow say` as a whole, Python's start and all imports included. For those that
follow, text to mel and mel to audio are timed apart; medians of all sentences.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import waveflow
from waveflow.cli.console import show

SENTENCES = (
    "Good morning, and welcome to the station.",
    "The train at nine thirty leaves from platform four.",
    "Please keep your ticket until the end of the journey.",
    "It was a bright cold day, and the clocks were striking.",
    "Three dogs and two cats live in the house by the sea.",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints seconds of the first sentence, and times real time of the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "waveflow", "say", SENTENCES[0]]
        command += ["-o", str(Path(folder) / "out.wav"), "--threads", str(args.threads)]
        begin = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        show(f"a new process: {time.perf_counter() - begin:.1f} s")
    torch.set_num_threads(args.threads)
    speaker = waveflow.load_speaker()
    for text in SENTENCES:
        speaker(text)
    to_mel, to_audio, whole = [], [], []
    for text in SENTENCES * 3:
        begin = time.perf_counter()
        [mel] = speaker.acoustic.mels(text, 1.0, 0)
        middle = time.perf_counter()
        audio = speaker.vocoder(mel, refine=speaker.acoustic.refine_steps)
        end = time.perf_counter()
        seconds = len(audio) / speaker.sample_rate
        to_mel.append(seconds / (middle - begin))
        to_audio.append(seconds / (end - middle))
        whole.append(seconds / (end - begin))
    medians = [f"{statistics.median(values):.0f}" for values in (whole, to_mel, to_audio)]
    show(
        f"then {medians[0]} times real time (text to mel {medians[1]}, mel to audio {medians[2]}), "
        f"{args.threads} thread(s)"
    )


if __name__ == "__main__":
    main()
