"""Kills, full disks and pairs of processes, over all verbs that write: nothing may be lost.

    python tests/stress/bad_days.py --kills 200 --disks 60 --pairs 40

After each of them inputs and outputs are whole, the status is right (2 and one line that names a
full disk; 0, or 2 with a reason, in a pair), and the same command again ends with the same files as
one that nothing disturbed, and no others. Full disks are small tmpfs mounts, which need root;
elsewhere a limit on the size of files. `--verb train` takes one verb only.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from material import child, last, load_all, log_of, make_material, show, small_disk, tree, wait

MODEL = ("--model", "model", "--refine", 1)
# Words that are names of the material are inputs.
VERBS: dict[str, tuple[object, ...]] = {
    "mel": ("mel", "in.wav", "-o", "out.npy"),
    "mel folder": ("mel", "corpus", "-o", "out"),
    "vocode": ("vocode", "mel.npy", "-o", "out.wav", *MODEL),
    "vocode folder": ("vocode", "mels", "-o", "out", *MODEL),
    "resynth": ("resynth", "in.wav", "-o", "out.flac", *MODEL),
    "resynth folder": ("resynth", "corpus", "-o", "out", *MODEL),
    "denoise folder": ("denoise", "corpus", "-o", "out", "--model", "model"),
    "prepare": ("prepare", "corpus", "-o", "out", "--workers", 1),
    "prepare archive": ("prepare", "corpus.zip", "-o", "out", "--workers", 1),
    "convert": ("convert", "published.pt", "-o", "out"),
    "train": ("train", "recipe.toml", "--data", "cache", "--out", "out", "--resume"),
}


def main() -> None:
    """Runs all and prints a table; status 1 if something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--disks", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verb", choices=VERBS)
    args = parser.parse_args()
    load_all()
    with tempfile.TemporaryDirectory(prefix="bad-days-") as scratch:
        days = Days(Path(scratch), args.seed, [args.verb] if args.verb else list(VERBS))
        for n, day in ((args.kills, days.kill), (args.disks, days.disk), (args.pairs, days.pair)):
            for i in range(n):
                day(days.verbs[i % len(days.verbs)], i)
        raise SystemExit(days.report())


class Days:
    """The material, the undisturbed results, and what went wrong."""

    def __init__(self, scratch: Path, seed: int, verbs: list[str]) -> None:
        self.scratch, self.seed, self.verbs = scratch, seed, verbs
        self.good = scratch / "good"
        make_material(self.good)
        (self.good / "mels").mkdir()
        for i in range(4):
            shutil.copy(self.good / "mel.npy", self.good / "mels" / f"clip{i}.npy")
        self.problems: dict[str, list[int]] = defaultdict(list)
        self.statuses: dict[tuple[str, str], Counter[object]] = defaultdict(Counter)
        self.seconds, self.expected = {}, {}
        for verb in verbs:
            with self.folder(verb) as folder:
                begin = time.monotonic()
                assert self.run(verb, folder)[0] == 0, (verb, log_of(folder).read_text())
                self.seconds[verb] = time.monotonic() - begin
                self.expected[verb] = tree(folder)
                print(f"{verb}: {self.seconds[verb]:.1f} s undisturbed", flush=True)

    @contextlib.contextmanager
    def folder(self, verb: str) -> Iterator[Path]:
        """A folder with the verb's inputs."""
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        self.fill(folder, verb)
        yield folder
        shutil.rmtree(folder)

    def fill(self, folder: Path, verb: str) -> None:
        for name in {str(word) for word in VERBS[verb]} & {*os.listdir(self.good)}:
            source = self.good / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)

    def start(self, verb: str, folder: Path, log: str = ".log", limit: int = 0) -> int:
        return child(*VERBS[verb], folder=folder, log=log_of(folder, log), limit=limit)

    def run(self, verb: str, folder: Path, limit: int = 0) -> tuple[int, str]:
        return wait(self.start(verb, folder, limit=limit), log_of(folder))

    def wrong(self, day: str, verb: str, what: str, i: int) -> None:
        self.problems[f"{day}, {verb}: {what}"].append(i)

    def check(self, day: str, verb: str, folder: Path, i: int) -> None:
        """What holds after each day: all is whole, and the same command again ends well."""
        expected = self.expected[verb]
        for name, content in tree(folder).items():
            # A checkpoint is written over when the run goes on.
            if verb != "train" and expected.get(name, content) != content:
                self.wrong(day, verb, f"{name} is not whole", i)
        status, said = self.run(verb, folder)
        made_already = verb == "convert" and status == 2 and "already" in said
        if status and not made_already:
            self.wrong(day, verb, f"again: status {status}: {last(said)}", i)
        found = tree(folder)
        for name in sorted(expected.keys() | found.keys()):
            if name not in found:
                self.wrong(day, verb, f"again: {name} is missing", i)
            elif name not in expected:
                self.wrong(day, verb, f"again: {name} is left behind", i)
            elif found[name] != expected[name]:
                self.wrong(day, verb, f"again: {name} differs", i)

    def kill(self, verb: str, i: int) -> None:
        rng = random.Random(f"kill {self.seed} {i}")
        how = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        with self.folder(verb) as folder:
            process = self.start(verb, folder)
            time.sleep(rng.uniform(0, self.seconds[verb]))
            os.kill(process, how)
            status, said = wait(process, log_of(folder))
            self.statuses["kill", verb][status] += 1
            right = {
                signal.SIGKILL: (0, -9),
                signal.SIGTERM: (0, -15, 143),
                signal.SIGINT: (0, 130, -2),
            }
            if status not in right[how]:
                self.wrong("kill", verb, f"{how.name}: status {status}: {last(said)}", i)
            self.check("kill", verb, folder, i)

    def disk(self, verb: str, i: int) -> None:
        rng = random.Random(f"disk {self.seed} {i}")
        with self.folder(verb) as folder, small_disk(folder) as resize:
            self.fill(folder, verb)
            used = sum(
                -(-p.stat().st_size // 4096) * 4096 for p in folder.rglob("*") if p.is_file()
            )
            n_entries = sum(1 for _ in folder.rglob("*"))
            grown = resize(used + 4096 * n_entries // 8 + rng.choice((0, 4096, 40_000, 200_000)))
            limit = 0 if grown else rng.choice((1, 1000, 20_000))
            status, said = self.run(verb, folder, limit)
            self.statuses["disk", verb][status] += 1
            if status not in (0, 2):
                self.wrong("disk", verb, f"status {status}: {last(said)}", i)
            elif status == 2 and not any(w in said for w in ("No space", "too large", "disk")):
                self.wrong("disk", verb, f"does not name the disk: {last(said)}", i)
            # The parts of `prepare` wait for the command that goes on.
            found = [n for n in tree(folder) if n.startswith(".") and ".parts" not in n]
            if found:
                self.wrong("disk", verb, f"left behind at once: {found[0]}", i)
            resize(2**28)
            self.check("disk", verb, folder, i)

    def pair(self, verb: str, i: int) -> None:
        rng = random.Random(f"pair {self.seed} {i}")
        with self.folder(verb) as folder:
            logs = (".log1", ".log2")
            first = self.start(verb, folder, logs[0])
            time.sleep(rng.choice((0, rng.uniform(0, self.seconds[verb]))))
            second = self.start(verb, folder, logs[1])
            ends = [
                wait(p, log_of(folder, log)) for p, log in zip((first, second), logs, strict=True)
            ]
            self.statuses["pair", verb][tuple(status for status, _ in ends)] += 1
            if 0 not in [status for status, _ in ends]:
                self.wrong(
                    "pair", verb, f"neither succeeds: {last(ends[0][1])}; {last(ends[1][1])}", i
                )
            for status, said in ends:
                reason = any(word in said for word in ("process", "already", "in use", "holds"))
                if status not in (0, 2) or (status == 2 and not reason):
                    self.wrong("pair", verb, f"status {status}: {last(said)}", i)
            self.check("pair", verb, folder, i)

    def report(self) -> int:
        """Prints the table; returns the exit status."""
        rows: list[tuple[object, ...]] = [("day", "verb", "n", "statuses")]
        for (day, verb), counts in self.statuses.items():
            listed = ", ".join(f"{status}: {n}" for status, n in counts.most_common())
            rows.append((day, verb, counts.total(), listed))
        show(rows)
        for text, cases in sorted(self.problems.items(), key=lambda item: -len(item[1])):
            print(f"{len(cases)} x {text}")
        print(f"{len(self.problems)} kinds of problems (seed {self.seed})")
        return 1 if self.problems else 0


if __name__ == "__main__":
    main()
