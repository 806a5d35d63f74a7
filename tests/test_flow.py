"""Flow: its density, lengths, round trips, and the noise that draws are made from."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from waveflow.distributions import NOISE_BLOCK_FRAMES, draw_noise, standard_normal_log_prob
from waveflow.flow import Flow
from waveflow.models.waveglow import WaveGlowConfig, waveglow

HOP = 8
CONFIG = WaveGlowConfig(
    n_mels=3,
    hop_length=HOP,
    n_flows=3,
    squeeze_factor=4,
    n_early_every=2,
    n_layers=2,
    hidden_channels=4,
    upsample_kernel=2 * HOP,
)


@pytest.fixture
def flow() -> Flow:
    torch.manual_seed(0)
    flow = waveglow(CONFIG).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return flow


def _batch(n_frames: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    audio = torch.randn(2, n_frames * HOP, generator=generator, dtype=torch.float64)
    return audio, torch.randn(2, 3, n_frames, generator=generator, dtype=torch.float64)


def test_log_likelihood_is_the_change_of_variables(flow: Flow) -> None:
    """log N(z) + log|det dz/dx| from the Jacobian of `encode`, per audio sample."""
    audio, mel = _batch(3)
    log_prob = flow(audio, mel)
    assert log_prob.shape == (2,)
    for item in range(2):
        own_mel = mel[item : item + 1]

        def encode(x: Tensor, own_mel: Tensor = own_mel) -> Tensor:
            return flow.encode(x[None], own_mel).flatten()

        jacobian = torch.autograd.functional.jacobian(encode, audio[item])
        normal = torch.distributions.Normal(0.0, 1.0).log_prob(encode(audio[item])).sum()
        expected = (normal + torch.linalg.slogdet(jacobian)[1]) / (3 * HOP)
        torch.testing.assert_close(log_prob[item], expected, rtol=0, atol=1e-10)


def test_round_trips(flow: Flow) -> None:
    audio, mel = _batch(5)
    z = flow.encode(audio, mel)
    assert z.shape == (2, 4, 5 * HOP // 4)
    torch.testing.assert_close(flow.decode(z, mel), audio, rtol=0, atol=1e-10)
    z = torch.randn_like(z)
    torch.testing.assert_close(flow.encode(flow.decode(z, mel), mel), z, rtol=0, atol=1e-10)


def test_audio_shorter_than_its_mel(flow: Flow) -> None:
    """Whole groups are enough: the condition is cropped to them, and no later frame enters."""
    audio, mel = _batch(5)
    short = audio[:, : 3 * HOP - 4]
    torch.testing.assert_close(flow(short, mel), flow(short, mel[:, :, :3]))
    torch.testing.assert_close(flow.decode(flow.encode(short, mel), mel), short)


@pytest.mark.parametrize("lengths", [[5, 2], [1, 4], [5, 5]])
def test_padded_items_get_what_they_get_alone(flow: Flow, lengths: list[int]) -> None:
    audio, mel = _batch(5)
    n_frames = torch.tensor(lengths)
    batch = flow(audio, mel, n_frames)
    z = flow.encode(audio, mel, n_frames)
    again = flow.decode(z, mel, n_frames)
    for i, n in enumerate(lengths):
        own = audio[i : i + 1, : n * HOP], mel[i : i + 1, :, :n]
        torch.testing.assert_close(batch[i], flow(*own)[0])
        torch.testing.assert_close(z[i, :, : n * HOP // 4], flow.encode(*own)[0])
        torch.testing.assert_close(again[i, : n * HOP], own[0][0], rtol=0, atol=1e-10)
        assert not z[i, :, n * HOP // 4 :].any()
        assert not again[i, n * HOP :].any()


def test_noise_in_the_padding_does_not_enter(flow: Flow) -> None:
    """However large: it must not overflow into the valid part as 0 times infinity either."""
    audio, mel = _batch(5)
    n_frames = torch.tensor([5, 2])
    z = flow.encode(audio, mel, n_frames)
    expected = flow.decode(z, mel, n_frames)
    z[1, :, 2 * HOP // 4 :] = 1.7e308
    assert torch.equal(flow.decode(z, mel, n_frames), expected)


def test_gradients_reach_every_parameter(flow: Flow) -> None:
    audio, mel = _batch(4)
    (-flow(audio, mel).mean()).backward()
    dead = [n for n, p in flow.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_normal_log_prob_is_that_of_torch() -> None:
    torch.manual_seed(0)
    z = torch.randn(3, 4, 5, dtype=torch.float64)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z)
    torch.testing.assert_close(standard_normal_log_prob(z), expected.sum((1, 2)))
    mask = (torch.arange(5) < torch.tensor([[5], [3], [1]]))[:, None]
    torch.testing.assert_close(standard_normal_log_prob(z, mask), (expected * mask).sum((1, 2)))


def test_noise_shape_and_order_of_samples() -> None:
    """Position l of channel c is sample l C + c of the utterance, whatever the squeeze."""
    flow = waveglow(CONFIG)
    noise = flow.noise(3, [7, 8])
    assert noise.shape == (2, 4, 3 * HOP // 4)
    assert noise.dtype == torch.float32
    torch.testing.assert_close(
        noise.transpose(1, 2).flatten(1), draw_noise(3, HOP, [7, 8]), rtol=0, atol=0
    )


def test_noise_is_standard_normal() -> None:
    noise = draw_noise(4 * NOISE_BLOCK_FRAMES, 256, [0, 1]).double()
    n = noise.numel()
    # Five standard errors of the mean, the variance and the fourth moment.
    assert abs(noise.mean()) < 5 / math.sqrt(n)
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs(noise.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)


def test_no_two_blocks_share_noise() -> None:
    """Neither blocks of one seed nor neighbouring seeds, shifted by any number of blocks."""
    blocks = draw_noise(8 * NOISE_BLOCK_FRAMES, 4, range(-3, 5)).reshape(64, -1)
    correlation = torch.corrcoef(blocks) - torch.eye(64)
    # 2016 pairs of 256 samples: standard error 1 / 16, and 6 of them never happen by chance.
    assert correlation.abs().max() < 6 / 16


SEEDS = st.integers(min_value=-(2**63), max_value=2**63 - 1)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    seeds=st.lists(SEEDS, min_size=1, max_size=4),
    frames=st.integers(1, 3 * NOISE_BLOCK_FRAMES),
    more=st.integers(0, 2 * NOISE_BLOCK_FRAMES),
)
def test_noise_of_an_item_is_its_own(seeds: list[int], frames: int, more: int) -> None:
    """The same in a batch of any order and alone, and a prefix of a longer draw."""
    batch = draw_noise(frames + more, 2, seeds)
    assert torch.equal(batch.flip(0), draw_noise(frames + more, 2, seeds[::-1]))
    for row, seed in zip(batch, seeds, strict=True):
        assert torch.equal(draw_noise(frames, 2, [seed])[0], row[: 2 * frames])


def test_noise_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw_noise(2, 4, [3])
    assert torch.equal(before, torch.get_rng_state())
