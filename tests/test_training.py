"""Objectives, recipes, and the Trainer on a made-up voice and a tiny model."""

import csv
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_voice
from torch import Tensor

from waveflow.audio.mel import MEL_PRESETS, MelConfig, MelSpectrogram
from waveflow.bijections.base import record_log_dets
from waveflow.checkpoint import (
    CONFIG,
    RUN_POINTER,
    load_checkpoint,
    manifest_bytes,
    resolve_run,
)
from waveflow.data.cache import (
    AUDIO_FILE,
    F0_FILE,
    MANIFEST_FILE,
    CachedClip,
    F0Settings,
    Manifest,
    TrainingCache,
    file_sha256,
)
from waveflow.errors import CheckpointError, ConfigError, DataError
from waveflow.flow import Flow
from waveflow.models.frameglow import FrameGlowConfig
from waveflow.models.registry import build_flow
from waveflow.training import trainer as trainer_module
from waveflow.training.config import Recipe, TrainConfig, read_recipe
from waveflow.training.losses import SpectralDistance, _Magnitudes, objectives
from waveflow.training.trainer import STATE, TRAINING, Progress, Trainer, learning_rate
from waveflow.training.validation import validate

ROOT = Path(__file__).parent.parent
RATE, HOP = 8000, 64
MEL = MelConfig(
    sample_rate=RATE, n_fft=256, hop_length=HOP, win_length=256, n_mels=20, f_max=4000.0
)
MODEL = FrameGlowConfig(
    n_levels=1,
    n_flows=2,
    hidden_channels=8,
    dilations=(1,),
    encoder_channels=8,
    encoder_layers=1,
)


def recipe(**train: object) -> Recipe:
    """Two pitch steps, then all three objectives, on segments as short as they may be."""
    settings: dict[str, object] = {
        "steps": 6,
        "batch_size": 2,
        "segment_frames": 32,
        "energy_weight": 1.0,
        "calibration_weight": 1.0,
        "pitch_steps": 2,
        "warmup_steps": 2,
        "validate_every": 3,
        "checkpoint_every": 2,
    }
    return Recipe(model=MODEL, mel=MEL, train=TrainConfig(**(settings | train)))


def write_cache(folder: Path, splits: list[str]) -> TrainingCache:
    """A cache as `prepare` writes it, of voices whose F0 is known and not tracked."""
    folder.mkdir(parents=True)
    voices = [make_voice(0.6, i, RATE) for i in range(len(splits))]
    frames = [len(voice) // HOP for voice in voices]
    time_ = (np.arange(max(frames)) + 0.5) * HOP / RATE
    f0 = [(120 + 30 * i + 20 * np.sin(4 * np.pi * time_))[:n] for i, n in enumerate(frames)]
    samples = [np.round(voice * 32768).clip(-32768, 32767).astype(np.int16) for voice in voices]
    np.save(folder / AUDIO_FILE, np.concatenate(samples))
    np.save(folder / F0_FILE, np.concatenate(f0).astype(np.float32))
    clips = [
        CachedClip(
            id=f"clip{i}",
            corpus="made-up",
            split=split,
            sample_offset=sum(map(len, samples[:i])),
            samples=len(samples[i]),
            frame_offset=sum(frames[:i]),
            frames=frames[i],
        )
        for i, split in enumerate(splits)
    ]
    manifest = Manifest(
        sample_rate=RATE,
        hop_length=HOP,
        f0=F0Settings(),
        sha256={name: file_sha256(folder / name) for name in (AUDIO_FILE, F0_FILE)},
        clips=tuple(clips),
    )
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json())
    return TrainingCache(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TrainingCache:
    return write_cache(tmp_path_factory.mktemp("caches") / "tiny", ["train", "train", "val"])


def perturbed() -> Flow:
    torch.manual_seed(0)
    flow = build_flow(MODEL, MEL)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return flow.eval()


def speech(n_frames: int, n_items: int = 2) -> tuple[Tensor, Tensor]:
    """Audio (B, T) and its mel (B, M, F)."""
    voices = [torch.from_numpy(make_voice(1.0, i, RATE)) for i in range(n_items)]
    audio = torch.stack([voice[: n_frames * HOP] for voice in voices])
    return audio, MelSpectrogram(MEL)(audio)


# --- magnitudes and the energy distance ---


@pytest.mark.parametrize("window", [8, 128, 2048])
def test_magnitudes_are_those_of_torch(window: int) -> None:
    audio = torch.randn(2, 2200, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.randn(1, 1, window // 2 + 1, generator=torch.Generator().manual_seed(1))
    ours = _Magnitudes.apply(audio, window)
    (gradient,) = torch.autograd.grad((ours * weight).sum(), audio)
    hann = torch.hann_window(window)
    spectrum = torch.stft(
        audio, window, window // 4, window=hann, center=False, return_complex=True
    )
    theirs = spectrum.abs().transpose(1, 2) * math.sqrt(2 / window)
    (expected,) = torch.autograd.grad((theirs * weight).sum(), audio)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("length", [16, 41])
def test_magnitudes_gradient(length: int) -> None:
    """Also where the last samples fill no frame."""
    audio = torch.randn(2, length, generator=torch.Generator().manual_seed(0)).double()
    audio.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: _Magnitudes.apply(x, 16), audio, fast_mode=False)


def test_magnitudes_of_silence_have_a_finite_gradient() -> None:
    audio = torch.zeros(1, 256, requires_grad=True)
    _Magnitudes.apply(audio, 128).sum().backward()
    assert torch.isfinite(audio.grad).all()


def noise(n_items: int, seed: int) -> Tensor:
    return 0.1 * torch.randn(n_items, 2048, generator=torch.Generator().manual_seed(seed))


def test_energy_distance_is_least_for_draws_distributed_as_speech_is() -> None:
    """Against louder, quieter, differently coloured and collapsed draws.

    For draws of speech's own distribution the expectation is half the mean distance of two
    speech signals, E d(x, x') / 2, and not 0: the distance of speech to itself is not taken off.
    """
    spectral = SpectralDistance(MEL)
    x, first, second = noise(64, 1), noise(64, 2), noise(64, 3)

    def distance(first: Tensor, second: Tensor) -> float:
        return spectral.energy_distance(x, torch.cat([first, second])).item()

    def d(a: Tensor, b: Tensor) -> float:
        # With equal draws the third term is (nearly) 0, and what remains is d(a, b).
        return spectral.energy_distance(a, torch.cat([b, b])).item()

    own = distance(first, second)
    assert own == pytest.approx(d(x, first) / 2, rel=0.03)
    others = {
        "louder": distance(1.5 * first, 1.5 * second),
        "quieter": distance(first / 1.5, second / 1.5),
        "coloured": distance(first + first.roll(1, 1), second + second.roll(1, 1)),
        "collapsed": distance(first, first),
        "silent": distance(0 * first, 0 * first),
    }
    # 64 items of 20 to 60 frames: the means hold to about 1 %.
    assert {name: value for name, value in others.items() if value < 1.1 * own} == {}


def test_energy_distance_does_not_care_which_draw_is_first() -> None:
    spectral = SpectralDistance(MEL)
    x, first, second = noise(4, 1), noise(4, 2), 2 * noise(4, 3)
    one = spectral.energy_distance(x, torch.cat([first, second]))
    other = spectral.energy_distance(x, torch.cat([second, first]))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


def test_energy_distance_of_speech_to_itself_is_zero() -> None:
    audio, _ = speech(40)
    distance = SpectralDistance(MEL).energy_distance(audio, audio.repeat(2, 1))
    # The root of the mean square is rounded up at 0, by 1e-4 for each of the five windows.
    assert 0 <= distance.item() < 1e-4


# --- the three objectives ---


def test_terms_that_are_not_asked_for_are_none() -> None:
    flow, (audio, mel) = perturbed(), speech(40)
    spectral = SpectralDistance(MEL)
    terms = objectives(flow, spectral, audio, mel, energy=False, calibration=False)
    assert terms.energy is None
    assert terms.calibration is None
    torch.testing.assert_close(terms.nll, -flow(audio, mel).mean())
    assert objectives(flow, spectral, audio, mel, True, False).calibration is None
    assert objectives(flow, spectral, audio, mel, False, True).energy is None


def test_calibration_is_zero_where_the_volume_is_the_mels_alone() -> None:
    """A flow that has not been trained is its base: its volume does not depend on the signal."""
    torch.manual_seed(0)
    flow = build_flow(MODEL, MEL).eval()
    terms = objectives(flow, SpectralDistance(MEL), *speech(40), energy=False, calibration=True)
    assert terms.calibration is not None
    assert terms.calibration.item() < 1e-6


def test_calibration_is_how_much_less_volume_draws_have() -> None:
    """On one frame, where the volumes of a frame are those that the contract returns."""
    flow, (audio, mel) = perturbed(), speech(1, 3)
    torch.manual_seed(5)
    terms = objectives(flow, SpectralDistance(MEL), audio, mel, energy=False, calibration=True)
    torch.manual_seed(5)
    z = torch.randn(6, 1, HOP).transpose(1, 2)
    cond = flow.condition(mel)
    with torch.no_grad():
        volume_of_speech = -flow.bijection(audio[:, None], cond)[1] / HOP
        volume_of_draws = flow.bijection.inverse(z, cond.repeat(2))[1] / HOP
    gap = torch.relu(volume_of_speech.repeat(2) - volume_of_draws)
    assert gap.mean() > 0.01
    torch.testing.assert_close(terms.calibration, gap.mean(), rtol=1e-4, atol=1e-5)


def test_both_paths_record_the_volume_of_every_step() -> None:
    flow, (audio, mel) = perturbed().double(), speech(12)
    cond = flow.condition(mel.double())
    with record_log_dets() as there:
        z, log_det = flow.bijection(audio[:, None].double(), cond)
    with record_log_dets() as back:
        _, inverse_log_det = flow.bijection.inverse(z, cond)
    torch.testing.assert_close(torch.stack(there).sum((0, 2)), log_det, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.stack(back).sum((0, 2)), inverse_log_det, rtol=0, atol=1e-9)
    # The same path: position by position, step by step, with the opposite sign.
    for forward, inverse in zip(there, reversed(back), strict=True):
        torch.testing.assert_close(forward, -inverse, rtol=0, atol=1e-8)
    assert len(there) == 1 + MODEL.n_levels + 2 * MODEL.n_flows


def test_bf16_is_close_to_float32_and_reaches_the_same_weights() -> None:
    flow, spectral, (audio, mel) = perturbed(), SpectralDistance(MEL), speech(40)
    results = []
    for precision in ("float32", "bf16"):
        torch.manual_seed(3)
        flow.zero_grad()
        terms = objectives(flow, spectral, audio, mel, True, True, precision)
        sum(terms).backward()
        gradient = torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None])
        results.append((torch.stack(list(terms)), gradient))
    (exact, exact_gradient), (rough, rough_gradient) = results
    assert rough.dtype == torch.float32
    # bfloat16 keeps 8 bits of the networks' outputs.
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0.02)
    assert len(rough_gradient) == len(exact_gradient)
    assert torch.cosine_similarity(rough_gradient, exact_gradient, dim=0) > 0.99


# --- recipes ---


def test_the_shipped_models_recipe() -> None:
    read = read_recipe(ROOT / "recipes" / "ljspeech" / "frameglow.toml")
    assert read.mel == MEL_PRESETS["hifigan"]
    assert min(read.train.energy_weight, read.train.calibration_weight) > 0


RECIPE = 'mel = "hifigan"\n[model]\ntype = "frameglow"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RECIPE + "n_flow = 3", r"model\.frameglow\.n_flow: Extra inputs .* \(got 3\)"),
        (RECIPE + "[train]\nlr = 1", r"train\.lr: Extra inputs"),
        (RECIPE + "[train]\nsteps = 0", r"train\.steps: .* greater than 0 \(got 0\)"),
        (RECIPE + "[train]\nlearning_rate = nan", r"train\.learning_rate"),
        (RECIPE + '[train]\nprecision = "int8"', r"train\.precision"),
        (RECIPE + "[train]\ngain_range = [1]", r"train\.gain_range"),
        ('mel = "griffin"\n[model]\ntype = "frameglow"', "there are nvidia, hifigan"),
        ('mel = "hifigan"\n[model]\ntype = "os.system"', "model: .*frameglow"),
        ('mel = "hifigan"', "model: Field required"),
        ('[model]\ntype = "frameglow"', "mel: Field required"),
        ('[mel]\nsample_rate = 8000\n[model]\ntype = "frameglow"', "f_max 8000 Hz is above half"),
        ("mel = ", "is not TOML"),
    ],
)
def test_wrong_recipes_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(f"recipe {path}")
    assert "\n" not in str(caught.value)


def test_recipes_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read recipe .*none\.toml: No such file"):
        read_recipe(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot read recipe"):
        read_recipe(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_recipe(tmp_path / "binary.toml")


def test_learning_rate_rises_and_falls() -> None:
    config = TrainConfig(learning_rate=2.0, warmup_steps=10, decay_steps=100)
    rates = [learning_rate(config, step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.2)
    assert np.argmax(rates) == 9
    assert rates[4] == pytest.approx(2.0 * 5 / 10 / math.sqrt(1.04))
    assert rates[300] == pytest.approx(1.0)  # 1 / sqrt(1 + 3)
    assert (np.diff(rates[10:]) < 0).all()


# --- a run ---


def tensors_of(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, averages and moments."""
    result = {f"raw.{k}": v for k, v in trainer.flow.state_dict().items()}
    result |= {f"ema.{k}": v for k, v in trainer.ema.items()}
    for name, parameter in trainer.flow.named_parameters():
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            result[f"{key}.{name}"] = value
    return result


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []


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
    resumed.run()
    assert_same(tensors_of(resumed), tensors_of(finished))
    assert resumed.best == finished.best


def test_a_run_leaves_its_last_and_its_best(finished: Trainer, cache: TrainingCache) -> None:
    out = finished.out
    pointer = json.loads((out / RUN_POINTER).read_text())
    assert pointer["last"] == "step-00000006"
    folders = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert folders == sorted(set(pointer.values()))
    assert not list(out.glob(".*"))
    last = resolve_run(out, "last")
    assert {path.name for path in last.iterdir()} >= {TRAINING, STATE, CONFIG}
    config, flow = load_checkpoint(last)
    assert_same(dict(flow.state_dict()), finished.ema)
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
    scores = iter([-3.0, -1.0, math.nan, -2.0])

    def scored(*args: object) -> object:
        result = validate(*args)
        return result._replace(log_likelihood=next(scores))

    monkeypatch.setattr(trainer_module, "validate", scored)
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


def test_averages_follow_the_weights_slowly_once_they_are_old(
    cache: TrainingCache, tmp_path: Path
) -> None:
    trainer = Trainer(recipe(pitch_steps=0, ema_decay=0.25), cache, tmp_path / "run")
    name = "bijection.steps.1.network.level_bias"
    for step, decay in ((0, 0.1), (1, 2 / 11), (5, 0.25)):  # (1 + step) / (10 + step) at most
        trainer.step = step
        before = trainer.ema[name].clone()
        trainer._train_step()
        expected = decay * before + (1 - decay) * trainer.flow.state_dict()[name]
        torch.testing.assert_close(trainer.ema[name], expected, rtol=1e-5, atol=1e-7)
        assert not torch.equal(trainer.ema[name], before)


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
    start = validate(trainer.flow.eval(), cache, trainer.mel, trainer.device)
    trainer.run()
    assert trainer.best > start.log_likelihood + 0.05
    # What is validated is what `Flow.forward` gives for the whole clip.
    _, flow = load_checkpoint(tmp_path / "run")
    again = validate(flow, cache, trainer.mel, trainer.device)
    assert again.log_likelihood == pytest.approx(trainer.best, abs=1e-4)
    [(clip, samples, _)] = cache.val_clips()
    whole = torch.from_numpy(samples[: clip.frames * HOP])[None]
    with torch.no_grad():
        plain = flow(whole, trainer.mel(whole)).item()
    assert again.log_likelihood == pytest.approx(plain, abs=0.01)  # but for the dequantisation
    assert again.example.shape == (clip.frames * HOP,)


def test_metrics_are_logged(cache: TrainingCache, tmp_path: Path) -> None:
    plain = recipe(steps=40, validate_every=20, checkpoint_every=40, pitch_steps=30)
    Trainer(plain, cache, tmp_path / "run").run()
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows.pop(0) == ["kind", "step", "minutes", "name", "value"]
    pace = ["learning_rate", "waiting_share", "skipped"]
    figures = [
        tuple(row[i] for i in (0, 1, 3)) for row in rows if row[0] in ("train", "validation")
    ]
    assert figures == [
        ("train", "20", "pitch_loss"),
        ("train", "20", "gradient_norm"),
        *(("train", "20", name) for name in pace),
        ("train", "40", "log_likelihood"),
        ("train", "40", "energy"),
        ("train", "40", "calibration"),
        ("train", "40", "gradient_norm"),
        *(("train", "40", name) for name in pace),
        ("validation", "40", "log_likelihood"),
        ("validation", "40", "draw_log_likelihood"),
    ]
    assert all(math.isfinite(float(row[2])) and math.isfinite(float(row[4])) for row in rows)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped(
    cache: TrainingCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    trainer = Trainer(recipe(pitch_steps=0), cache, tmp_path / "run")
    trainer._train_step()
    trainer.step = 1
    before = {k: v.clone() for k, v in tensors_of(trainer).items()}

    class Poison(torch.autograd.Function):
        """Lets the value pass and spoils its gradient."""

        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient * torch.inf

    def spoilt(*args: object, **kwargs: object) -> object:
        terms = objectives(*args, **kwargs)
        return terms._replace(
            nll=terms.nll * torch.nan if what == "loss" else Poison.apply(terms.nll)
        )

    monkeypatch.setattr(trainer_module, "objectives", spoilt)
    with caplog.at_level(logging.WARNING):
        values = trainer._train_step()
    assert "step 1 skipped: loss or gradient is not finite" in caplog.text
    assert not all(math.isfinite(value) for value in values.values())
    assert trainer.skipped == 1
    assert_same(tensors_of(trainer), before)

    monkeypatch.undo()
    trainer._train_step()
    assert trainer.skipped == 1
    assert all(torch.isfinite(tensor).all() for tensor in tensors_of(trainer).values())
    trainer._save()
    resumed = Trainer(recipe(pitch_steps=0), cache, tmp_path / "run", resume=True)
    assert resumed.skipped == 1


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
    shutil.copytree(finished.out, tmp_path / "run")
    resumed = Trainer(recipe(), cache, tmp_path / "run", resume=True)
    resumed.run(report=lambda progress: pytest.fail("a step too many"))
    assert_same(tensors_of(resumed), tensors_of(finished))


def test_init_starts_from_weights_and_skips_the_pitch_steps(
    cache: TrainingCache, finished: Trainer, tmp_path: Path
) -> None:
    _, flow = load_checkpoint(finished.out)
    weights = {k: v.clone() for k, v in flow.state_dict().items()}
    trainer = Trainer(recipe(), cache, tmp_path / "run", init=(finished.out, weights))
    assert_same(dict(trainer.flow.state_dict()), weights)
    assert_same(trainer.ema, weights)
    seen: list[Progress] = []
    trainer.run(max_minutes=0, report=seen.append)
    assert "log_likelihood" in seen[0].values
    # Nor are they made up for after a resume.
    resumed = Trainer(recipe(), cache, tmp_path / "run", resume=True)
    assert resumed.pitch_steps == 0

    del weights["conditioner.enter.bias"]
    with pytest.raises(CheckpointError, match="lacks tensor"):
        Trainer(recipe(), cache, tmp_path / "other", init=(finished.out, weights))


# --- what a run refuses ---


def test_tuning_validates_before_its_first_step(
    cache: TrainingCache, finished: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, flow = load_checkpoint(finished.out)
    weights = {k: v.clone() for k, v in flow.state_dict().items()}

    def harm(self: Trainer) -> dict[str, float]:
        self.ema["bijection.steps.1.network.level_bias"].sub_(1.0)
        return {"log_likelihood": 0.0}

    monkeypatch.setattr(Trainer, "_train_step", harm)
    settings = recipe(steps=3, validate_every=1)
    trainer = Trainer(settings, cache, tmp_path / "run", init=(finished.out, weights))
    trainer.run()
    mel = MelSpectrogram(MEL)
    expected = validate(flow.prepare_for_inference(), cache, mel, torch.device("cpu"))
    assert trainer.before == pytest.approx(expected.log_likelihood, abs=1e-6)
    # What it started from is then still its best.
    assert trainer.best == trainer.before
    assert_same(dict(load_checkpoint(tmp_path / "run")[1].state_dict()), weights)


@pytest.mark.parametrize("reversible", [False, True])
def test_rates_by_name(cache: TrainingCache, tmp_path: Path, reversible: bool) -> None:
    rates = {"conditioner": 0.0, "conditioner.enter": 0.5, "bijection.steps.1": 0.1}
    settings = recipe(pitch_steps=0, rates=rates, reversible=reversible, warmup_steps=1)
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
            factor = 0.1 if name.startswith("bijection.steps.1.") else 1.0
        if factor == 0:
            assert distance == 0, name
        elif distance > 0:
            assert distance == pytest.approx(factor * rate, rel=1e-2), name
    assert sum(distance > 0 for distance in moved.values()) > 10


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
    before = (finished.out / "recipe.json").read_bytes()
    with pytest.raises(ConfigError, match="holds a run: use --resume"):
        Trainer(recipe(seed=1), cache, finished.out)
    assert (finished.out / "recipe.json").read_bytes() == before


def test_only_the_runs_own_recipe_resumes_it(cache: TrainingCache, finished: Trainer) -> None:
    with pytest.raises(ConfigError, match="is not this recipe"):
        Trainer(recipe(learning_rate=0.5), cache, finished.out, resume=True)


DAMAGE = {
    "recipe_not_json": ("recipe.json", b"{", ConfigError, "is not this recipe"),
    "recipe_unknown_field": ("recipe.json", b'{"new": 1}', ConfigError, "is not this recipe"),
    "state_not_json": (STATE, b"{", CheckpointError, STATE),
    "state_without_step": (STATE, b'{"minutes": 1}', CheckpointError, "step: Field required"),
    "config": (CONFIG, b'{"model": {}}', CheckpointError, "model: "),
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
    import hashlib

    file, data, error, message = DAMAGE[name]
    run = tmp_path / "run"
    shutil.copytree(finished.out, run)
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
    shutil.copytree(finished.out, run)
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


def test_models_without_a_pitch_head_have_no_pitch_steps(
    cache: TrainingCache, tmp_path: Path
) -> None:
    from waveflow.models.waveglow import WaveGlowConfig

    waveglow = WaveGlowConfig(
        n_mels=20,
        hop_length=HOP,
        n_flows=2,
        n_layers=1,
        hidden_channels=4,
        upsample_kernel=2 * HOP,
    )
    with pytest.raises(ConfigError, match="no pitch head"):
        Trainer(recipe().model_copy(update={"model": waveglow}), cache, tmp_path / "a")
    plain = recipe(steps=2, pitch_steps=0).model_copy(update={"model": waveglow})
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


# --- killed ---

KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_training as t
recipe = t.recipe(steps=100_000, pitch_steps=2, validate_every=2, checkpoint_every=1)
t.Trainer(recipe, t.TrainingCache(Path({cache!r})), Path({out!r})).run()
"""


def test_a_killed_run_is_whole_and_goes_on(cache: TrainingCache, tmp_path: Path) -> None:
    """It saves at every step, so the kill most often falls into a save."""
    out = tmp_path / "run"
    code = KILLED.format(tests=str(Path(__file__).parent), cache=str(cache.folder), out=str(out))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (out / "step-00000005").exists() and not (out / "step-00000006").exists():
            assert time.monotonic() < deadline, "no checkpoint after a minute"
            assert process.poll() is None, "the run has ended by itself"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    load_checkpoint(out)
    load_checkpoint(resolve_run(out, "last"))
    same = recipe(steps=100_000, pitch_steps=2, validate_every=2, checkpoint_every=1)
    # What a kill in the middle of a save leaves behind goes away with the next save.
    (out / ".step-00000003.1234.tmp").mkdir()
    trainer = Trainer(same, cache, out, resume=True)
    assert trainer.step >= 4
    trainer.run(max_minutes=0)
    assert {path.name for path in out.iterdir() if path.is_dir()} == set(
        json.loads((out / RUN_POINTER).read_text()).values()
    )
    assert resolve_run(out, "last").name == f"step-{trainer.step:08d}"
