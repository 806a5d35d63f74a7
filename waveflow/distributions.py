"""The base density and the noise that draws are made from."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NOISE_BLOCK_FRAMES = 64


def standard_normal_log_prob(z: Tensor, mask: Tensor | None = None) -> Tensor:
    """log N(z; 0, 1) in nats, (B,): summed over C and L of z (B, C, L), valid positions only."""
    log_prob = -0.5 * (z.square() + math.log(2 * math.pi))
    if mask is not None:
        # Selected, not multiplied: padding may hold NaN.
        log_prob = log_prob.masked_fill(mask == 0, 0.0)
    return log_prob.sum((1, 2))


def gaussian_kl(mean_q: Tensor, log_q: Tensor, mean_p: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) of Gaussians, elementwise, in nats; log_q and log_p are logs of their sigma."""
    variance = ((log_q - log_p) * 2).exp()
    distance = ((mean_q - mean_p) * (-log_p).exp()).square()
    return log_p - log_q + (variance + distance - 1) / 2


def draw_noise(
    n_frames: int, hop_length: int, seeds: Sequence[int], first_frame: int = 0
) -> Tensor:
    """Standard normal noise (B, n_frames hop_length), float32, on the CPU; a row for each seed.

    It is the noise of an utterance from `first_frame` on, so that it can be drawn in pieces. An
    item's noise does not depend on its place in a batch, its length, the pieces or the device:
    each block of frames has a generator of its own, seeded by (seed, block). (`torch.randn` of
    one length is no prefix of a longer draw.)
    """
    last_frame = first_frame + n_frames
    blocks = range(first_frame // NOISE_BLOCK_FRAMES, -(-last_frame // NOISE_BLOCK_FRAMES))
    begin = (first_frame - blocks.start * NOISE_BLOCK_FRAMES) * hop_length
    size = NOISE_BLOCK_FRAMES * hop_length
    generator = torch.Generator()
    rows = []
    for seed in seeds:
        row = []
        for block in blocks:
            generator.manual_seed(_mix_seed(seed, block))
            row.append(torch.randn(size, generator=generator, dtype=torch.float32))
        rows.append(torch.cat(row)[begin : begin + n_frames * hop_length])
    return torch.stack(rows)


def _mix_seed(seed: int, block: int) -> int:
    """splitmix64 of (seed, block): neighbouring seeds must not share blocks."""
    x = (seed * 0x9E3779B97F4A7C15 + (block + 1) * 0xBF58476D1CE4E5B9) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return (x ^ (x >> 31)) % 2**63
