"""The cases of fuzz.py: which kinds of files there are, and the commands that read them."""

import os
import random
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from changes import change

from waveflow.cli.main import main as waveflow

SECONDS = 10
MODEL = ("--model", "model")
VOCODE = ("vocode", *MODEL, "--refine", 1, "-o", "out.wav")
TRAIN = ("train", "--max-minutes", 0, "--out", "run", "recipe.toml", "--data")
# Kind: files to change one of, and the commands that read them.
KINDS: dict[str, tuple[Sequence[str], list[tuple[Any, ...]]]] = {
    "mel": (("mel.npy", "mel.npz", "mel.pt"), [(*VOCODE, "FILE")]),
    "array": (("mel.npy",), [(*VOCODE, "FILE")]),
    "audio": (("in.wav", "in.flac", "in.ogg"), [("mel", "FILE", "-o", "out.npy")]),
    "resynth": (("in.wav", "in.flac"), [("resynth", "FILE", *MODEL, "-o", "out.wav")]),
    "checkpoint": (
        ("model/config.json", "model/model.safetensors", "model/manifest.json"),
        [("info", "model"), (*VOCODE, "mel.npy")],
    ),
    "run": (
        ("run/checkpoints.json", "run/STEP/state.json", "run/STEP/training.safetensors",
         "run/STEP/config.json", "run/metrics.csv"),
        [("info", "run"), (*TRAIN, "cache", "--resume")],
    ),
    "cache": (
        ("cache/manifest.json", "cache/audio.npy", "cache/f0.npy"),
        [("info", "cache"), (*TRAIN, "cache")],
    ),
    "archive": (
        ("corpus.zip", "corpus.tar.gz", "corpus.tar"),
        [("prepare", "FILE", "-o", "new", "--workers", 1)],
    ),
    "recipe": (("recipe.toml",), [(*TRAIN, "cache")]),
    "published": (("published.pt",), [("convert", "FILE", "-o", "new")]),
    "graph": (
        ("model.onnx",),
        [("vocode", "mel.npy", "-o", "out.wav", "--backend", "onnx", "--model", "FILE")],
    ),
    "convention": (
        ("convention.toml",),
        [("convert-mel", "mel.npy", "-o", "out.npy", *MODEL, "--from", "FILE", "--lossy"),
         ("convert-mel", "mel.npy", "-o", "back.npy", *MODEL, "--from", "native", "--to", "FILE",
          "--lossy"),
         (*VOCODE, "mel.npy", "--convention", "FILE", "--lossy")],
    ),
    "doctor": (
        ("mel.npy", "mel.npz", "mel.pt"),
        [("doctor", "FILE", *MODEL),
         ("convert-mel", "FILE", "-o", "out.npy", *MODEL, "--from", "auto", "--time-major", "auto",
          "--to", "nemo-fastpitch", "--lossy")],
    ),
}  # fmt: skip
# Those that start a process or train take longest, and are drawn less often. Graphs are read by
# onnxruntime, and only `--kind graph` draws them.
WEIGHTS = {"graph": 0, "archive": 2, "published": 2, "run": 3, "cache": 4, "recipe": 4, "doctor": 3}


class Late(BaseException):
    """A case took too long."""


def kind_of(seed: int, n: int, only: str | None) -> tuple[str, random.Random]:
    """The kind of a case, and its random numbers."""
    rng = random.Random(f"{seed} {n}")
    drawn = rng.choices(list(KINDS), [WEIGHTS.get(kind, 10) for kind in KINDS])[0]
    return only or drawn, rng


def prepared(
    scratch: Path, seed: int, n: int, only: str | None
) -> tuple[str, list[tuple[Any, ...]], Path]:
    """Kind, commands and folder of a case, with its changed file."""
    kind, rng = kind_of(seed, n, only)
    good, case = scratch / "good", scratch / f"case{n}"
    names, commands = KINDS[kind]
    name = rng.choice(names)
    if "STEP" in name:
        steps = sorted(path.name for path in (good / "run").glob("step-*"))
        name = name.replace("STEP", rng.choice(steps))
    case.mkdir()
    for needed in {name.split("/")[0], *(word for c in commands for word in c)} & {
        *os.listdir(good)
    }:
        if needed != "run" or kind == "run":
            source = good / needed
            (shutil.copytree if source.is_dir() else shutil.copy)(source, case / needed)
    os.chdir(case)
    change(kind, case / name, rng)
    filled = [tuple(name if word == "FILE" else word for word in c) for c in commands]
    return kind, filled, case


def run_case(case: Path, commands: list[tuple[Any, ...]]) -> tuple[object, str]:
    """The worst status of the commands, or the name of what else ended one; its last line."""

    def late(*_: object) -> None:
        raise Late

    log = os.open(case / ".log", os.O_RDWR | os.O_CREAT)
    saved = [os.dup(number) for number in (1, 2)]
    worst: object = 0
    signal.signal(signal.SIGALRM, late)
    try:
        for number in (1, 2):
            os.dup2(log, number)
        for arguments in commands:
            signal.alarm(SECONDS)
            status: object
            try:
                status = waveflow([str(argument) for argument in arguments])
            except BaseException as error:
                status = type(error).__name__
            signal.alarm(0)
            worst = status if status not in (0, 2) else max(worst, status)  # type: ignore[call-overload]
            if worst not in (0, 2):
                break
    finally:
        for number, old in zip((1, 2), saved, strict=True):
            os.dup2(old, number)
            os.close(old)
    text = os.pread(log, 2**20, 0).decode(errors="replace")
    os.close(log)
    return worst, (text.splitlines() or [""])[-1]
