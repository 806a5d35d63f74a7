"""Kills a training at random moments, again and again, and counts what is lost.

    python tests/stress/survival.py --kills 200

A tiny model learns a made-up voice and saves at every step. SIGKILL ends it while it loads,
trains, validates or saves. After each kill all checkpoints in the run's folder must be whole, none
may be lost, and the run must resume. A run that reaches its end must have, bit for bit, the weights
of a run that was never killed. Then the next run begins.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from material import RECIPE, child, forked, load_all, make_corpus, wait

from waveflow.checkpoint import read_files, resolve_run, run_checkpoints
from waveflow.data.cache import TrainingCache
from waveflow.errors import CheckpointError
from waveflow.training.config import read_recipe
from waveflow.training.loop import Trainer
from waveflow.training.run_folder import TRAINING

# The longest time that a child has, as a part of the time of a whole run.
LONGEST = 0.5


def main() -> None:
    """Kills, checks and prints a summary; status 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    load_all()
    with tempfile.TemporaryDirectory() as scratch:
        raise SystemExit(0 if survives(Path(scratch), args.kills, args.seed) else 1)


def survives(scratch: Path, n_kills: int, seed: int) -> bool:
    """Returns whether all of this holds for a number of kills."""
    recipe, cache = scratch / "recipe.toml", scratch / "cache"
    recipe.write_text(RECIPE)
    make_corpus(scratch / "corpus")
    prepared = child("prepare", scratch / "corpus", "-o", cache, "--workers", 1)
    assert wait(prepared) == 0, "no cache"
    undisturbed = scratch / "undisturbed"
    begin = time.monotonic()
    assert wait(child("train", recipe, "--data", cache, "--out", undisturbed)) == 0, "no run"
    longest = LONGEST * (time.monotonic() - begin)
    expected = weights(undisturbed)

    rng = random.Random(seed)
    kills = in_saves = finished = n_read = 0
    problems: list[str] = []
    while kills < n_kills:
        run, newest = scratch / f"run-{finished}", ""
        train = ("train", recipe, "--data", cache, "--out", run, "--resume")
        while kills < n_kills:
            process = child(*train)
            time.sleep(rng.uniform(0, longest))
            os.kill(process, signal.SIGKILL)
            status = wait(process)
            if status == 0:
                break
            kills += 1
            where = f"kill {kills}, run {finished}"
            if status != -signal.SIGKILL:
                problems.append(f"{where}: the run had ended by itself with status {status}")
            in_saves += any(run.glob(".step-*"))
            whole, unreadable = check(run)
            n_read += len(whole) + len(unreadable)
            problems += [f"{where}: {line}" for line in unreadable]
            if whole and whole[0] < newest:
                problems.append(f"{where}: {newest} is lost, the newest is {whole[0]}")
            newest = max([newest, *whole[:1]])
            if wait(checking_child(recipe, cache, run, newest)) != 0:
                problems.append(f"{where}: the run does not resume from {newest or 'nothing'}")
        else:
            if wait(child(*train)) != 0:
                problems.append(f"run {finished} cannot be finished")
        if weights(run) != expected:
            problems.append(f"run {finished} has other weights than one that was never killed")
        finished += 1
    print(f"{kills} kills in {finished} runs, {in_saves} of them within a save (seed {seed})")
    for line in problems:
        print(line)
    if not problems:
        print(
            f"all {n_read} checkpoints found after a kill were whole, the run resumed after every "
            "kill, and every run ended bit for bit like one that was never killed"
        )
    return not problems


def checking_child(recipe: Path, cache: Path, run: Path, newest: str) -> int:
    """A child that resumes the run; it fails if it does not start from the newest checkpoint."""

    def check() -> int:
        trainer = Trainer(read_recipe(recipe), TrainingCache(cache), run, resume=True)
        return int(trainer.step != int(newest.removeprefix("step-") or 0))

    return forked(check)


def check(run: Path) -> tuple[list[str], list[str]]:
    """The names of the run's whole checkpoints, newest first, and a line for each damage."""
    whole, damage = [], []
    for folder in run_checkpoints(run):
        try:
            read_files(folder)
            whole.append(folder.name)
        except CheckpointError as error:
            damage.append(str(error))
    if (run / "checkpoints.json").exists():
        for which in ("last", "previous", "best"):
            try:
                read_files(resolve_run(run, which))
            except CheckpointError as error:
                damage.append(f"{which}: {error}")
    return whole, damage


def weights(run: Path) -> bytes:
    """Weights and moments at the end of a run."""
    return (resolve_run(run, "last") / TRAINING).read_bytes()


if __name__ == "__main__":
    main()
