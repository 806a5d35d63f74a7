"""One loaded model in a long life: forked workers, threads, and thousands of lengths.

    python tests/stress/long_life.py --lengths 2000 --threads 8 --workers 4

The model is loaded with two threads of torch. Workers are forked from that process before it
synthesises anything. They must end within a minute with the audio that the parent makes, to
rounding. Threads share the model: each must get, bit for bit, what a single caller gets. Then
lengths are drawn at random, up to `--seconds`, and the memory must stay within `--megabytes` of
what the process holds after the first twentieth of them. `--onednn` takes oneDNN's products, which
compile something for each length, also where a probe would not choose them.
"""

import argparse
import os
import re
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from material import forked, show, wait

import waveflow
from waveflow.engine.cost import clip_mel
from waveflow.engine.fast import product

# Lengths of the mels that workers and threads voice, in frames.
FRAMES = (7, 86, 150, 301)


def main() -> None:
    """Prints a table; status 1 if something does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--lengths", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=6.0, help="the longest mel")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--megabytes", type=float, default=60)
    parser.add_argument("--onednn", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.onednn:
        product.onednn_pays = lambda *_: True  # type: ignore[assignment]
    torch.set_num_threads(2)
    vocoder = waveflow.load(args.model)
    loaded = resident()
    rows: list[tuple[object, ...]] = [("what", "found", "wanted", "holds")]
    with tempfile.TemporaryDirectory() as folder:
        forks = start_workers(vocoder, args.workers, Path(folder))
        ended = [wait(process) for process in forks]
        expected = all_lengths(vocoder)
        equal = [
            not status and np.allclose(np.load(f"{folder}/{i}.npy"), expected, atol=1e-5)
            for i, status in enumerate(ended)
        ]
    rows.append(judged("workers with the parent's audio", sum(equal), args.workers))
    rows.append(judged("calls in threads that differ", unequal(vocoder, args.threads), 0))
    torch.set_num_threads(1)
    rows += memory(vocoder, args, loaded)
    show(rows)
    raise SystemExit(0 if all(row[-1] for row in rows) else 1)


def judged(what: str, found: float, wanted: float) -> tuple[object, ...]:
    return what, found, wanted, found == wanted


def start_workers(vocoder: waveflow.Vocoder, n_workers: int, folder: Path) -> list[int]:
    """Forks processes that write their audio to files."""

    def work(i: int) -> int:
        signal.alarm(60)
        np.save(folder / f"{i}.npy", all_lengths(vocoder))
        return 0

    return [forked(partial(work, i)) for i in range(n_workers)]


def all_lengths(vocoder: waveflow.Vocoder) -> np.ndarray:
    """The audio of all lengths. Each process probes for the faster products: to rounding."""
    return torch.cat([vocoder(clip_mel(vocoder, n), seed=n) for n in FRAMES]).numpy()


def unequal(vocoder: waveflow.Vocoder, n_threads: int) -> int:
    """How many of a hundred calls in threads differ from one by a single caller."""
    alone = {n: vocoder(clip_mel(vocoder, n), seed=n) for n in FRAMES}
    calls = FRAMES * (100 // len(FRAMES))
    with ThreadPoolExecutor(n_threads) as pool:
        made = pool.map(lambda n: vocoder(clip_mel(vocoder, n), seed=n), calls)
        return sum(not torch.equal(audio, alone[n]) for audio, n in zip(made, calls, strict=True))


def memory(
    vocoder: waveflow.Vocoder, args: argparse.Namespace, loaded: float
) -> list[tuple[object, ...]]:
    """Rows on the memory that many lengths take."""
    rng = np.random.default_rng(args.seed)
    longest = round(args.seconds * vocoder.sample_rate / vocoder.hop_length)
    mel = clip_mel(vocoder, longest)
    held = []
    begin = time.monotonic()
    for n_frames in rng.integers(2, longest + 1, args.lengths).tolist():
        vocoder(mel[:, :n_frames])
        held.append(resident())
    early = max(held[: max(1, args.lengths // 20)])
    growth = max(held) - early
    return [
        ("MB when loaded", round(loaded), "", True),
        (f"MB after {args.lengths // 20} lengths", round(early), "", True),
        ("MB at most", round(max(held)), "", True),
        ("MB of growth", round(growth), f"<= {args.megabytes:g}", growth <= args.megabytes),
        ("ms for each length", round(1000 * (time.monotonic() - begin) / args.lengths), "", True),
    ]


def resident() -> float:
    """Megabytes of this process."""
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None, os.name
    return int(found[1]) / 1024


if __name__ == "__main__":
    main()
