"""Monotonic alignment search (Kim et al. 2020, algorithm 1)."""

import numpy as np
import torch
from torch import Tensor


def best_durations(scores: Tensor, n_symbols: Tensor, n_frames: Tensor) -> Tensor:
    """Frames of each symbol on the best path, (B, S).

    A path begins at the first symbol and frame, ends at the last ones, and from frame to frame it
    stays or goes on to the next symbol:
    Q[i, j] = max(Q[i - 1, j - 1], Q[i, j - 1]) + scores[i, j] (equation 7).

    Args:
        scores: (B, S, F), log-probability of a frame for a symbol.
        n_symbols, n_frames: (B,), sizes of each item; no fewer frames than symbols.
    """
    values = scores.numpy()
    n_items, n, length = values.shape
    items = np.arange(n_items)
    best = np.full((n_items, n), -np.inf, np.float32)
    best[:, 0] = values[:, 0, 0]
    came = np.zeros((length, n_items, n), bool)  # whether from the symbol before
    for j in range(1, length):
        before = np.concatenate([np.full((n_items, 1), -np.inf, np.float32), best[:, :-1]], 1)
        came[j] = before > best
        best = np.where(came[j], before, best) + values[:, :, j]
    durations = np.zeros((n_items, n), np.int64)
    at, ends = n_symbols.numpy() - 1, n_frames.numpy()
    for j in range(length - 1, -1, -1):
        inside = j < ends
        durations[items[inside], at[inside]] += 1
        at = at - (came[j, items, at] & inside)
    return torch.from_numpy(durations)
