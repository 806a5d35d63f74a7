"""Speed of this checkout beside another commit, on every path of a model, both in one run.

    python benchmarks/against.py waveglow-64 frameglow-cc0 --base da072d2 \\
        --precision float32 bfloat16 int8 --seconds 1 4

The package of the other commit is exported to a temporary folder. Each of the two runs in a process
of its own, on one CPU thread; they take turns, and their CPU time is measured. Both read the same
checkpoint, that of the other commit. "x base" is how many times as fast this checkout is within
a round, median and quartiles. "x plain" is each path over the plain path of its own commit, the
other commit's first. "SNR" compares the draws of the two.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lab
from waveflow.audio.mel import MEL_PRESETS
from waveflow.cli.bench import short
from waveflow.cli.console import show_table
from waveflow.engine.cost import speed_ratio, take_turns
from waveflow.errors import ConfigError
from waveflow.metrics.spectral import signal_to_noise_db

ROOT = Path(__file__).parent.parent
BASE, HERE = "base", "here"
COLUMNS = ("path", "x real time", "x base", "x plain", "SNR dB")


class Worker:
    """A process that runs the package of a tree (worker.py)."""

    def __init__(self, tree: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
        )
        assert self.ask("where") == str(tree / "waveflow"), "another package was imported"

    def ask(self, *request: object) -> Any:
        """The answer to a request; `ConfigError` where the process died of it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError) as error:
            raise ConfigError(f"failed, see above: {request}") from error


def export(commit: str, folder: Path) -> None:
    """Writes the package of a commit, with the models that ship, to a folder."""
    command = ["git", "-C", str(ROOT), "archive", commit, "waveflow", "pretrained"]
    made = subprocess.run(command, capture_output=True)
    if made.returncode:
        raise ConfigError(f"--base {commit}: {made.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(made.stdout)) as archive:
        archive.extractall(folder, filter="data")


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table of all paths for each model and length."""
    parser = lab.parser(__doc__, "precision", "seconds", "runs")
    parser.add_argument("--base", default="HEAD", help="the other commit")
    args = parser.parse_args(argv)
    print(f"{lab.machine()}, one CPU thread; base {args.base}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        export(args.base, folder / BASE)
        workers = {BASE: Worker(folder / BASE), HERE: Worker(ROOT.resolve())}
        try:
            for model in args.models:
                source = folder / BASE / "pretrained" / model
                if model in lab.SIZES:
                    source = folder / model
                    workers[BASE].ask("write", model, str(source))
                elif not source.is_dir():
                    source = Path(model).resolve()
                for seconds in args.seconds:
                    paths = [lab.PLAIN, *args.precision]
                    rows = compare(workers, source, paths, seconds, args.runs, folder)
                    print(f"\n{model}, {seconds:g} s of audio")
                    show_table([COLUMNS, *rows], n_left=1)
        finally:
            for worker in workers.values():
                worker.process.kill()
                worker.process.wait()


def compare(
    workers: dict[str, Worker],
    model: Path,
    paths: Sequence[str],
    seconds: float,
    runs: int,
    folder: Path,
) -> list[Sequence[str]]:
    """A row of the table for each path of a model, at one length of audio."""
    config = MEL_PRESETS["hifigan"]
    mel, mel_file = lab.speech(config, seconds), str(folder / "mel.npy")
    np.save(mel_file, mel.numpy())
    works = {
        (path, side): partial(worker.ask, "synthesise", str(model), path, mel_file)
        for path in paths
        for side, worker in workers.items()
    }
    times = take_turns(works, runs)
    audio_seconds = mel.shape[2] * config.hop_length / config.sample_rate
    rows: list[Sequence[str]] = []
    for path in paths:
        draws = []
        for side, worker in workers.items():
            file = folder / f"{side}.npy"
            worker.ask("draw", str(model), path, mel_file, str(file))
            draws.append(torch.from_numpy(np.load(file)))
        speeds = [short(audio_seconds / statistics.median(times[path, side])) for side in workers]
        over_plain = [
            f"{speed_ratio(times[lab.PLAIN, side], times[path, side]).median:.2f}"
            for side in workers
        ]
        rows.append(
            (
                path if path == lab.PLAIN else f"engine {path}",
                " / ".join(speeds),
                str(speed_ratio(times[path, BASE], times[path, HERE])),
                " / ".join(over_plain),
                f"{signal_to_noise_db(*draws):.0f}",
            )
        )
    return rows


if __name__ == "__main__":
    lab.run(main)
