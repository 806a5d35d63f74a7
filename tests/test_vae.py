"""The VAE: its bound, its density by quadrature, its draws, and that all call it a bound."""

import csv
import logging
import math
from pathlib import Path

import pytest
import torch
from tiny_training import MEL as TINY
from tiny_training import write_cache
from torch import Tensor

from waveflow.audio.mel import MelConfig
from waveflow.bijections import Condition
from waveflow.checkpoint import ModelConfig, load_checkpoint
from waveflow.cli.main import main
from waveflow.distributions import standard_normal_log_prob
from waveflow.engine.vocoder import Vocoder
from waveflow.flow import Flow
from waveflow.models.registry import build_flow
from waveflow.models.vae import VAEConfig
from waveflow.objective import Batch, Share
from waveflow.training.config import Recipe, TrainConfig
from waveflow.training.loop import Trainer

HOP = 16
MEL = MelConfig(sample_rate=8000, n_fft=64, hop_length=HOP, win_length=64, n_mels=5, f_max=4000.0)
# One latent for one sample: its density is an integral over a line.
SMALLEST = VAEConfig(squeeze_factor=1, n_latents=1, n_flows=1, hidden_channels=6, n_features=3)
USUAL = VAEConfig(squeeze_factor=4, n_latents=3, n_flows=2, hidden_channels=6, n_features=3)


def perturbed(config: VAEConfig, size: float) -> Flow:
    torch.manual_seed(0)
    flow = build_flow(config, MEL).eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return flow


class Line:
    """The smallest VAE on one sample: everything about it by sums over a fine line."""

    def __init__(self) -> None:
        self.flow = perturbed(SMALLEST, 0.4)
        mel = torch.randn(1, 5, 1, generator=torch.Generator().manual_seed(1)) - 5
        self.cond = self.flow.condition(mel).crop(1)
        self.grid = torch.linspace(-8, 8, 401)

    def of(self, n: int) -> Condition:
        return Condition(self.cond.features.expand(n, -1, -1))

    def log_p(self, x: Tensor) -> Tensor:
        """log of the integral of p(x, y) over y, (N,) of x (N,)."""
        levelled, of_x = self.flow.bijection[1](x[:, None, None], self.of(len(x)))
        joint = torch.cartesian_prod(levelled.flatten(), self.grid)[:, :, None]
        z, log_det = self.flow.bijection[3:](joint, self.of(len(joint)))
        log_p = (standard_normal_log_prob(z) + log_det).view(len(x), -1) + of_x[:, None]
        return log_p.logsumexp(1) + math.log(self.grid[1] - self.grid[0])

    def log_weights(self, x: float, n: int) -> Tensor:
        """log p(x, y) - log q(y | x) of n draws of y."""
        levelled, of_x = self.flow.bijection[1](torch.full((n, 1, 1), x), self.of(n))
        noise = torch.randn(n, 1, 1, generator=torch.Generator().manual_seed(2))
        joint, minus_log_q = self.flow.bijection[2](levelled, self.of(n), noise)
        z, log_det = self.flow.bijection[3:](joint, self.of(n))
        return standard_normal_log_prob(z) + log_det + minus_log_q + of_x


@torch.no_grad()
@pytest.mark.parametrize("x", [-1.0, 0.2, 1.5])
def test_the_bound_lies_below_and_its_weights_are_right(x: float) -> None:
    """The mean of the weights is p(x); the mean of their logarithms is the bound."""
    line = Line()
    weights = line.log_weights(x, 100_000)
    exact = line.log_p(torch.tensor([x])).item()
    estimate = weights.logsumexp(0).item() - math.log(len(weights))
    # Standard error of the mean of the weights, relative to it: five of them.
    error = (weights - exact).exp().std().item() / len(weights) ** 0.5
    assert estimate == pytest.approx(exact, abs=5 * error)
    assert error < 0.01
    # Far more than five standard errors below: this posterior is not that of the model.
    assert weights.mean().item() < exact - max(0.01, 5 * weights.std().item() / len(weights) ** 0.5)


@torch.no_grad()
def test_draws_have_the_density() -> None:
    line = Line()
    edges = torch.linspace(-6, 6, 241)
    cdf = torch.cumulative_trapezoid(line.log_p(edges).exp(), edges)
    assert cdf[-1] == pytest.approx(1, abs=1e-3)
    n = 20_000
    noise = torch.randn(n, 2, 1, generator=torch.Generator().manual_seed(3))
    draws = line.flow.bijection.inverse(noise, line.of(n))[0].flatten()
    share = torch.searchsorted(draws.sort().values, edges[1:]) / n
    # Kolmogorov's bound at a level of 1e-4.
    assert (share - cdf).abs().max() < 2.2 / n**0.5


@torch.no_grad()
def test_log_prob_is_the_mean_over_positions_of_the_bound() -> None:
    flow = perturbed(USUAL, 0.1)
    mel, audio = torch.randn(2, 5, 6) - 5, 0.1 * torch.randn(2, 6 * HOP)
    cond = flow.condition(mel)
    assert flow.is_bound
    # The noise repeats, and is the same for every item.
    assert torch.equal(flow(audio, mel), flow(audio, mel))
    twice = flow(audio[:1].repeat(2, 1), mel[:1].repeat(2, 1, 1))
    torch.testing.assert_close(twice[0], twice[1])
    # The training's terms are the same bound with other noise.
    batch = Batch(audio, mel, torch.zeros(2, 6), Share(0, 2, 2))
    flow.train()
    draws = []
    for seed in range(20):
        torch.manual_seed(seed)
        terms = flow.training_loss(batch, cond)
        torch.manual_seed(seed)
        draws.append(flow.log_prob(audio, cond)[0].mean())
        torch.testing.assert_close(-sum(terms.values()), draws[-1])
    flow.eval()
    spread = torch.stack(draws).std()
    assert spread > 1e-4
    assert abs(flow(audio, mel).mean() - torch.stack(draws).mean()) < 4 * spread


@torch.no_grad()
def test_parts_of_a_step_have_its_noise() -> None:
    flow = perturbed(USUAL, 0.1).train()
    audio, mel = 0.1 * torch.randn(3, 6 * HOP), torch.randn(3, 5, 6) - 5
    whole = Batch(audio, mel, torch.zeros(3, 6), Share(0, 3, 3))
    sums = {"reconstruction": 0.0, "kl": 0.0}
    for part in whole.split(2):
        torch.manual_seed(5)
        for name, term in flow.training_loss(part, flow.condition(part.mel)).items():
            sums[name] += term.item() * part.share.weight
    torch.manual_seed(5)
    for name, term in flow.training_loss(whole, flow.condition(mel)).items():
        assert sums[name] == pytest.approx(term.item(), rel=1e-4)


@torch.no_grad()
def test_encode_and_decode_undo_each_other() -> None:
    """The latents are there in z beside the residual, and decode needs both."""
    vocoder = Vocoder(ModelConfig(model=USUAL, mel=MEL), perturbed(USUAL, 0.1))
    audio, mel = 0.1 * torch.randn(2, 6 * HOP), torch.randn(2, 5, 6) - 5
    z = vocoder.encode(audio, mel)
    assert z.shape == (2, 7, 6 * HOP // 4)
    torch.testing.assert_close(vocoder.decode(z, mel), audio, rtol=0, atol=1e-5)


def test_every_place_calls_it_a_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "waveflow")
    cache = write_cache(tmp_path / "cache", ["train", "val"])
    config = USUAL.model_copy(update={"squeeze_factor": 32})
    train = TrainConfig(steps=2, batch_size=1, segment_frames=8)
    trainer = Trainer(Recipe(model=config, mel=TINY, train=train), cache, tmp_path / "run")
    trainer.run()
    assert "validation lower bound" in caplog.text
    with open(tmp_path / "run" / "metrics.csv") as file:
        names = {row["name"] for row in csv.DictReader(file) if row["kind"] == "validation"}
    assert names == {"lower_bound", "draw_lower_bound"}
    assert load_checkpoint(tmp_path / "run")[0].provenance.measure == "lower bound"
    capsys.readouterr()
    assert main(["info", str(tmp_path / "run")]) == 0
    assert f"lower bound     {trainer.best:.4f} on validation speech" in capsys.readouterr().out
