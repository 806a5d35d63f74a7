"""SqueezeWave: the published sizes, batch norm in training, and without it at synthesis."""

import pytest
import torch
from torch import Tensor

from waveflow.audio.mel import MEL_PRESETS
from waveflow.engine.fast.packed import DecodingKit
from waveflow.engine.fast.torch_decoder import TorchDecoder
from waveflow.errors import ConfigError
from waveflow.models.registry import build_flow
from waveflow.models.squeezewave import SqueezeWaveConfig
from waveflow.nn.separable_wavenet import SeparableWaveNet

MEL = MEL_PRESETS["hifigan"]
# Vectors of so many samples, channels, and the paper's billions of multiply-adds a second.
PUBLISHED = {
    "128L": (128, 256, 3.78),
    "128S": (128, 128, 1.06),
    "64L": (256, 256, 2.16),
    "64S": (256, 128, 0.68),
}


@pytest.mark.parametrize(
    "name", ["128S", *(pytest.param(n, marks=pytest.mark.slow) for n in ("128L", "64L", "64S"))]
)
def test_the_published_sizes(name: str) -> None:
    """Each weight multiplies once for a vector, and those of the features once for a frame."""
    n, hidden_channels, billions = PUBLISHED[name]
    flow = build_flow(SqueezeWaveConfig(squeeze_factor=n, hidden_channels=hidden_channels), MEL)
    total = sum(
        weight.numel() * MEL.sample_rate / (MEL.hop_length if ".condition." in key else n)
        for key, weight in flow.named_parameters()
        if weight.dim() > 1
    )
    assert total / 1e9 == pytest.approx(billions, rel=0.025)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"squeeze_factor 64 with n_early_size 16, 80 channels"):
        build_flow(SqueezeWaveConfig(squeeze_factor=64), MEL)


@pytest.fixture
def network() -> SeparableWaveNet:
    """With weights and averages that are not those of a new one."""
    torch.manual_seed(0)
    network = SeparableWaveNet(3, 5, 8, 6, n_layers=3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for norm in network.norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return network


def inputs(mask_value: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """x, features and a mask whose second item ends early; `mask_value` fills what lies beyond."""
    generator = torch.Generator().manual_seed(1)
    x, features = (torch.randn(2, n, 9, generator=generator) for n in (3, 5))
    mask = (torch.arange(9) < torch.tensor([[9], [5]]))[:, None].float()
    return x.masked_fill(mask == 0, mask_value), features, mask


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_without_its_norms_it_is_the_same(network: SeparableWaveNet, padded: bool) -> None:
    """At the ends of a signal too, where a tap meets zeros that no norm has shifted."""
    x, features, mask = inputs(float("nan") if padded else 0.0)
    given = mask if padded else None
    folded = DecodingKit().convert(network.eval())
    assert not any(isinstance(m, torch.nn.BatchNorm1d) for m in folded.modules())
    expected, result = network(x, features, given), folded(x, features, given)
    torch.testing.assert_close(result[:1], expected[:1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result[1:, :, :5], expected[1:, :, :5], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_layer_of_another_kind_stays(network: SeparableWaveNet) -> None:
    network.norms[1] = torch.nn.InstanceNorm1d(8)
    kept = DecodingKit().convert(network.eval())
    assert type(kept) is SeparableWaveNet


@torch.no_grad()
def test_its_decoder_is_its_flow() -> None:
    config = SqueezeWaveConfig(squeeze_factor=32, n_flows=2, n_early_size=8, hidden_channels=8)
    torch.manual_seed(0)
    flow = build_flow(config, MEL).train()
    for parameter in flow.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    mel = torch.randn(2, 80, 6) - 5
    flow(torch.randn(2, 6 * 256), mel)  # moves the averages
    flow.eval()
    z, lengths = flow.noise(6, [0, 1]), torch.tensor([6, 4])
    expected = flow.decode(z, mel, lengths)
    torch.testing.assert_close(TorchDecoder(flow)(z, mel, lengths), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_padding_does_not_move_the_norms(network: SeparableWaveNet) -> None:
    x, features, mask = inputs(float("nan"))
    network.train()
    network(x, features, mask)
    # The first norm sees the valid positions of `start`, 9 + 5 of them.
    h = network.start(x.transpose(1, 2))[mask[:, 0] != 0]
    norm = torch.nn.BatchNorm1d(8, momentum=1.0)
    norm(h)
    torch.manual_seed(0)
    fresh = SeparableWaveNet(3, 5, 8, 6, n_layers=3).train()
    fresh.load_state_dict(network.state_dict())
    fresh.norms[0].momentum = 1.0
    fresh(x, features, mask)
    torch.testing.assert_close(fresh.norms[0].running_mean, norm.running_mean)
    torch.testing.assert_close(fresh.norms[0].running_var, norm.running_var)


def test_the_log_determinant_is_exact_in_training() -> None:
    """The network sees the batch, but only makes the parameters of a coupling."""
    torch.manual_seed(0)
    config = SqueezeWaveConfig(
        squeeze_factor=4, n_flows=2, n_early_every=1, n_early_size=2, n_layers=2, hidden_channels=4
    )
    mel = MEL.model_copy(update={"hop_length": 4, "n_mels": 3})
    flow = build_flow(config, mel).double().train()
    for parameter in flow.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    audio = torch.randn(2, 8, dtype=torch.float64)
    cond = flow.condition(torch.randn(2, 3, 2, dtype=torch.float64))

    def mapped(values: Tensor) -> Tensor:
        return flow.bijection(values[:, None], cond)[0]

    _, log_det = flow.bijection(audio[:, None], cond)
    # Items see each other in training: the Jacobian is that of the whole batch.
    jacobian = torch.autograd.functional.jacobian(mapped, audio)
    expected = torch.linalg.slogdet(jacobian.reshape(16, 16))[1]
    torch.testing.assert_close(log_det.sum(), expected)
