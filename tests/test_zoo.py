"""Every model of the zoo draws, streams, loads and trains; samplers equal their networks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import SMALL
from torch import Tensor, nn

import waveflow
from waveflow.audio.mel import MelConfig
from waveflow.bijections import Affine, Autoregressive, BatchNorm, OverChannels, OverTime
from waveflow.checkpoint import ModelConfig, save_checkpoint
from waveflow.engine.decoder import make_decoder
from waveflow.engine.fast import product
from waveflow.engine.vocoder import Vocoder
from waveflow.errors import ConfigError
from waveflow.models.registry import build_flow
from waveflow.nn.causal_wavenet import CausalWaveNet
from waveflow.nn.made import MADE
from waveflow.nn.pixel_net import PixelNet
from waveflow.nn.row_net import RowNet
from waveflow.objective import Batch, Share

pytestmark = pytest.mark.filterwarnings("ignore:.*were clipped")

HOP = 16
MEL = MelConfig(sample_rate=8000, n_fft=64, hop_length=HOP, win_length=64, n_mels=5, f_max=4000.0)


@pytest.fixture(params=SMALL)
def vocoder(request: pytest.FixtureRequest) -> Vocoder:
    return random_vocoder(request.param, 0.05)


def random_vocoder(kind: str, spread: float) -> Vocoder:
    """A model with random weights, so that no network is zero."""
    config = SMALL[kind][0]
    torch.manual_seed(0)
    flow = build_flow(config, MEL)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return Vocoder(ModelConfig(model=config, mel=MEL), flow)


def random_mel(n_frames: int) -> Tensor:
    return torch.randn(5, n_frames, generator=torch.Generator().manual_seed(1)) - 5


def test_a_draw_is_finite_and_follows_the_mel_and_the_seed(vocoder: Vocoder) -> None:
    mel = random_mel(6)
    audio = vocoder.flow.sample(mel[None], seed=3)
    assert audio.shape == (1, 6 * HOP)
    assert audio.isfinite().all()
    assert torch.equal(audio, vocoder.flow.sample(mel[None], seed=3))
    assert not torch.equal(audio, vocoder.flow.sample(mel[None], seed=4))
    assert not torch.equal(audio, vocoder.flow.sample(mel[None] + 1, seed=3))


@torch.no_grad()
def test_the_likelihood_of_frames_is_that_of_the_whole(vocoder: Vocoder) -> None:
    """And a frame that is unlike speech has less of it, beside the others."""
    mel, audio = (
        random_mel(8),
        0.1 * torch.randn(8 * HOP, generator=torch.Generator().manual_seed(2)),
    )
    if vocoder.is_bound:
        with pytest.raises(ConfigError, match="no sum over frames"):
            vocoder.log_prob_by_frame(audio, mel)
        return
    frames = vocoder.log_prob_by_frame(audio, mel)
    assert frames.shape == (1, 8)
    torch.testing.assert_close(frames.mean(1), vocoder.log_prob(audio, mel), rtol=1e-4, atol=1e-4)
    loud = audio.clone()
    loud[5 * HOP : 6 * HOP] *= 30
    change = vocoder.log_prob_by_frame(loud, mel) - frames
    assert change[0].argmin() in (4, 5, 6) and change.min() < -1


@torch.no_grad()
def test_a_padded_item_gets_what_it_gets_alone(vocoder: Vocoder) -> None:
    flow, mel = vocoder.flow, torch.stack([random_mel(6), random_mel(6) + 1])
    audio = 0.1 * torch.randn(2, 6 * HOP, generator=torch.Generator().manual_seed(2))
    likelihood = flow(audio, mel, torch.tensor([6, 4]))
    alone = flow(audio[1:, : 4 * HOP], mel[1:, :, :4])
    torch.testing.assert_close(likelihood[1:], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("packed", [True, False], ids=["oneDNN", "torch's own"])
def test_the_engine_makes_what_the_flow_makes(
    vocoder: Vocoder, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By both routines of a product, whichever is faster here."""
    monkeypatch.setattr(product, "onednn_pays", lambda *_: packed)
    z, mel = vocoder.flow.noise(4, [0]), random_mel(4)[None]
    audio = make_decoder(vocoder.flow)(z, mel)
    torch.testing.assert_close(audio, vocoder.flow.decode(z, mel), rtol=0, atol=1e-5)


def test_a_stream_equals_the_whole(vocoder: Vocoder) -> None:
    mel = random_mel(12)
    pieces = list(vocoder.stream(mel.split(3, 1), refine=0, least_frames=1))
    torch.testing.assert_close(torch.cat(pieces), vocoder(mel, refine=0), rtol=0, atol=1e-5)


def test_a_stream_of_a_wavenet_forgets_what_its_network_no_longer_sees() -> None:
    vocoder = random_vocoder("wavenet", 0.2)
    mel = random_mel(40)
    # Seven samples before it; the mel's encoder has two frames on each side.
    assert vocoder.flow.context == (3, 2)
    lengths = []
    decode = vocoder.flow.decode

    def counted(z: Tensor, *args: Any) -> Tensor:
        lengths.append(z.shape[2] // HOP)
        return decode(z, *args)

    vocoder = Vocoder(vocoder.config, vocoder.flow, lambda flow: counted)
    pieces = list(vocoder.stream(mel.split(2, 1), refine=1, least_frames=1))
    whole = vocoder(mel, refine=1)
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=1e-5)
    assert len(lengths) > 15 and max(lengths[:-1]) < 25


@pytest.mark.parametrize("kind", ["wavenet", "wavenet_mixture"])
def test_a_padded_batch_of_a_wavenet_streams(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from waveflow.engine import streaming

    monkeypatch.setattr(streaming, "WINDOW_FRAMES", 4)
    vocoder = random_vocoder(kind, 0.1)
    mel = torch.stack([random_mel(20), random_mel(20) + 1])
    batch, _ = vocoder(mel, lengths=torch.tensor([20, 9]), refine=0)
    alone = vocoder(mel[1, :, :9], refine=0)
    torch.testing.assert_close(batch[1, : 9 * HOP], alone, rtol=0, atol=1e-5)


def test_a_checkpoint_brings_it_back(vocoder: Vocoder, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", vocoder.config, vocoder.flow.state_dict())
    loaded = waveflow.load(tmp_path / "model")
    assert loaded.config.model == vocoder.config.model
    mel = random_mel(4)
    assert torch.equal(loaded(mel), vocoder(mel))


def test_some_steps_of_training_raise_the_likelihood(vocoder: Vocoder) -> None:
    flow = vocoder.flow.train()
    # Short: some densities are made sample by sample.
    audio, mel = 0.1 * torch.randn(4, 2 * HOP), random_mel(2).expand(4, -1, -1)
    batch = Batch(audio, mel, torch.zeros(4, 2), Share(0, 4, 4))
    optimizer = torch.optim.Adam(flow.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = torch.stack([*flow.training_loss(batch, flow.condition(mel)).values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # The first step of RealNVP and Glow starts their normalisation.
    assert losses[-1] < losses[1]


# --- autoregressive steps ---


class Whole(nn.Module):
    """A network without its `steps`, which counts its passes."""

    context = (0, 0)

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.n_passes = 0

    def forward(self, x: Tensor, features: Tensor | None, mask: Tensor | None) -> Tensor:
        self.n_passes += 1
        return self.network(x, features, mask)


NETWORKS: dict[str, Any] = {
    "MADE": lambda: OverChannels(MADE(8, 3, 20, 2), Affine(), 8),
    "RowNet": lambda: OverChannels(RowNet(8, 3, 4, 2, [1, 2, 4]), Affine(), 8),
    "PixelNet": lambda: OverTime(PixelNet(8, 3, 4, 2, 2), Affine()),
    "WaveNet": lambda: OverTime(CausalWaveNet(1, 3, 6, 2, [1, 2, 4, 1, 2, 4]), Affine()),
}


@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_cached_steps_equal_the_whole_network(kind: str) -> None:
    torch.manual_seed(0)
    step: Autoregressive = NETWORKS[kind]()
    for parameter in step.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    shape = (2, 8, 10) if kind in ("MADE", "RowNet") else (2, 1, 60)
    z, features = torch.randn(shape), torch.randn(2, 3, shape[2])
    cond = waveflow.bijections.Condition(features)
    x, log_det = step.inverse(z, cond)
    step.network = Whole(step.network)
    plain, plain_log_det = step.inverse(z, cond)
    torch.testing.assert_close(x, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(log_det, plain_log_det, rtol=0, atol=1e-4)
    assert step.network.n_passes == z.shape[step.axis]


def test_mades_jacobian_is_zero_where_the_masks_say() -> None:
    torch.manual_seed(0)
    made = MADE(5, 0, 17, 2)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: made(x[None])[0], torch.randn(5, 20), vectorize=True
    )
    # Over 20 positions: a unit of ReLU may be silent at one.
    seen = jacobian.abs().sum((1, 3))
    for params in seen.chunk(2):
        assert torch.equal(params != 0, torch.ones(5, 5).tril(-1).bool())


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_networks_need_no_features() -> None:
    for network, channels in (
        (RowNet(4, 0, 8, 2, [1, 1]), 4),
        (CausalWaveNet(1, 0, 8, 2, [1]), 1),
        (MADE(4, 0, 8, 2), 4),
    ):
        assert network(torch.randn(2, channels, 5)).shape == (2, 2 * channels, 5)


def test_too_few_parameters_are_refused() -> None:
    step = OverChannels(MADE(4, 0, 8, 1), Affine(), 4)
    with pytest.raises(ValueError, match=r"makes \(2, 4, 3\) of \(2, 4, 3\).*needs \(2, 8, 3\)"):
        step(torch.randn(2, 4, 3))


def test_batch_norms_log_determinant_is_exact_in_training() -> None:
    """Its averages are constants of the batch that moves them."""
    torch.manual_seed(0)
    step = BatchNorm(3, momentum=0.5).train()
    step(torch.randn(4, 3, 10))
    x = 2 + 3 * torch.randn(4, 3, 10)
    mean, variance = step.mean.clone(), step.variance.clone()
    jacobian = torch.autograd.functional.jacobian(lambda v: step(v)[0][0], x)[:, :, 0]
    assert not torch.equal(step.mean, mean)
    step.mean.copy_(mean)
    step.variance.copy_(variance)
    _, log_det = step(x)
    expected = torch.linalg.slogdet(jacobian.reshape(30, 30))[1]
    torch.testing.assert_close(log_det[0], expected, rtol=1e-4, atol=1e-4)
