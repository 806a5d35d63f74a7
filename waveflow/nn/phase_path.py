"""The phase path: where the pulses of speech lie, against those of a source that follows its F0.

A mel tells the pitch and not the phase. Without help a likelihood sees speech at any phase of the
source, and learns not to trust it. So the phase of the source gets an offset, a path of so many
cycles in each frame, and training takes the path that makes the speech most likely. A path has a
prior, a random walk, so log p(x) >= log p(x | path) + log p(path) for every path.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from waveflow.padding import hold_last

N_OFFSETS = 64  # of a cycle
MAX_STEP = 3  # offsets, from frame to frame; the walk has a standard deviation of one


class Path(NamedTuple):
    """A path and its prior.

    Attributes:
        cycles: (B, L) float64, to add to the source's phase at the centres of frames.
        log_prob: (B, L) float64, nats, of each frame's step; at the first frame of the start.
    """

    cycles: Tensor
    log_prob: Tensor


def pulse_scores(matched: Tensor, turns: Tensor, period: Tensor) -> Tensor:
    """log p of speech with pulses at each offset, up to a constant, nats, (B, L, N_OFFSETS).

    A pulse train of unit power and period P is nearly one sample of height sqrt(P) a period. A bin
    of P / N_OFFSETS samples holds more or fewer than one, hence the weight.

    Args:
        matched: (B, L, hop), the product of speech with a unit pulse at each sample.
        turns: (B, L, hop), phase of the source in cycles.
        period: (B, L), P in samples.
    """
    offset = ((-turns).remainder(1) * N_OFFSETS).long().clamp_max(N_OFFSETS - 1)
    scores = matched.new_zeros(*matched.shape[:2], N_OFFSETS)
    return scores.scatter_add(2, offset, matched) * (N_OFFSETS / period.sqrt())[..., None]


def best_path(scores: Tensor, mask: Tensor | None = None) -> Path:
    """The most likely path (Viterbi 1967), smoothed over three frames.

    Args:
        scores: (B, L, N_OFFSETS), nats.
        mask: (B, L), 1 where a frame belongs to its item.
    """
    steps = torch.arange(-MAX_STEP, MAX_STEP + 1, device=scores.device)
    prior = (-0.5 * steps.double().square()).log_softmax(0)
    offsets = torch.arange(N_OFFSETS, device=scores.device)
    before = (offsets[:, None] - steps) % N_OFFSETS
    scores = scores.double()
    if mask is not None:
        scores = torch.where(mask[..., None] != 0, scores, 0)
    best, taken = scores[:, 0], []
    for frame in scores.unbind(1)[1:]:
        best, step = (best[:, before] + prior).max(2)
        best = best + frame
        taken.append(step)
    walk = [best.argmax(1, keepdim=True)]
    chosen = []
    for step in reversed(taken):
        chosen.append(step.gather(1, walk[-1]))
        walk.append((walk[-1] - steps[chosen[-1]]) % N_OFFSETS)
    # Summed up from the first frame, because a path has no jump where an offset passes a cycle.
    chosen = [walk[-1].new_full(walk[-1].shape, MAX_STEP), *reversed(chosen)]
    moved = torch.cat(chosen, 1)
    cycles = (walk[-1] + steps[moved].cumsum(1) + 0.5).double() / N_OFFSETS
    log_prob = prior[moved]
    log_prob[:, 0] = -math.log(N_OFFSETS)
    if mask is not None:
        log_prob = torch.where(mask != 0, log_prob, 0)
    edged = torch.cat([cycles[:, :1], cycles, cycles[:, -1:]], 1)
    smooth = (edged[:, :-2] + edged[:, 1:-1] + edged[:, 2:]) / 3
    return Path(hold_last(smooth, mask), log_prob)
