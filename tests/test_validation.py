"""Validation, and where a run's figures, sounds and pictures go."""

import csv
import json
import logging
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import (
    HOP,
    MEL,
    MODEL,
    MODELS,
    PLAIN,
    RATE,
    perturbed,
    recipe,
    speech,
    write_cache,
)
from torch import Tensor, nn

from waveflow.audio.dequantise import dequantise
from waveflow.audio.mel import MelSpectrogram
from waveflow.bijections import Affine, AllActive, Chain, Coupling, Inverse, Squeeze
from waveflow.data.cache import TrainingCache
from waveflow.distributions import standard_normal_log_prob
from waveflow.errors import ConfigError
from waveflow.flow import Flow
from waveflow.training import loop, validation
from waveflow.training.log import WANDB_SWITCH, MetricsLog, mel_picture
from waveflow.training.loop import Progress, Trainer
from waveflow.training.validation import (
    Validation,
    _student_95,
    latent_statistics,
    learned_steps,
    power_sums,
    ratio_interval,
    record_step_log_dets,
    score_clips,
    summarise,
    validate,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TrainingCache:
    folder = tmp_path_factory.mktemp("caches") / "tiny"
    return write_cache(folder, ["train", "train", "val", "val", "val"])


def validated(flow: Flow, cache: TrainingCache) -> Validation:
    return validate(flow, cache, MelSpectrogram(MEL), CPU)


# --- statistics of z ---


def test_statistics_are_those_of_the_values() -> None:
    rng = np.random.default_rng(0)
    values = rng.gamma(2.0, size=30_000) - 0.5  # skewed, heavy-tailed, not centred
    parts = np.split(values, [100, 20_000])
    sums = torch.stack([power_sums(torch.from_numpy(part)) for part in parts]).sum(0)
    found = latent_statistics(sums, len(values))
    centred = values - values.mean()
    kurtosis = (centred**4).mean() / (centred**2).mean() ** 2
    assert found == pytest.approx((values.mean(), values.std(), kurtosis), rel=1e-9)
    assert kurtosis > 4


def test_statistics_know_a_gaussian_from_a_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(200_000, generator=generator)
    uniform = torch.rand(200_000, generator=generator)
    mean, deviation, kurtosis = latent_statistics(power_sums(gaussian), gaussian.numel())
    # Standard errors: 0.0022 of the mean, 0.0016 of the deviation, sqrt(24 / n) = 0.011.
    assert (mean, deviation) == pytest.approx((0, 1), abs=0.01)
    assert kurtosis == pytest.approx(3, abs=0.05)
    assert latent_statistics(power_sums(uniform), 200_000).kurtosis == pytest.approx(1.8, abs=0.02)
    assert math.isnan(latent_statistics(power_sums(torch.zeros(5)), 5).kurtosis)


@pytest.mark.parametrize("name", MODELS)
def test_every_step_with_weights_is_named_in_order_and_the_sum_is_the_whole(name: str) -> None:
    flow, (audio, mel) = perturbed(MODELS[name]), speech()
    steps = learned_steps(flow.bijection)
    coupling, mixing = "coupling", "invertibleconv1x1"
    expected = {
        "frameglow": [coupling] * 3 + [coupling, mixing] * 2,  # base, two levels, two flows
        "waveglow": [mixing, coupling] * 3,
    }[name]
    assert list(steps) == [f"{i:02d}_{kind}" for i, kind in enumerate(expected, 1)]
    with torch.no_grad(), record_step_log_dets(steps) as log_dets:
        log_prob, z = flow.log_prob(audio, flow.condition(mel))
    assert set(log_dets) == set(steps)
    log_det = log_prob * audio.shape[1] - standard_normal_log_prob(z)
    torch.testing.assert_close(sum(log_dets.values()), log_det, rtol=1e-4, atol=0.05)
    # The hooks are gone.
    before = dict(log_dets)
    flow.log_prob(0.5 * audio, flow.condition(mel))
    assert all(torch.equal(log_dets[k], before[k]) for k in before)


def test_a_step_that_runs_backwards_has_the_sign_of_its_use() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.tensor(0.5))

        def forward(self, passive: Tensor, features: Tensor, mask: None = None) -> Tensor:
            size = (2, 4, 6)
            return torch.cat([torch.zeros(size), self.log_scale.expand(size)], 1)

    chain = Chain(Squeeze(4), Inverse(Chain(Coupling(Scale(), Affine(), AllActive()))))
    steps = learned_steps(chain)
    assert list(steps) == ["01_inverse"]
    with record_step_log_dets(steps) as log_dets:
        _, log_det = chain(torch.randn(2, 1, 24))
    torch.testing.assert_close(log_dets["01_inverse"], log_det)
    assert (log_det < 0).all()


# --- validation ---


def test_validation_says_where_the_likelihood_comes_from(cache: TrainingCache) -> None:
    flow = perturbed(MODEL.model_copy(update={"phase_path": False}))
    result = validated(flow, cache)
    mean, deviation, _ = result.latent
    gaussian = -0.5 * (mean**2 + deviation**2 + math.log(2 * math.pi))
    assert result.log_likelihood == pytest.approx(
        gaussian + sum(result.log_dets.values()), abs=1e-4
    )
    assert result.speech.shape == result.example.shape
    assert result.speech.dim() == 1


@pytest.mark.parametrize("padding", ["hop", "center"])
def test_validation_is_the_likelihood_of_each_clip_and_of_a_draw(
    cache: TrainingCache, padding: str
) -> None:
    """Means over audio samples, of audio with the noise of its own seed, and of whole hops."""
    flow = perturbed(MODEL)
    spectrogram = MelSpectrogram(MEL.model_copy(update={"padding": padding}))
    result = validate(flow, cache, spectrogram, CPU)
    speech_sum = draw_sum = n_samples = 0.0
    for index, (clip, samples, given) in enumerate(cache.val_clips()):
        assert given is None
        audio = dequantise(samples, index)[None, : clip.frames * HOP]
        mel = spectrogram(audio)[..., : clip.frames]
        draw = flow.sample(mel, seed=0)
        with torch.no_grad():
            speech_sum += flow(audio, mel).item() * audio.shape[1]
            draw_sum += flow(draw, mel).item() * audio.shape[1]
        n_samples += audio.shape[1]
        if index == 0:
            torch.testing.assert_close(result.speech, audio[0])
            torch.testing.assert_close(result.example, draw[0], rtol=0, atol=1e-6)
    assert result.log_likelihood == pytest.approx(speech_sum / n_samples, abs=1e-5)
    assert result.draw_log_likelihood == pytest.approx(draw_sum / n_samples, abs=1e-5)


def test_tables_of_several_processes_add_up_exactly(cache: TrainingCache) -> None:
    flow = perturbed(MODEL)
    scores, audio, draw = score_clips(flow, cache, MelSpectrogram(MEL), CPU)
    assert len(scores) == 3
    mine, theirs = scores.clone(), scores.clone()
    mine[1] = 0
    theirs[[0, 2]] = 0
    assert torch.equal(mine + theirs, scores)
    whole = summarise(scores, flow, audio, draw)
    assert whole == whole._replace(**summarise(mine + theirs, flow, audio, draw)._asdict())
    assert whole.log_likelihood == pytest.approx(
        (scores[:, 1].sum() / scores[:, 0].sum()).item(), rel=1e-12
    )


def test_each_process_scores_its_own_clips(
    cache: TrainingCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, spectrogram = perturbed(MODEL), MelSpectrogram(MEL)
    whole, _, _ = score_clips(flow, cache, spectrogram, CPU)
    monkeypatch.setattr(validation, "world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(validation, "rank", lambda rank=rank: rank)
        shares.append(score_clips(flow, cache, spectrogram, CPU)[0])
    assert [[bool(row.any()) for row in share] for share in shares] == [
        [True, False, True],
        [False, True, False],
    ]
    assert torch.equal(shares[0] + shares[1], whole)


def test_the_interval_of_equal_clips_is_that_of_a_mean() -> None:
    values = torch.tensor([4.0, 5.0, 5.5, 6.0, 4.5, 5.2], dtype=torch.float64)
    expected = 2.5706 * values.std().item() / math.sqrt(6)  # Student's t, 5 degrees of freedom
    found = ratio_interval(values * 1000, torch.full_like(values, 1000))
    assert found == pytest.approx(expected, rel=2e-3)
    assert ratio_interval(values[:1], torch.ones(1)) is None


@pytest.mark.parametrize(
    ("degrees", "exact", "tolerance"), [(3, 3.1824, 0.01), (10, 2.2281, 1e-3), (100, 1.9840, 1e-4)]
)
def test_student(degrees: int, exact: float, tolerance: float) -> None:
    assert _student_95(degrees) == pytest.approx(exact, rel=tolerance)


def test_the_interval_covers_the_mean_of_unequal_clips() -> None:
    """In 95 % of 1000 made-up validations of 20 clips: a binomial deviation is 0.7 %."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        weights = torch.from_numpy(rng.uniform(1, 10, 20))
        values = torch.from_numpy(rng.normal(5.0, 0.5, 20))
        mean = ((values * weights).sum() / weights.sum()).item()
        covered += abs(mean - 5.0) <= ratio_interval(values * weights, weights)
    assert 0.92 <= covered / 1000 <= 0.97


# --- what is written down ---


def test_metrics_are_logged(
    cache: TrainingCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    settings = recipe(steps=4, validate_every=2, checkpoint_every=4, pitch_steps=3)
    Trainer(settings, cache, tmp_path / "run").run()
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows.pop(0) == ["kind", "step", "minutes", "name", "value"]
    pace = ["learning_rate", "waiting_share", "skipped"]
    figures = [(row[0], row[1], row[3]) for row in rows]
    assert [figure for figure in figures if figure[0] != "log_det"] == [
        ("train", "2", "pitch_loss"),
        ("train", "2", "gradient_norm"),
        *(("train", "2", name) for name in pace),
        ("train", "4", "log_likelihood"),
        ("train", "4", "energy"),
        ("train", "4", "calibration"),
        ("train", "4", "gradient_norm"),
        *(("train", "4", name) for name in pace),
        ("validation", "4", "lower_bound"),
        ("validation", "4", "interval"),
        ("validation", "4", "draw_lower_bound"),
        ("z", "4", "mean"),
        ("z", "4", "standard_deviation"),
        ("z", "4", "kurtosis"),
    ]
    assert ("log_det", "4", "01_coupling") in figures
    assert all(math.isfinite(float(row[2])) and math.isfinite(float(row[4])) for row in rows)
    found = {(row[0], row[1], row[3]): float(row[4]) for row in rows}
    assert found["validation", "4", "interval"] > 0
    assert 0 <= found["train", "4", "waiting_share"] < 1
    # Warm-up begins anew with the flow's own steps.
    assert found["train", "2", "learning_rate"] == pytest.approx(1e-3 / math.sqrt(1 + 1 / 4000))
    assert found["train", "4", "learning_rate"] == pytest.approx(1e-3 / 2)


def test_tensorboard_has_curves_sounds_and_pictures(
    cache: TrainingCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    Trainer(recipe(steps=2, **PLAIN), cache, tmp_path / "run").run()
    events = accumulator.EventAccumulator(str(tmp_path / "run")).Reload().Tags()
    assert set(events["audio"]) == {"speech", "draw"}
    assert set(events["images"]) == {"speech_mel", "draw_mel"}
    assert {
        "train/learning_rate",
        "train/gradient_norm",
        "validation/interval",
        "z/kurtosis",
    } <= set(events["scalars"])


def test_curves_of_a_killed_run_go_on_where_it_is_taken_up(
    cache: TrainingCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step once: those after the last checkpoint are drawn anew, its own stays."""
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = recipe(steps=5, checkpoint_every=2, validate_every=2, **PLAIN)

    def kill(progress: Progress) -> None:
        if progress.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(settings, cache, tmp_path / "run").run(report=kill)
    Trainer(settings, cache, tmp_path / "run", resume=True).run()
    events = accumulator.EventAccumulator(str(tmp_path / "run")).Reload()
    steps = [event.step for event in events.Scalars("train/learning_rate")]
    assert steps == [1, 2, 3, 4, 5]
    assert [event.step for event in events.Scalars("z/mean")] == [2, 4, 5]


def test_pictures_show_low_bands_below_and_loud_as_white() -> None:
    mel = torch.full((20, 30), -11.5)
    mel[0] = 2.0
    picture = mel_picture(mel)
    assert (picture.shape, picture.dtype) == ((1, 40, 30), torch.uint8)
    assert (picture[0, -2:] == 255).all()
    assert (picture[0, :-2] == 0).all()


def test_without_tensorboard_the_table_alone_and_a_note(
    cache: TrainingCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.INFO, "waveflow"):
        Trainer(recipe(steps=2, **PLAIN), cache, tmp_path / "run").run()
    assert [r.message for r in caplog.records if "tensorboard" in r.message] == [
        f"tensorboard is not installed: metrics go to {tmp_path / 'run' / 'metrics.csv'} alone"
    ]
    assert "kurtosis" in (tmp_path / "run" / "metrics.csv").read_text()
    assert not list((tmp_path / "run").glob("events.*"))


class StandIn(types.ModuleType):
    """Weights & Biases as far as we call it."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> "StandIn":
        self.started.append(arguments)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1

    def Audio(self, data: np.ndarray, sample_rate: int) -> tuple[tuple[int, ...], int]:
        return data.shape, sample_rate

    def Image(self, data: np.ndarray) -> tuple[int, ...]:
        return data.shape


def test_weights_and_biases_gets_the_run_and_goes_on_with_it(
    cache: TrainingCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setenv(WANDB_SWITCH, "vocoders")
    monkeypatch.setattr(loop, "LOG_EVERY", 4)
    short = recipe(steps=4, validate_every=2, **PLAIN)
    Trainer(short, cache, tmp_path / "run").run()
    Trainer(short, cache, tmp_path / "run", resume=True).run()
    first, second = stand_in.started
    assert (first["project"], first["name"], first["resume"]) == ("vocoders", "run", "allow")
    assert first["id"] == second["id"]
    assert json.loads(first["config"]["recipe"])["train"]["steps"] == 4
    assert stand_in.finished == 2
    names = {name for values in stand_in.logged for name in values}
    assert {"train/learning_rate", "z/kurtosis", "draw", "draw_mel", "speech"} <= names
    assert all("step" in values for values in stand_in.logged)
    [sound, _] = [values["draw"] for values in stand_in.logged if "draw" in values]
    assert sound[1] == RATE
    assert sum("speech" in values for values in stand_in.logged) == 1


def test_weights_and_biases_is_off_and_optional(
    cache: TrainingCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delenv(WANDB_SWITCH, raising=False)
    with MetricsLog(tmp_path, 0, MEL):
        pass
    monkeypatch.setenv(WANDB_SWITCH, "vocoders")
    with pytest.raises(ConfigError, match=r"waveflow\[wandb\]"), MetricsLog(tmp_path, 0, MEL):
        pass
