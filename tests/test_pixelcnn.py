"""PixelCNN's masks, by the zeros of Jacobians."""

import torch
from torch import Tensor, nn

from waveflow.nn.pixel_net import PixelNet, mask_a, mask_b

ROW = 8


def reached(network: nn.Module, length: int) -> Tensor:
    """(T, T), True where the parameters of a sample (first axis) depend on a sample."""
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1, 1, length, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(network.double(), x, vectorize=True)
    return jacobian.abs().sum((0, 1, 3, 4)) > 0


def test_the_masks_of_a_kernel() -> None:
    """As pictures: rows above, and to the left in the row of the pixel X, which mask B keeps."""
    picture = ["ooo", "oX.", "..."]
    kept = {(1 - r) * ROW - (c - 1) for r in range(3) for c in range(3) if picture[r][c] == "o"}
    assert set(mask_a(ROW, 3).tolist()) == kept
    assert set(mask_b(ROW, 3).tolist()) == kept | {0}
    assert len(mask_a(ROW, 7)) == 24


def test_the_first_layer_sees_mask_a_and_the_next_one_mask_b() -> None:
    torch.manual_seed(0)
    length = 5 * ROW
    lag = torch.arange(length)[:, None] - torch.arange(length)
    first = torch.isin(lag, mask_a(ROW, 7))
    assert torch.equal(reached(PixelNet(ROW, 0, 9, 2, n_layers=0), length), first)
    second = (torch.isin(lag, mask_b(ROW, 3)).float() @ first.float()) > 0
    network = PixelNet(ROW, 0, 9, 2, n_layers=1)
    # The residual hides whether the second layer sees the pixel itself.
    assert torch.equal(network.lags_b, mask_b(ROW, 3))
    seen = reached(network, length)
    assert torch.equal(seen, second)
    # No sample sees itself or a later one, at the beginning of a row either.
    assert not seen.triu().any()
    assert seen.diagonal(-1).all()


def test_it_looks_as_far_as_it_says() -> None:
    torch.manual_seed(0)
    network = PixelNet(ROW, 0, 9, 2, n_layers=2)
    length = int(network.context.left) + 3
    assert reached(network, length)[-1].nonzero()[0].item() == 2
