"""Monotonic alignment search (Kim et al. 2020, algorithm 1)."""

import numpy as np
from numpy.typing import NDArray


def durations_of(
    scores: NDArray[np.float32], n_symbols: NDArray[np.int64], n_frames: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Frames of each symbol on the best path, (B, S).

    A path begins at the first symbol and frame, ends at the last ones, and goes on by one frame and
    by no or one symbol: Q[i, j] = max(Q[i - 1, j - 1], Q[i, j - 1]) + score[i, j] (equation 7).

    Args:
        scores: (B, S, F), log-probability of a frame for a symbol.
        n_symbols, n_frames: (B,), sizes of each item; as many frames as symbols at least.
    """
    n_items, n, length = scores.shape
    rows = np.arange(n_items)
    best = np.full((n_items, n), -np.inf, np.float32)
    best[:, 0] = scores[:, 0, 0]
    came = np.zeros((length, n_items, n), bool)  # from the symbol before
    for j in range(1, length):
        before = np.concatenate([np.full((n_items, 1), -np.inf, np.float32), best[:, :-1]], 1)
        came[j] = before > best
        best = np.where(came[j], before, best) + scores[:, :, j]
    durations = np.zeros((n_items, n), np.int64)
    at = n_symbols - 1
    for j in range(length - 1, -1, -1):
        inside = j < n_frames
        durations[rows[inside], at[inside]] += 1
        at = at - (came[j, rows, at] & inside)
    return durations
