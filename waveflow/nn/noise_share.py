"""How much of a voice's energy is noise, and how much louder a draw with less noise must be.

A draw at a low sigma is a sum of what the source and the mel say and of quieter noise. Where a
share s of the energy is noise, and noise is drawn at `scale` of its amplitude, a share
s (1 - scale^2) of the energy is lost: the amplitude has to rise by -log(1 - s (1 - scale^2)) / 2.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

# The share is smooth over the mel scale: so many cosines, from none to 3.5 periods.
N_COSINES = 8
# Of the energy: however sure the head is, a draw is raised by 2.3 nepers (20 dB) at most.
LARGEST_SHARE = 0.99


class NoiseShare(nn.Module):
    """The share of noise in a band at x, sigmoid(sum_k c_k cos(pi k x)), c linear in a condition.

    Args:
        width: channels of the condition.
        places: x of each band, (bands,), from 0 (the lowest band of a mel) to 1 (the highest).
    """

    cosines: Tensor

    def __init__(self, width: int, places: np.ndarray) -> None:
        super().__init__()
        self.coefficients = nn.Linear(width, N_COSINES)
        nn.init.zeros_(self.coefficients.weight)
        nn.init.zeros_(self.coefficients.bias)
        cosines = np.cos(math.pi * np.arange(N_COSINES)[:, None] * places).astype(np.float32)
        self.register_buffer("cosines", torch.from_numpy(cosines), persistent=False)

    def forward(self, condition: Tensor, scale: Tensor) -> Tensor:
        """How much louder each band has to be, (B, L, bands), nepers of amplitude.

        Args:
            condition: (B, L, width).
            scale: of the noise's amplitude, (B, L, 1).
        """
        share = (self.coefficients(condition) @ self.cosines).sigmoid().clamp_max(LARGEST_SHARE)
        return -0.5 * torch.log1p(share * (scale.square() - 1))
