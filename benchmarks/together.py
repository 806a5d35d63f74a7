"""Mels decoded as one batch, beside one after another: where a server's batches pay.

    python benchmarks/together.py

One CPU thread, the model that ships, the best of five by the CPU's clock.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

import waveflow
from waveflow.cli.console import show_table


def best_ms(work: Callable[[], Any], n_times: int = 5) -> float:
    """CPU milliseconds of the fastest call, after one to warm up."""
    work()
    times = []
    for _ in range(n_times):
        begin = time.process_time()
        work()
        times.append(1000 * (time.process_time() - begin))
    return min(times)


def main() -> None:
    """Prints a row for each length and size of batch."""
    torch.set_num_threads(1)
    vocoder = waveflow.load()
    example = vocoder.example_mel()
    assert example is not None
    mel = torch.cat([example, example], 1)
    rows = [("frames", "mels", "one by one, ms", "together, ms", "ratio")]
    for n_frames in (43, 86, 172, 344):
        piece = mel[:, :n_frames]
        alone = best_ms(lambda: vocoder.synthesise(piece))  # noqa: B023
        for size in (2, 4, 8):
            batch, lengths = torch.stack([piece] * size), [n_frames] * size
            together = best_ms(lambda: vocoder.synthesise(batch, lengths=lengths))  # noqa: B023
            ratio = size * alone / together
            times = f"{size * alone:.0f}", f"{together:.0f}", f"{ratio:.2f}"
            rows.append((str(n_frames), str(size), *times))
    show_table(rows, n_left=0)


if __name__ == "__main__":
    main()
