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
import re
import resource
import shutil
import signal
import struct
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

from cases import KINDS, SECONDS, kind_of, prepared, run_case
from material import forked, load_all, make_material, run, show

MEMORY = 2 * 2**30


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
    run(scratch / "good", "export", "model", "-o", "model.onnx", "--refine", 0)
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


if __name__ == "__main__":
    main()
