"""Changes files of every kind at random: each must give a result or a typed error.

    python tests/stress/fuzz.py --cases 20000 --seed 0 --jobs 2

A case takes one kind of file, changes it, and runs the commands that read it. A status of 0 or 2 is
right. Wrong are status 1 (a fault of ours), a signal, more than 2 GB, more than 10 seconds, and
"killed" (20 seconds of native code). `--case N` repeats one case and keeps its files.
"""

import argparse
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import struct
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from changes import change
from material import forked, load_all, make_material, show

from waveflow.cli.main import main as waveflow

MEMORY, SECONDS = 2 * 2**30, 10
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
}  # fmt: skip
# Those that start a process or train take longest, and are drawn less often.
WEIGHTS = {"archive": 2, "published": 2, "run": 3, "cache": 4, "recipe": 4}


class Late(BaseException):
    """A case took too long."""


def main() -> None:
    """Runs the cases and prints a table; status 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--case", type=int, help="only this one; its files and output are kept")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    load_all()
    make_material(scratch / "good")
    if args.case is not None:
        kind, arguments, case = prepared(scratch, args.seed, args.case, args.kind)
        print(f"cd {case}\nkind {kind}, commands {arguments}", flush=True)
        raise SystemExit(run_case(case, arguments)[0])
    try:
        failed = fuzz(scratch, args.cases, args.seed, args.jobs, args.kind)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    raise SystemExit(1 if failed else 0)


def fuzz(scratch: Path, n_cases: int, seed: int, n_jobs: int, only: str | None) -> bool:
    """Returns whether a case failed."""
    jobs = [Job(scratch, range(i, n_cases, n_jobs), seed, only, i) for i in range(n_jobs)]
    while any([job.goes_on() for job in jobs]):
        time.sleep(0.1)
    lines = [line for job in jobs for line in job.results.read_text().splitlines()]
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    slowest: Counter[str] = Counter()
    largest: Counter[str] = Counter()
    failures: dict[str, list[int]] = defaultdict(list)
    for n, kind, outcome, seconds, megabytes, message in map(json.loads, lines):
        outcomes[kind][outcome if outcome in ("0", "2") else "wrong"] += 1
        slowest[kind] = max(slowest[kind], seconds)
        largest[kind] = max(largest[kind], megabytes)
        if outcome not in ("0", "2"):
            plain = re.sub(r"/\S+|[-0-9.]+", "#", message)[:150]
            failures[f"{kind}: {outcome}: {plain}"].append(n)
    rows: list[tuple[object, ...]] = [("kind", "cases", "done", "refused", "wrong", "s", "MB")]
    for kind, of_kind in sorted(outcomes.items()):
        counts = (of_kind.total(), *(of_kind[name] for name in ("0", "2", "wrong")))
        rows.append((kind, *counts, round(slowest[kind], 1), largest[kind]))
    show(rows)
    only_kind = "" if only is None else f" --kind {only}"
    for text, cases in sorted(failures.items(), key=lambda item: -len(item[1])):
        print(f"{len(cases)} x {text}\n    --seed {seed}{only_kind} --case {min(cases)}")
    return bool(failures) or len(lines) < n_cases


class Job:
    """A share of the cases in a child, which is replaced when it dies or hangs."""

    def __init__(
        self, scratch: Path, cases: range, seed: int, only: str | None, number: int
    ) -> None:
        self.cases, self.seed, self.only = cases, seed, only
        self.scratch = scratch / f"job{number}"
        self.scratch.mkdir()
        (self.scratch / "good").symlink_to(scratch / "good")
        self.results = self.scratch / "results"
        self.results.touch()
        # Written by the child: how many cases it has begun, and when.
        self.place = mmap.mmap(-1, 16)
        self.start(0)

    def start(self, first: int) -> None:
        self.place[:] = struct.pack("qd", first, time.monotonic())
        self.process = forked(lambda: self.work(first))

    def work(self, first: int) -> int:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,) * 2)
        for i in range(first, min(first + 200, len(self.cases))):
            n = self.cases[i]
            self.place[:] = struct.pack("qd", i, time.monotonic())
            kind, arguments, case = prepared(self.scratch, self.seed, n, self.only)
            begin = time.monotonic()
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            outcome, message = run_case(case, arguments)
            peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
            assert peak is not None
            self.write(
                n, kind, str(outcome), time.monotonic() - begin, int(peak[1]) // 1024, message
            )
            shutil.rmtree(case)
        self.place[:] = struct.pack("qd", i + 1, time.monotonic())
        return 0

    def write(self, *result: object) -> None:
        with open(self.results, "a") as file:
            file.write(json.dumps(result) + "\n")

    def goes_on(self) -> bool:
        """Whether there is work left; looks after the child."""
        if not self.process:
            return False
        i, since = struct.unpack("qd", self.place[:])
        hangs = time.monotonic() - since > 2 * SECONDS
        if hangs:
            os.kill(self.process, signal.SIGKILL)
        process, status = os.waitpid(self.process, 0 if hangs else os.WNOHANG)
        if not process:
            return True
        i, _ = struct.unpack("qd", self.place[:])
        if status and i < len(self.cases):
            n = self.cases[i]
            kind = kind_of(self.seed, n, self.only)[0]
            self.write(n, kind, "killed" if hangs else "died", 0, 0, f"wait status {status}")
            i += 1
        self.process = 0
        if i < len(self.cases):
            self.start(i)
        return bool(self.process)


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


if __name__ == "__main__":
    main()
