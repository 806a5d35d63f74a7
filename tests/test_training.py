"""Recipes, and whole runs of the Trainer on a made-up voice and a tiny model."""

import hashlib
import importlib.metadata
import json
import logging
import math
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny_training import (
    HOP,
    MEL,
    MODELS,
    PLAIN,
    WAVEGLOW,
    WITH_NOISE_SHARE,
    assert_same,
    copied,
    perturbed,
    recipe,
    tensors_of,
    write_cache,
)
from torch import Tensor

from waveflow.audio.mel import MelSpectrogram
from waveflow.bijections import ActNorm, Chain, Squeeze
from waveflow.checkpoint import (
    CONFIG,
    RUN_POINTER,
    load_checkpoint,
    manifest_bytes,
    resolve_run,
)
from waveflow.data.cache import TrainingCache
from waveflow.data.segments import Prefetch
from waveflow.errors import CheckpointError, ConfigError, DataError
from waveflow.flow import Flow
from waveflow.models.realnvp import RealNVPConfig
from waveflow.objective import Batch, Loss, Share
from waveflow.training import loop
from waveflow.training.config import Recipe, read_recipe
from waveflow.training.loop import Progress, Trainer
from waveflow.training.optimizer import learning_rate, update_average
from waveflow.training.run_folder import (
    RUN_RECORD,
    STATE,
    TRAINING,
    load_training_tensors,
    training_tensors,
)
from waveflow.training.validation import validate

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TrainingCache:
    return write_cache(tmp_path_factory.mktemp("caches") / "tiny", ["train", "train", "val"])


# --- a run ---


@pytest.fixture(scope="module")
def finished(cache: TrainingCache, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run of six steps, two of them the pitch head's; do not train it further."""
    trainer = Trainer(recipe(), cache, tmp_path_factory.mktemp("runs") / "x", data="made up")
    trainer.run()
    return trainer


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_stopping_and_resuming_changes_nothing(
    cache: TrainingCache, finished: Trainer, tmp_path: Path, stop: int
) -> None:
    """Bit for bit, within the pitch steps, at their end, and after them."""
    trainer = Trainer(recipe(), cache, tmp_path / "run")

    def interrupt(progress: Progress) -> None:
        if progress.step == stop:
            trainer._save()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.run(report=interrupt)
    torch.manual_seed(99)  # the state of the global generator must not matter
    resumed = Trainer(recipe(), cache, tmp_path / "run", resume=True)
    assert resumed.step == stop
    assert_same(tensors_of(resumed), tensors_of(trainer))
    assert resumed.provenance == trainer.provenance
    resumed.run()
    assert_same(tensors_of(resumed), tensors_of(finished))
    assert resumed.best == finished.best


def test_a_run_leaves_its_last_and_its_best(finished: Trainer, cache: TrainingCache) -> None:
    out = finished.folder.path
    pointer = json.loads((out / RUN_POINTER).read_text())
    assert pointer["last"] == "step-00000006"
    folders = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert folders == sorted(set(pointer.values()))
    assert not list(out.glob(".*"))
    last = resolve_run(out, "last")
    assert {path.name for path in last.iterdir()} >= {TRAINING, STATE, CONFIG}
    config, flow = load_checkpoint(last)
    assert_same(dict(flow.state_dict()), finished.average)
    provenance = config.provenance
    assert (provenance.data, provenance.licence, provenance.steps) == ("made up", "", 6)
    assert provenance.log_likelihood is not None
    low, high = provenance.mel_range
    assert len(low) == len(high) == MEL.n_mels
    assert all(a < b for a, b in zip(low, high, strict=True))
    best, _ = load_checkpoint(out)
    assert best.provenance.log_likelihood == finished.best
    assert finished.best >= provenance.log_likelihood
    assert Recipe.model_validate_json((out / "recipe.json").read_text()) == recipe()


def test_best_stays_when_later_steps_are_worse(
    cache: TrainingCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([-3.0, -1.0, -1.5, -2.0])

    def scored(*args: object) -> object:
        result = validate(*args)
        return result._replace(log_likelihood=next(scores))

    monkeypatch.setattr(loop, "validate", scored)
    changed = recipe(steps=4, validate_every=1, checkpoint_every=1, pitch_steps=0)
    trainer = Trainer(changed, cache, tmp_path / "run")
    trainer.run()
    pointer = json.loads((tmp_path / "run" / RUN_POINTER).read_text())
    assert pointer == {
        "last": "step-00000004",
        "previous": "step-00000003",
        "best": "step-00000002",
    }
    assert sorted(p.name for p in (tmp_path / "run").glob("step-*")) == sorted(pointer.values())
    assert trainer.best == -1.0
    assert load_checkpoint(tmp_path / "run")[0].provenance.log_likelihood == -1.0


def test_pitch_steps_train_the_head_and_nothing_else(
    cache: TrainingCache, finished: Trainer, tmp_path: Path
) -> None:
    trainer = Trainer(recipe(), cache, tmp_path / "run")
    start = {k: v.clone() for k, v in trainer.flow.state_dict().items()}
    seen: list[tuple[dict[str, float], set[str]]] = []

    def changed(progress: Progress) -> None:
        now = trainer.flow.state_dict()
        seen.append((progress.values, {k for k in now if not torch.equal(now[k], start[k])}))
        start.update({k: v.clone() for k, v in now.items()})

    trainer.run(report=changed)
    for values, names in seen[:2]:
        assert "pitch_loss" in values
        assert names
        assert all(name.startswith("conditioner.pitch.") for name in names)
    for values, names in seen[2:]:
        assert values.keys() == {"log_likelihood", "energy", "calibration", "gradient_norm"}
        assert names
        assert not any(name.startswith("conditioner.pitch.") for name in names)
    assert_same(tensors_of(trainer), tensors_of(finished))  # a run repeats, too


def test_a_flow_with_batch_norm_is_not_averaged(cache: TrainingCache, tmp_path: Path) -> None:
    """Averaged weights would not fit its running moments."""
    settings = recipe(pitch_steps=0, energy_weight=0.0, calibration_weight=0.0)
    model = RealNVPConfig(squeeze_factor=4, n_scales=1, n_flows=1, hidden_channels=4)
    trainer = Trainer(settings.model_copy(update={"model": model}), cache, tmp_path / "run")
    for _ in range(3):
        trainer._train_step()
    assert_same(trainer.average, trainer.flow.state_dict())


def test_averages_follow_the_weights_slowly_once_they_are_old(
    cache: TrainingCache, tmp_path: Path
) -> None:
    trainer = Trainer(recipe(pitch_steps=0, ema_decay=0.25), cache, tmp_path / "run")
    name = "conditioner.level_bias"
    for step, decay in ((0, 0.1), (1, 2 / 11), (5, 0.25)):  # (1 + step) / (10 + step) at most
        trainer.step = step
        before = trainer.average[name].clone()
        trainer._train_step()
        expected = decay * before + (1 - decay) * trainer.flow.state_dict()[name]
        torch.testing.assert_close(trainer.average[name], expected, rtol=1e-5, atol=1e-7)
        assert not torch.equal(trainer.average[name], before)


def test_without_pitch_steps_and_second_objectives(cache: TrainingCache, tmp_path: Path) -> None:
    plain = recipe(steps=2, pitch_steps=0, energy_weight=0.0, calibration_weight=0.0)
    seen: list[Progress] = []
    Trainer(plain, cache, tmp_path / "run").run(report=seen.append)
    assert [p.step for p in seen] == [1, 2]
    assert all(p.values.keys() == {"log_likelihood", "gradient_norm"} for p in seen)
    assert all(p.audio_seconds_per_second > 0 for p in seen)
    assert seen[-1].minutes_left == 0


def test_validation_likelihood_rises(cache: TrainingCache, tmp_path: Path) -> None:
    likelihood = recipe(
        steps=40,
        pitch_steps=0,
        energy_weight=0.0,
        calibration_weight=0.0,
        learning_rate=3e-3,
        validate_every=10,
        checkpoint_every=100,
        ema_decay=0.8,
    )
    trainer = Trainer(likelihood, cache, tmp_path / "run")
    start = validate(trainer.flow.eval(), cache, trainer.spectrogram, trainer.device)
    trainer.run()
    assert trainer.best > start.log_likelihood + 0.05
    # What is validated is what `Flow.forward` gives for the whole clip.
    _, flow = load_checkpoint(tmp_path / "run")
    again = validate(flow, cache, trainer.spectrogram, trainer.device)
    assert again.log_likelihood == pytest.approx(trainer.best, abs=1e-4)
    [(clip, samples, _)] = cache.val_clips()
    whole = samples[None, : clip.frames * HOP]
    with torch.no_grad():
        plain = flow(whole, trainer.spectrogram(whole)).item()
    assert again.log_likelihood == pytest.approx(plain, abs=0.01)  # but for the dequantisation
    assert again.example.shape == (clip.frames * HOP,)


def test_gradients_are_clipped_and_reported_as_they_were(
    cache: TrainingCache, tmp_path: Path
) -> None:
    trainer = Trainer(recipe(clip_norm=1e-3), cache, tmp_path / "run")
    reported = trainer._train_step()["gradient_norm"]
    gradients = [p.grad.flatten() for p in trainer.flow.parameters() if p.grad is not None]
    assert torch.cat(gradients).norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert reported > 0.1


def test_each_step_starts_from_no_gradient(cache: TrainingCache, tmp_path: Path) -> None:
    trainer = Trainer(recipe(clip_norm=1e9, **PLAIN), cache, tmp_path / "run")
    first = trainer._gradients(trainer.phases[-1])
    gradient = trainer.flow.conditioner.level_bias.grad.clone()
    assert trainer._gradients(trainer.phases[-1]) == first
    assert torch.equal(trainer.flow.conditioner.level_bias.grad, gradient)


@pytest.mark.parametrize(("steps", "is_validated"), [(2, False), (3, True)])
def test_a_run_may_end_with_its_first_phase(
    cache: TrainingCache, tmp_path: Path, steps: int, is_validated: bool
) -> None:
    """It is saved, and validated from the first phase's end on."""
    settings = recipe(steps=steps, pitch_steps=3, validate_every=1, checkpoint_every=100)
    trainer = Trainer(settings, cache, tmp_path / "run")
    trainer.run()
    assert resolve_run(tmp_path / "run", "last").name == f"step-{steps:08d}"
    assert (trainer.best is not None) == is_validated


def test_the_report_of_a_step(
    cache: TrainingCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock on which every step takes two minutes."""
    trainer = Trainer(recipe(steps=5, **PLAIN), cache, tmp_path / "run")
    monkeypatch.setattr(loop.time, "monotonic", lambda: 100.0 + 120.0 * trainer.step)
    seen: list[Progress] = []
    trainer.run(max_minutes=7, report=seen.append)
    assert [progress.step for progress in seen] == [1, 2, 3, 4]
    assert [progress.minutes_left for progress in seen] == pytest.approx([5, 3, 1, -1])
    seconds = 2 * 32 * HOP / MEL.sample_rate
    for progress in seen:
        assert progress.audio_seconds_per_second == pytest.approx(seconds / 120)


def test_steps_of_a_new_phase_take_their_own_time(
    cache: TrainingCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock on which four steps take 10 s each and the others two minutes."""
    settings = recipe(steps=7, pitch_steps=2, likelihood_steps=2)
    trainer = Trainer(settings, cache, tmp_path / "run")

    def clock() -> float:
        return 100.0 + 10 * min(trainer.step, 4) + 120 * max(trainer.step - 4, 0)

    monkeypatch.setattr(loop.time, "monotonic", clock)
    seen: list[Progress] = []
    trainer.run(report=seen.append)
    found = [60 * progress.minutes_left for progress in seen]
    assert found == pytest.approx([10, 0, 10, 0, 240, 120, 0])
    names = [progress.phase for progress in seen]
    assert names == ["pitch head", "pitch head", "likelihood", "likelihood", "", "", ""]


def test_the_recipe_reaches_the_batch(cache: TrainingCache, tmp_path: Path) -> None:
    loud, quiet = (
        Trainer(recipe(gain_range=(gain, gain)), cache, tmp_path / f"{gain}")
        for gain in (0.5, 0.25)
    )
    loud.step = quiet.step = 3
    batch = loud._batch()
    torch.testing.assert_close(quiet._batch().audio, 0.5 * batch.audio)
    assert (batch.step, batch.share) == (3, Share(0, 2, 2))
    assert batch.audio.shape == (2, 32 * HOP)
    # The audio is that of the mel, of which the frames at the ends also see its surroundings.
    own = loud.spectrogram(batch.audio)
    torch.testing.assert_close(own[..., 4:-4], batch.mel[..., 4:-4])
    assert not torch.allclose(own[..., 0], batch.mel[..., 0])


def test_the_mel_range_is_that_of_the_training_clips(cache: TrainingCache) -> None:
    mels = [
        MelSpectrogram(MEL)(torch.from_numpy(cache.audio(clip) / 32768).float())
        for clip in cache.clips("train")
    ]
    whole = torch.cat(mels, 1)
    low, high = map(torch.tensor, cache.mel_range(MEL))
    torch.testing.assert_close(low, whole.amin(1))
    torch.testing.assert_close(high, whole.amax(1))


def test_random_numbers_differ_by_seed_and_step(cache: TrainingCache, tmp_path: Path) -> None:
    drawn = set()
    for seed in (0, 1):
        trainer = Trainer(recipe(seed=seed), cache, tmp_path / f"{seed}")
        drawn.add(trainer.flow.conditioner.enter.bias[0].item())  # initial weights
        for trainer.step in (0, 1, 2):
            trainer._seed_noise()
            drawn |= {torch.rand(()).item(), trainer._batch().audio[0, 0].item()}
    assert len(drawn) == 2 * (1 + 3 + 3)


def test_the_recipe_reaches_the_optimizer(cache: TrainingCache, tmp_path: Path) -> None:
    trainer = Trainer(recipe(weight_decay=0.25, rates={"bijection": 0.5}), cache, tmp_path / "run")
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.25}
    assert {group["betas"] for group in trainer.optimizer.param_groups} == {(0.9, 0.99)}
    for trainer.step in (0, 2):  # the first of the pitch head's and the first of the flow's own
        trainer._train_step()
        rates = {group["factor"]: group["lr"] for group in trainer.optimizer.param_groups}
        assert rates == {0.5: pytest.approx(0.25e-3), 1.0: pytest.approx(0.5e-3)}


def test_the_pitch_heads_rate_ends_at_zero(cache: TrainingCache, tmp_path: Path) -> None:
    """It is frozen afterwards, and better for it."""
    settings = recipe(pitch_steps=40, steps=80, warmup_steps=1, decay_steps=10**6)
    rate = Trainer(settings, cache, tmp_path / "run")._rate
    peak = settings.train.learning_rate
    rates = [rate(step) / peak for step in (0, 20, 30, 39, 40, 79)]
    assert rates == pytest.approx([1, 1, 0.5, 0.05, 1, 1], rel=1e-3)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped(
    cache: TrainingCache,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    trainer = Trainer(recipe(pitch_steps=0), cache, tmp_path / "run")
    trainer._train_step()
    trainer.step = 1
    before = copied(tensors_of(trainer))

    class Poison(torch.autograd.Function):
        """Lets the value pass and spoils its gradient."""

        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient * torch.inf

    (phase,) = trainer.phases

    def spoilt(batch: Batch) -> Loss:
        value, terms = phase.loss(batch)
        if what == "gradient":
            return Loss(Poison.apply(value), terms)
        return Loss(value * torch.nan, {name: term * torch.nan for name, term in terms.items()})

    trainer.phases = [phase._replace(loss=spoilt)]
    with caplog.at_level(logging.WARNING):
        values = trainer._train_step()
    assert "step 1 skipped: loss or gradient is not finite" in caplog.text
    assert not all(math.isfinite(value) for value in values.values())
    assert trainer.skipped == 1
    assert_same(tensors_of(trainer), before)

    trainer.phases = [phase]
    trainer._train_step()
    assert trainer.skipped == 1
    assert all(torch.isfinite(tensor).all() for tensor in tensors_of(trainer).values())
    trainer._save()
    resumed = Trainer(recipe(pitch_steps=0), cache, tmp_path / "run", resume=True)
    assert resumed.skipped == 1


@pytest.mark.parametrize("amplitude", [0, 1], ids=["zeros", "last bit"])
@pytest.mark.parametrize("name", MODELS)
def test_training_on_silence(tmp_path: Path, name: str, amplitude: int) -> None:
    settings = recipe(pitch_steps=2 if name == "frameglow" else 0, warmup_steps=1, validate_every=6)
    silent = write_cache(tmp_path / "cache", ["train", "val"], amplitude)
    model = settings.model_copy(update={"model": MODELS[name]})
    trainer = Trainer(model, silent, tmp_path / "run")
    seen: list[float] = []
    trainer.run(report=lambda progress: seen.extend(progress.values.values()))
    assert trainer.step == 6 and trainer.skipped == 0
    assert all(math.isfinite(value) for value in seen)
    assert trainer.best is not None and math.isfinite(trainer.best)
    assert all(t.isfinite().all() for t in trainer.flow.state_dict().values())


def test_the_clock_stops_a_run_and_saves_it(cache: TrainingCache, tmp_path: Path) -> None:
    long = recipe(steps=10_000, pitch_steps=0, validate_every=5000, checkpoint_every=5000)
    trainer = Trainer(long, cache, tmp_path / "run")
    trainer.run(max_minutes=0.005)
    assert 0 < trainer.step < 5000
    assert trainer.minutes >= 0.005
    config, _ = load_checkpoint(tmp_path / "run")
    assert config.provenance.steps == trainer.step
    resumed = Trainer(long, cache, tmp_path / "run", resume=True)
    assert resumed.minutes == trainer.minutes
    resumed.run(max_minutes=0)
    assert resumed.step == trainer.step + 1
    assert resumed.minutes > trainer.minutes


def test_a_run_that_is_done_does_nothing_more(
    cache: TrainingCache, finished: Trainer, tmp_path: Path
) -> None:
    shutil.copytree(finished.folder.path, tmp_path / "run")
    resumed = Trainer(recipe(), cache, tmp_path / "run", resume=True)
    resumed.run(report=lambda progress: pytest.fail("a step too many"))
    assert_same(tensors_of(resumed), tensors_of(finished))


def test_init_starts_from_weights_and_skips_the_pitch_steps(
    cache: TrainingCache, finished: Trainer, tmp_path: Path
) -> None:
    _, flow = load_checkpoint(finished.folder.path)
    weights = copied(flow.state_dict())
    trainer = Trainer(recipe(), cache, tmp_path / "run", init=(finished.folder.path, weights))
    assert_same(dict(trainer.flow.state_dict()), weights)
    assert_same(trainer.average, weights)
    seen: list[Progress] = []
    trainer.run(max_minutes=0, report=seen.append)
    assert "log_likelihood" in seen[0].values
    # Nor are they made up for after a resume.
    resumed = Trainer(recipe(), cache, tmp_path / "run", resume=True)
    assert resumed.first_steps == 0

    del weights["conditioner.enter.bias"]
    with pytest.raises(CheckpointError, match="lacks tensor"):
        Trainer(recipe(), cache, tmp_path / "other", init=(finished.folder.path, weights))


# --- what a run refuses ---


def test_tuning_validates_before_its_first_step(
    cache: TrainingCache, finished: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, flow = load_checkpoint(finished.folder.path)
    weights = copied(flow.state_dict())

    def harm(self: Trainer) -> dict[str, float]:
        self.average["conditioner.level_bias"].sub_(1.0)
        return {"log_likelihood": 0.0}

    monkeypatch.setattr(Trainer, "_train_step", harm)
    settings = recipe(steps=3, validate_every=1)
    trainer = Trainer(settings, cache, tmp_path / "run", init=(finished.folder.path, weights))
    trainer.run()
    mel = MelSpectrogram(MEL)
    expected = validate(flow, cache, mel, torch.device("cpu"))
    assert trainer.before == pytest.approx(expected.log_likelihood, abs=1e-6)
    # What it started from is then still its best.
    assert trainer.best == trainer.before
    assert_same(dict(load_checkpoint(tmp_path / "run")[1].state_dict()), weights)


def test_rates_by_name(cache: TrainingCache, tmp_path: Path) -> None:
    rates = {"conditioner": 0.0, "conditioner.enter": 0.5, "bijection.steps.2": 0.1}
    settings = recipe(pitch_steps=0, rates=rates, warmup_steps=1)
    trainer = Trainer(settings, cache, tmp_path / "run")
    before = {k: v.clone() for k, v in trainer.flow.named_parameters()}
    trainer._train_step()
    moved = {k: (v - before[k]).abs().max().item() for k, v in trainer.flow.named_parameters()}
    # Adam's first step is the rate itself, wherever there is a gradient.
    rate = settings.train.learning_rate
    for name, distance in moved.items():
        if name.startswith("conditioner.enter."):
            factor = 0.5
        elif name.startswith("conditioner."):
            factor = 0.0
        else:
            factor = 0.1 if name.startswith("bijection.steps.2.") else 1.0
        assert trainer.flow.get_parameter(name).requires_grad == (factor > 0)
        if factor == 0:
            assert distance == 0, name
        elif distance > 0:
            assert distance == pytest.approx(factor * rate, rel=1e-2), name
    assert sum(distance > 0 for distance in moved.values()) > 10


def test_the_noise_head_alone(cache: TrainingCache, tmp_path: Path) -> None:
    """Its loss is there in every eighth step; the others train nothing."""
    rates = {"conditioner": 0.0, "bijection": 0.0, "conditioner.noise": 1.0}
    settings = recipe(steps=9, rates=rates, warmup_steps=1, **PLAIN)
    settings = settings.model_copy(update={"model": WITH_NOISE_SHARE})
    trainer = Trainer(settings, cache, tmp_path / "run")
    before = {k: v.clone() for k, v in trainer.flow.named_parameters()}
    norms: list[float] = []
    trainer.run(report=lambda progress: norms.append(progress.values["gradient_norm"]))
    assert [norm > 0 for norm in norms] == [False] * 7 + [True, False]
    moved = {k for k, v in trainer.flow.named_parameters() if not torch.equal(v, before[k])}
    assert moved == {f"conditioner.noise.coefficients.{name}" for name in ("weight", "bias")}


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"condition": 0.1}, "no parameter begins with 'condition'"),
        ({"conditioner": 0, "bijection": 0}, "nothing to train"),
    ],
)
def test_wrong_rates(cache: TrainingCache, tmp_path: Path, rates: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer(recipe(rates=rates), cache, tmp_path / "run")


def test_a_folder_that_holds_a_run_is_not_overwritten(
    cache: TrainingCache, finished: Trainer
) -> None:
    before = (finished.folder.path / "recipe.json").read_bytes()
    with pytest.raises(ConfigError, match="holds a run: use --resume"):
        Trainer(recipe(seed=1), cache, finished.folder.path)
    assert (finished.folder.path / "recipe.json").read_bytes() == before


def test_only_the_runs_own_recipe_resumes_it(cache: TrainingCache, finished: Trainer) -> None:
    with pytest.raises(ConfigError, match="is not this recipe"):
        Trainer(recipe(clip_norm=0.5), cache, finished.folder.path, resume=True)


def test_only_the_runs_own_data_resume_it(finished: Trainer, tmp_path: Path) -> None:
    other = write_cache(tmp_path / "other", ["train", "val"])
    with pytest.raises(ConfigError, match="other is not the data of the run in"):
        Trainer(recipe(), other, finished.folder.path, resume=True)


def test_buffers_are_saved_and_loaded_with_the_weights() -> None:
    """ActNorm would start from data once more."""
    flow = Flow(Chain(Squeeze(4), ActNorm(4)), None, 4)
    optimizer = torch.optim.AdamW(flow.parameters())
    average = copied(flow.state_dict())
    flow(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    update_average(average, flow, decay=0.9, step=0)
    assert average["bijection.steps.1.initialized"]
    tensors = copied(training_tensors(flow, optimizer))
    other = Flow(Chain(Squeeze(4), ActNorm(4)), None, 4)
    assert not other.bijection[1].initialized
    others = torch.optim.AdamW(other.parameters())
    load_training_tensors(other, others, tensors, Path("there"))
    assert other.bijection[1].initialized
    assert_same(training_tensors(other, others), tensors)


DAMAGE = {
    "recipe_not_json": ("recipe.json", b"{", ConfigError, "is not this recipe"),
    "recipe_unknown_field": ("recipe.json", b'{"new": 1}', ConfigError, "is not this recipe"),
    "state_not_json": (STATE, b"{", CheckpointError, STATE),
    "state_without_step": (STATE, b'{"minutes": 1}', CheckpointError, "step: Field required"),
    "config": (CONFIG, b'{"model": {}}', CheckpointError, "model.type: name the model"),
    "training": (TRAINING, b"nothing", CheckpointError, "is not a safetensors file"),
}


def only_last(run: Path) -> Path:
    """The last checkpoint of a run, after its others are gone."""
    last = resolve_run(run, "last")
    for folder in run.glob("step-*"):
        if folder != last:
            shutil.rmtree(folder)
    return last


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_runs_are_one_error(
    cache: TrainingCache, finished: Trainer, tmp_path: Path, name: str
) -> None:
    """Also where hash and content agree."""
    file, data, error, message = DAMAGE[name]
    run = tmp_path / "run"
    shutil.copytree(finished.folder.path, run)
    last = only_last(run)
    if file == "recipe.json":
        (run / file).write_bytes(data)
    else:
        (last / file).write_bytes(data)
        with pytest.raises(CheckpointError, match="is damaged"):
            Trainer(recipe(), cache, run, resume=True)
        hashes = json.loads((last / "manifest.json").read_text())["sha256"]
        hashes[file] = hashlib.sha256(data).hexdigest()
        (last / "manifest.json").write_bytes(manifest_bytes(hashes))
    with pytest.raises(error, match=message) as caught:
        Trainer(recipe(), cache, run, resume=True)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_moments_cannot_be_resumed(
    cache: TrainingCache, finished: Trainer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.folder.path, run)
    last = only_last(run)
    hashes = json.loads((last / "manifest.json").read_text())["sha256"]
    del hashes[TRAINING]
    (last / "manifest.json").write_bytes(manifest_bytes(hashes))
    with pytest.raises(CheckpointError, match="cannot resume"):
        Trainer(recipe(), cache, run, resume=True)


def test_recipes_that_do_not_fit(cache: TrainingCache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"segment_frames 16 are 1024 samples; .* needs 2048"):
        Trainer(recipe(segment_frames=16), cache, tmp_path / "a")
    Trainer(recipe(segment_frames=16, energy_weight=0.0), cache, tmp_path / "b")
    other = recipe(energy_weight=0.0).model_copy(
        update={"mel": MEL.model_copy(update={"hop_length": 32})}
    )
    with pytest.raises((ConfigError, DataError), match="hop"):
        Trainer(other, cache, tmp_path / "c")
    with pytest.raises(ConfigError, match="gain_range"):
        Trainer(recipe(gain_range=(2.0, 1.0)), cache, tmp_path / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_model_without_first_phases(cache: TrainingCache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pitch_steps 2: waveglow has no phase"):
        Trainer(recipe().model_copy(update={"model": WAVEGLOW}), cache, tmp_path / "a")
    plain = recipe(steps=2, pitch_steps=0).model_copy(update={"model": WAVEGLOW})
    trainer = Trainer(plain, cache, tmp_path / "b")
    trainer.run()
    assert trainer.skipped == 0
    assert math.isfinite(trainer.best)


def test_a_cache_without_validation_is_refused(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", ["train", "train"])
    with pytest.raises(DataError, match="no validation clips"):
        Trainer(recipe(), cache, tmp_path / "run")


def test_a_folder_that_cannot_be_made(cache: TrainingCache, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write the run"):
        Trainer(recipe(), cache, tmp_path / "file" / "run")


# --- a run that is made again ---


def test_a_run_folder_reproduces_the_run(cache: TrainingCache, tmp_path: Path) -> None:
    first = Trainer(recipe(), cache, tmp_path / "first", data="made up")
    first.run()
    record = json.loads((tmp_path / "first" / RUN_RECORD).read_text())
    assert record["command"] == sys.argv
    assert record["packages"]["torch"] == importlib.metadata.version("torch")
    assert record["data"]["description"] == "made up"
    assert record["data"]["manifest"] == cache.manifest.model_dump(mode="json")
    assert len(record["data"]["manifest"]["sha256"]["audio.npy"]) == 64
    assert record["platform"]["device"] == "cpu"
    assert record["init"] is None
    assert Recipe.model_validate(record["recipe"]) == recipe()

    again = read_recipe(tmp_path / "first" / "recipe.json")
    data = TrainingCache(Path(record["data"]["folder"]))
    second = Trainer(again, data, tmp_path / "second")
    second.run()
    one, other = tensors_of(first), tensors_of(second)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_record_names_the_initial_weights_and_is_written_once(
    cache: TrainingCache, tmp_path: Path
) -> None:
    Trainer(recipe(steps=2, **PLAIN), cache, tmp_path / "first").run()
    best = sorted((tmp_path / "first").glob("step-*"))[-1]
    weights = load_checkpoint(best)[1].state_dict()
    started = Trainer(recipe(steps=2, **PLAIN), cache, tmp_path / "second", init=(best, weights))
    started.run()
    text = (tmp_path / "second" / RUN_RECORD).read_text()
    assert json.loads(text)["init"]["folder"] == str(best.resolve())
    assert len(json.loads(text)["init"]["manifest_sha256"]) == 64
    Trainer(recipe(steps=4, **PLAIN), cache, tmp_path / "second", resume=True).run()
    assert (tmp_path / "second" / RUN_RECORD).read_text() == text


# --- knowing when to stop ---


def score_validations(monkeypatch: pytest.MonkeyPatch, *scores: float) -> None:
    """Lets each validation find the next of these log-likelihoods."""
    left = iter(scores)

    def scored(*args: object) -> object:
        return validate(*args)._replace(log_likelihood=next(left))

    monkeypatch.setattr(loop, "validate", scored)


def test_a_run_without_progress_stops_and_says_why(
    cache: TrainingCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    score_validations(monkeypatch, -3.0, -2.0, -2.5, -1.0, -1.5, -1.2, -1.1, 0.0)
    patient = recipe(steps=100, validate_every=2, checkpoint_every=50, patience=3, **PLAIN)
    trainer = Trainer(patient, cache, tmp_path / "run")
    with caplog.at_level(logging.INFO, "waveflow"):
        trainer.run()
    assert trainer.step == 14
    assert trainer.best == -1.0
    [line] = [record.message for record in caplog.records if "stopped" in record.message]
    assert line == (
        "stopped at step 14: since step-00000008 no validation lower bound was above -1.0000"
    )
    # It is saved, and has nothing more to do.
    resumed = Trainer(patient, cache, tmp_path / "run", resume=True)
    assert resumed.step == 14
    resumed.run(report=lambda progress: pytest.fail("a step too many"))
    # More patience goes on with it.
    more = recipe(steps=16, validate_every=2, checkpoint_every=50, patience=5, **PLAIN)
    resumed = Trainer(more, cache, tmp_path / "run", resume=True)
    resumed.run()
    assert resumed.step == 16
    assert resumed.best == 0.0


def test_the_best_checkpoint_has_learnt_from_draws(
    cache: TrainingCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Likelihood falls while draws are learnt.
    score_validations(monkeypatch, -3.0, -1.0, -2.0, -4.0, -3.5)
    settings = recipe(steps=10, pitch_steps=1, likelihood_steps=5, validate_every=2, patience=1)
    energies: list[bool] = []

    def bests(trainer: Trainer, until: int) -> tuple[float | None, str | None]:
        trainer.run(
            report=lambda progress: energies.append("energy" in progress.values),
            stop=lambda: trainer.step == until,
        )
        return trainer.best, trainer.best_name

    trainer = Trainer(settings, cache, tmp_path / "run")
    assert bests(trainer, until=7) == (None, None)
    assert energies == 6 * [False] + [True]
    resumed = Trainer(settings, cache, tmp_path / "run", resume=True)
    assert bests(resumed, until=99) == (-3.5, "step-00000010")
    assert energies == 6 * [False] + 4 * [True]


def test_likelihood_alone_goes_on_without_patience(
    cache: TrainingCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_validations(monkeypatch, -1.0, -2.0, -3.0)
    settings = recipe(steps=8, pitch_steps=0, likelihood_steps=7, validate_every=2, patience=1)
    trainer = Trainer(settings, cache, tmp_path / "run")
    trainer.run(stop=lambda: trainer.step == 7)
    assert (trainer.step, trainer.best_name) == (7, "step-00000002")


@pytest.mark.parametrize("first_steps", [0, 3])
def test_a_first_phase_of_the_whole_flow_can_speak(
    cache: TrainingCache, tmp_path: Path, first_steps: int
) -> None:
    settings = recipe(steps=9, pitch_steps=2, likelihood_steps=first_steps)
    trainer = Trainer(settings, cache, tmp_path / "run")
    # The rate goes on over the phases of the whole flow: it does not warm up twice.
    assert trainer._rate(5) == pytest.approx(learning_rate(settings.train, 3, 4.0, 0.0))
    trainer.run(stop=lambda: trainer.step == 4)
    config, _ = load_checkpoint(tmp_path / "run")
    assert config.provenance.phase == ""


def test_weights_to_start_from_have_had_the_first_phases(
    cache: TrainingCache, tmp_path: Path
) -> None:
    settings = recipe(steps=2, pitch_steps=2, likelihood_steps=2)
    flow = Trainer(settings, cache, tmp_path / "start").flow
    init = tmp_path / "start", {name: t.clone() for name, t in flow.state_dict().items()}
    seen: list[Progress] = []
    Trainer(settings, cache, tmp_path / "run", init=init).run(report=seen.append)
    assert all("energy" in progress.values and not progress.phase for progress in seen)


# --- steps in parts ---


@pytest.mark.parametrize("step", [0, 5], ids=["pitch", "flow"])
def test_a_step_in_parts_is_the_step(cache: TrainingCache, tmp_path: Path, step: int) -> None:
    results = []
    for parts in (1, 3):
        settings = recipe(batch_size=4, accumulate=parts, pitch_steps=1)
        trainer = Trainer(settings, cache, tmp_path / f"{parts}")
        trainer.flow.load_state_dict(perturbed().state_dict())
        trainer.step = step
        values = trainer._train_step()
        moments = [state["exp_avg"].flatten() for state in trainer.optimizer.state.values()]
        results.append((torch.cat(moments), values))
    (whole, terms), (summed, part_terms) = results
    # Sums in another order: float32's rounding of values that partly cancel.
    assert (whole - summed).norm() < 1e-4 * whole.norm()
    assert part_terms == pytest.approx(terms, rel=1e-4)


def test_layers_that_start_from_data_see_the_whole_batch(
    cache: TrainingCache, tmp_path: Path
) -> None:
    norms = []
    for parts in (1, 4):
        settings = recipe(batch_size=4, accumulate=parts, **PLAIN)
        trainer = Trainer(settings, cache, tmp_path / f"{parts}")
        norm = ActNorm(HOP)
        trainer.flow.bijection.steps.append(norm)
        trainer._gradients(trainer.phases[-1])
        norms.append(norm)
    assert norms[1].initialized
    torch.testing.assert_close(norms[1].shift, norms[0].shift, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norms[1].log_scale, norms[0].log_scale, rtol=1e-4, atol=1e-5)


def test_a_batch_cannot_be_cut_into_more_parts_than_items() -> None:
    with pytest.raises(ValueError, match="accumulate 3 parts of batch_size 2"):
        recipe(batch_size=2, accumulate=3)


def test_the_optimizer_is_fused(cache: TrainingCache, tmp_path: Path) -> None:
    """That a resumed run is bit-equal with it is test_training's business."""
    trainer = Trainer(recipe(**PLAIN), cache, tmp_path / "run")
    assert trainer.optimizer.defaults["fused"]


# --- prefetch ---


def test_batches_are_drawn_while_the_step_runs() -> None:
    drawn: dict[int, threading.Event] = {step: threading.Event() for step in range(20)}

    def draw(step: int) -> int:
        drawn[step].set()
        return step * step

    batches = Prefetch(draw, ahead=2)
    assert batches.get(3) == 9
    assert drawn[4].wait(5) and drawn[5].wait(5)
    assert not drawn[6].is_set()
    assert [batches.get(step) for step in (4, 5, 6, 6, 0, 12)] == [16, 25, 36, 36, 0, 144]


def test_what_is_waited_for_is_counted() -> None:
    free = threading.Event()
    batches = Prefetch(lambda step: free.wait(0.2), ahead=1)
    batches.get(0)
    assert 0.5 < batches.waiting_share() <= 1
    free.set()
    batches.get(1)
    free.wait(0.1)
    assert batches.waiting_share() < 1


def test_errors_of_the_thread_reach_the_step() -> None:
    def draw(step: int) -> int:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        Prefetch(draw).get(0)
