"""What the scripts of this folder share: small files of every kind, and forked commands.

A child is forked from a process that has loaded all modules, so it starts at once. This needs a
POSIX system.
"""

import contextlib
import hashlib
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from waveflow.checkpoint import resolve_run
from waveflow.cli.main import main as waveflow

RATE = 22050
PUBLISHED = Path(__file__).parent.parent / "fixtures" / "nvidia-waveglow-legacy" / "waveglow_4000"

# Events and clock times differ from run to run.
DIFFER = (".csv", ".json", ".waveflow-archive")

RECIPE = (Path(__file__).parent.parent / "small_recipe.toml").read_text()

CONVENTION = """
sample_rate = 24000
n_fft = 2048
win_length = 1024
hop_length = 300
f_min = 50.0
power = 2
mel_scale = "htk"
log_floor = 1e-5
log = "10"
scale = 0.5
offset = 1.0
clip = [-4.0, 4.0]
gain = 1.0
"""


def load_all() -> None:
    """Imports what a command would import late, so that no child waits for it or half does it."""
    with contextlib.suppress(ImportError):
        import onnxruntime  # noqa: F401
        import pyworld  # noqa: F401
        import torch._dynamo
        import torch.utils.tensorboard  # noqa: F401


def make_material(folder: Path) -> None:
    """A corpus, its archive, a cache, a recipe, a run of six steps, its model, a mel, a pickle."""
    folder.mkdir()
    make_corpus(folder / "corpus")
    shutil.copy(PUBLISHED, folder / "published.pt")
    for form in ("tar", "gztar", "zip"):
        shutil.make_archive(str(folder / "corpus"), form, folder, "corpus")
    (folder / "recipe.toml").write_text(RECIPE.replace("steps = 60", "steps = 6"))
    run(folder, "prepare", "corpus", "-o", "cache", "--workers", 1)
    run(folder, "train", "recipe.toml", "--data", "cache", "--out", "run")
    shutil.copytree(resolve_run(folder / "run", "last"), folder / "model")
    samples, _ = soundfile.read(folder / "corpus" / "clip0.wav")
    for suffix in ("wav", "flac", "ogg"):
        soundfile.write(folder / f"in.{suffix}", samples, RATE)
    run(folder, "mel", "in.wav", "-o", "mel.npy")
    mel = np.load(folder / "mel.npy")
    np.savez(folder / "mel.npz", mel=mel)
    (folder / "convention.toml").write_text(CONVENTION)
    import torch

    torch.save(torch.from_numpy(mel), folder / "mel.pt")


def make_corpus(folder: Path) -> None:
    """Four half-second clips of a buzz that glides."""
    folder.mkdir()
    seconds = np.arange(RATE // 2) / RATE
    for clip in range(4):
        phase = 2 * np.pi * (100 + 20 * clip + 40 * seconds) * seconds
        buzz = sum(np.sin(k * phase) / k for k in range(1, 20))
        soundfile.write(folder / f"clip{clip}.wav", 0.15 * buzz, RATE)


def run(folder: Path, *arguments: object) -> None:
    """Runs `waveflow` in a child in this folder; it must succeed."""
    status, printed = wait(child(*arguments, folder=folder, log=folder / "log"), folder / "log")
    if status:
        raise SystemExit(f"waveflow {arguments}: status {status}: {printed}")


def forked(action: Callable[[], int], log: Path | None = None) -> int:
    """Starts a child that prints into a log or nowhere; returns its process number.

    The result of the action is the child's exit status.
    """
    # Before the fork: a child can be killed before it does anything.
    out = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.dup2(out, 1)
            os.dup2(out, 2)
            status = action()
        except KeyboardInterrupt:
            status = 130  # before the command was ready for one
        finally:
            os._exit(status)
    os.close(out)
    return process


def child(
    *arguments: object, folder: Path | None = None, log: Path | None = None, limit: int = 0
) -> int:
    """A child that runs `waveflow` with these arguments, in a folder.

    With a limit its files have so many bytes at most.
    """

    def command() -> int:
        if folder is not None:
            os.chdir(folder)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return waveflow([str(argument) for argument in arguments])

    return forked(command, log)


def log_of(folder: Path, suffix: str = ".log") -> Path:
    """Where a command prints that works in this folder: beside it."""
    return folder.with_name(folder.name + suffix)


def wait(process: int, log: Path | None = None) -> Any:
    """The exit status of a child, or its signal as a negative number; and its log, if given."""
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return status if log is None else (status, log.read_text(errors="replace"))


class Sound:
    """Samples of 16 bits; two are equal if they differ by rounding.

    Each process chooses the faster of two matrix products, whose last bits differ.
    """

    def __init__(self, path: Path) -> None:
        self.samples, self.rate = soundfile.read(path)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sound)
            and (self.rate, self.samples.shape) == (other.rate, other.samples.shape)
            and bool(np.abs(self.samples - other.samples).max(initial=0) < 1.5 / 2**15)
        )


def tree(folder: Path) -> dict[str, Any]:
    """The contents of all files, or "" where two good runs may differ; folders end with /."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if "events.out.tfevents" in name:
            continue
        if path.is_dir():
            found[name + "/"] = ""
            continue
        if name.endswith((".wav", ".flac")):
            with contextlib.suppress(soundfile.SoundFileError, ValueError):
                found[name] = Sound(path)
                continue
        same = not name.endswith(DIFFER)
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if same else ""
    return found


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator:  # type: ignore[type-arg]
    """Mounts a tmpfs over a folder; gives a function that sizes it, or says that it cannot."""
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0

    def resize(n_bytes: int) -> bool:
        size = ["mount", "-o", f"remount,size={n_bytes}", str(folder)]
        return mounted and subprocess.run(size, capture_output=True).returncode == 0

    try:
        yield resize
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def last(said: str) -> str:
    """The last line that was printed, without what is different each time."""
    line = (said.strip().splitlines() or [""])[-1]
    return re.sub(r"/\S+/|[0-9a-f]{12,}|\d+", "#", line)[:200]


def show(rows: list[tuple[object, ...]]) -> None:
    """A table with its columns in line."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(f"{cell!s:<{width}}" for cell, width in zip(row, widths, strict=True)))
