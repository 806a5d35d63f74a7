"""WaveGlow's condition with as few rows and columns as the upsampler's rank needs."""

import torch
from torch import Tensor
from torch.nn import functional as F

from waveflow.engine.fast.product import Product

# Between the rounding of float32 weights (1e-8 of the largest singular value) and what is heard.
_NEGLIGIBLE = 1e-7


class Steering:
    """The features of a linear conditioner in rows, and their products with a layer's weight.

    A window of mel frames gives P positions of N features; with the
    upsampler in groups of n samples P = hop / n and N = M n. If its matrices at the P positions
    are combinations of rho < P of them, a layer's product is computed in rho rows for each
    frame and combined into P afterwards; if all features lie in a space of r < N dimensions,
    it takes r columns. A repeated mel has rho = 1.

    Attributes:
        n_positions: P, positions for each frame.
        n_rows: rho, rows for each frame.

    Args:
        maps, offset: the conditioner as an affine map (`UpsampledMel.affine_map`).
        n_frames: frames in most calls of `rows`.
    """

    def __init__(self, maps: Tensor, offset: Tensor, n_frames: int) -> None:
        self._offset = offset
        self.n_positions, n_features, _ = maps.shape
        phases, rows = _factors(maps.flatten(1))
        # Combining costs another rho multiply-adds for each value of a layer's product.
        rank = phases.shape[1]
        pays = rank * n_features + rank * self.n_positions < self.n_positions * n_features
        self.n_rows = rank if pays else self.n_positions
        self._phases = phases.float() if pays else None
        if pays:
            maps = rows.unflatten(1, maps.shape[1:])
        space, columns = _factors(maps.transpose(0, 1).flatten(1))
        self._space = space if space.shape[1] < n_features else None
        if self._space is not None:
            maps = columns.unflatten(1, (self.n_rows, -1)).transpose(0, 1)
        self._windows = Product(maps.flatten(0, 1), torch.float32, n_frames)
        self._window_size = maps.shape[2]

    def folded(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's weight (C, N) in float64, as its weight on rows (C, r) and a bias (C,)."""
        bias = weight @ self._offset
        return (weight if self._space is None else weight @ self._space), bias

    def rows(self, mel: Tensor) -> Tensor:
        """Mel (F, M) to rows (F rho, r)."""
        n_frames, n_mels = mel.shape
        n_taps = self._window_size // n_mels
        padded = F.pad(mel, (0, 0, n_taps - 1, 0))
        windows = [padded[n_taps - 1 - j :][:n_frames] for j in range(n_taps)]
        return self._windows(torch.cat(windows, 1)).view(n_frames * self.n_rows, -1)

    def row_range(self, positions: slice) -> slice:
        """The rows of a range of positions, both whole frames."""
        first, last = positions.start, positions.stop
        return slice(
            first // self.n_positions * self.n_rows, last // self.n_positions * self.n_rows
        )

    def positions(self, rows: Tensor) -> Tensor:
        """A layer's product in rows (F rho, C) to its values at the positions, (F P, C)."""
        if self._phases is None:
            return rows
        frames = rows.unflatten(0, (-1, self.n_rows))
        return (self._phases.to(rows.dtype) @ frames).flatten(0, 1)


def _factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left (m, rank) with orthonormal columns and right (rank, n), whose product is `matrix`."""
    # The triangle has the singular values of the whole and is far smaller.
    triangle = torch.linalg.qr(matrix.T, mode="r").R.T
    left, values, _ = torch.linalg.svd(triangle, full_matrices=False)
    left = left[:, values >= _NEGLIGIBLE * values[0]]
    return left, left.T @ matrix
