"""A student of inverse autoregressive flows and the WaveNet that teaches it."""

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tiny_training import (
    HOP,
    MEL,
    WAVEGLOW,
    assert_same,
    batch_of,
    perturbed,
    speech,
    tensors_of,
    write_cache,
)
from torch import Tensor

import waveflow
from waveflow.audio.mel import MelConfig
from waveflow.checkpoint import ModelConfig, load_checkpoint, save_checkpoint
from waveflow.cli.main import main
from waveflow.data.cache import TrainingCache, file_sha256
from waveflow.distributions import gaussian_kl
from waveflow.engine.vocoder import Vocoder
from waveflow.errors import CheckpointError, ConfigError
from waveflow.flow import Flow
from waveflow.models.parallel_wavenet import Distillation, ParallelWaveNetConfig, Student
from waveflow.models.registry import FlowConfig
from waveflow.models.wavenet import WaveNetConfig
from waveflow.nn.causal_wavenet import CausalWaveNet
from waveflow.training.config import Recipe, TrainConfig
from waveflow.training.loop import Trainer
from waveflow.training.run_folder import RUN_RECORD, TEACHER

pytestmark = pytest.mark.filterwarnings("ignore:.*were clipped")

SIZES: dict[str, Any] = {"hidden_channels": 8, "n_features": 4}
STUDENT = ParallelWaveNetConfig(flow_layers=(3, 2), **SIZES)
WAVENET = WaveNetConfig(n_layers=3, **SIZES)


def pair() -> tuple[Student, Flow, Distillation]:
    """A student and a teacher far from the identity, and what the one learns from the other."""
    student, teacher = cast(Student, perturbed(STUDENT)), perturbed(WAVENET, seed=1)
    with torch.no_grad():
        for parameter in [*student.parameters(), *teacher.parameters()]:
            parameter.add_(0.2 * torch.randn_like(parameter))
    teacher.requires_grad_(False)
    return student, teacher, Distillation(student, teacher, "float32")


def save_teacher(folder: Path, model: FlowConfig = WAVENET, mel: MelConfig = MEL) -> Path:
    save_checkpoint(
        folder, ModelConfig(model=model, mel=mel), perturbed(model, seed=1).state_dict()
    )
    return folder


def recipe(teacher: Path | str, **train: Any) -> Recipe:
    settings: dict[str, Any] = {
        "steps": 6,
        "batch_size": 2,
        "segment_frames": 8,
        "warmup_steps": 2,
        "learning_rate": 1e-2,
        "ema_decay": 0.9,
        "validate_every": 3,
        "checkpoint_every": 2,
        "teacher": str(teacher),
    }
    return Recipe(model=STUDENT, mel=MEL, train=TrainConfig(**(settings | train)))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TrainingCache:
    return write_cache(tmp_path_factory.mktemp("caches") / "tiny", ["train", "train", "val"])


# --- the divergence ---


def test_the_divergence_of_gaussians_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    mean_q, log_q, mean_p, log_p = torch.randn(4, 500, generator=generator)
    q, p = (
        torch.distributions.Normal(mean, log.exp())
        for mean, log in ((mean_q, log_q), (mean_p, log_p))
    )
    expected = torch.distributions.kl_divergence(q, p)
    found = gaussian_kl(mean_q, log_q, mean_p, log_p)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not gaussian_kl(mean_q, log_q, mean_q, log_q).any()


def test_it_is_zero_where_student_equals_teacher() -> None:
    """Of Gaussians that do not depend on the past, a student of one flow has all."""
    student = cast(Student, perturbed(STUDENT.model_copy(update={"flow_layers": (2,)})))
    teacher = perturbed(WAVENET, seed=1)
    shift, log_scale = 0.3, -1.2  # of x = shift + exp(log_scale) z
    outputs = (
        (student.bijection[0].bijection, shift, log_scale),
        (  # type: ignore[index]
            teacher.bijection,
            -shift / math.exp(log_scale),
            -log_scale,
        ),
    )
    for step, *values in outputs:
        torch.nn.init.zeros_(step.network.leave.weight)
        # Affine(bound=9): a log-scale of 9 tanh(o / 9).
        raw = torch.tensor([values[0], 9 * math.atanh(values[1] / 9)])
        step.network.leave.bias.data = raw
    distillation = Distillation(student, teacher, "float32")
    audio, mel = speech(8)
    torch.manual_seed(0)
    z = torch.randn(2, 1, 8 * HOP)
    with torch.no_grad():
        score = distillation.score(student, mel, z)
        assert score.value.abs().max() < 1e-6
        # Speech that is the draw leaves nothing of the loss either.
        torch.manual_seed(0)
        assert distillation(batch_of(score.draw, mel)).value < 1e-6
        torch.nn.init.constant_(student.bijection[0].bijection.network.leave.bias, 0.1)  # type: ignore[index]
        assert (distillation.score(student, mel, z).value < -0.1).all()
        terms = distillation(batch_of(audio, mel)).terms
        assert terms["scales"] == pytest.approx(4 * (log_scale - 0.1) ** 2, rel=1e-3)
        assert terms["spectral"] > 1


@torch.no_grad()
def test_it_is_the_divergence_of_the_two_densities() -> None:
    """E[log q(x) - log p(x)] over draws x of the student, by the flows' own likelihoods."""
    student, teacher, distillation = pair()
    n_items = 400
    mel = speech(2)[1][:1].expand(n_items, -1, -1)
    z = torch.randn(n_items, 1, 2 * HOP, generator=torch.Generator().manual_seed(0))
    score = distillation.score(student, mel, z)
    torch.testing.assert_close(score.draw, student.decode(z, mel))
    # The inverse goes sample by sample.
    log_q = student(score.draw[:20], mel[:20])
    torch.testing.assert_close(score.draw_log_likelihood[:20], log_q, rtol=1e-4, atol=1e-4)
    difference = score.draw_log_likelihood - teacher(score.draw, mel) + score.value
    error = difference.std() / n_items**0.5
    assert difference.mean().abs() < 4 * error
    assert -score.value.mean() > 20 * error


# --- the loss ---


def test_gradients_go_through_the_draw_and_the_teacher_stays() -> None:
    """The gradient of the whole loss against a difference quotient, in float64."""
    student, teacher, distillation = pair()
    student.double()
    teacher.double()
    before = [p.clone() for p in teacher.parameters()]
    audio, mel = (part.double() for part in speech(8))
    batch = batch_of(audio, mel)

    def loss() -> Tensor:
        torch.manual_seed(0)
        terms = distillation(batch)
        assert list(terms.terms) == ["kl", "scales", "spectral"]
        return terms.value

    torch.set_default_dtype(torch.float64)
    try:
        loss().backward()
        parameters = [p for p in student.parameters() if p.grad is not None]
        assert len(parameters) == len(list(student.parameters()))
        norm = sum(p.grad.square().sum() for p in parameters if p.grad is not None) ** 0.5
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for p in parameters:
                    assert p.grad is not None
                    p.add_(sign * (2 if sign < 0 else 1) * 1e-5 * p.grad / norm)
                ends.append(loss().item())
    finally:
        torch.set_default_dtype(torch.float32)
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(norm), rel=1e-4)
    assert all(p.grad is None for p in teacher.parameters())
    assert all(map(torch.equal, teacher.parameters(), before))


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    _, _, distillation = pair()
    batch = batch_of(*speech(8, 3))
    torch.manual_seed(0)
    whole = distillation(batch).value
    parts = []
    for part in batch.split(2):
        torch.manual_seed(0)
        parts.append(distillation(part).value * part.share.weight)
    torch.testing.assert_close(sum(parts), whole)


# --- synthesis ---


@torch.no_grad()
def test_it_draws_in_one_pass_and_streams_with_a_finite_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = perturbed(STUDENT)
    # Samples before it: 1 + 2 + 4 + 1 and 1 + 2 + 1, within one hop; two frames for the encoder.
    assert student.bijection.inverse_context == (12, 0)
    assert student.context == (3, 2)
    lengths: list[int] = []
    forward = CausalWaveNet.forward

    def counted(self: CausalWaveNet, x: Tensor, *args: Any) -> Tensor:
        lengths.append(x.shape[2] // HOP)
        return forward(self, x, *args)

    monkeypatch.setattr(CausalWaveNet, "forward", counted)
    monkeypatch.setattr(CausalWaveNet, "steps", lambda *_: pytest.fail("sample by sample"))
    vocoder = Vocoder(ModelConfig(model=STUDENT, mel=MEL), student)
    mel = speech(40)[1][0]
    whole = vocoder(mel)
    assert lengths == [40, 40]  # once in each flow
    lengths.clear()
    pieces = torch.cat(list(vocoder.stream(mel.split(4, 1), least_frames=1)))
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5)
    assert len(lengths) > 10 and max(lengths) < 20


# --- a run ---


def scores(run: Path, name: str = "negative_KL") -> list[float]:
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [float(r["value"]) for r in rows if (r["kind"], r["name"]) == ("validation", name)]


def test_the_divergence_falls_by_half(cache: TrainingCache, tmp_path: Path) -> None:
    """On held mels, of a teacher that has learned for a moment."""
    teacher, (audio, mel) = perturbed(WAVENET).train(), speech(30)
    optimizer = torch.optim.Adam(teacher.parameters(), 3e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = -teacher(audio, mel).mean()
        loss.backward()
        optimizer.step()
    assert loss < 0  # more than 1 nat above white noise of amplitude 1
    config = ModelConfig(model=WAVENET, mel=MEL)
    save_checkpoint(tmp_path / "teacher", config, teacher.state_dict())
    settings = recipe(tmp_path / "teacher", steps=25, validate_every=25, ema_decay=0.5)
    trainer = Trainer(settings, cache, tmp_path / "run")
    score = trainer.phases[-1].score
    assert score is not None
    before = score(trainer.flow, mel, trainer.flow.noise(30, [5, 6])).value.mean()
    trainer.run()
    assert trainer.best is not None
    assert 0 > trainer.best > before / 10


def test_a_run_keeps_its_teacher_and_resumes_without_the_first(
    cache: TrainingCache,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Neither a step nor a validation makes a density.
    monkeypatch.setattr(CausalWaveNet, "steps", lambda *_: pytest.fail("sample by sample"))
    folder = save_teacher(tmp_path / "teacher")
    checksum = file_sha256(folder / "manifest.json")
    whole = Trainer(recipe(folder), cache, tmp_path / "whole", data="made up")
    whole.run()
    run = tmp_path / "run"
    Trainer(recipe(folder, steps=3), cache, run, data="made up").run()
    record = json.loads((run / RUN_RECORD).read_text())["teacher"]
    assert record == {"folder": str(folder.resolve()), "manifest_sha256": checksum}
    shutil.rmtree(folder)
    resumed = Trainer(recipe(folder), cache, run, resume=True)
    resumed.run()
    assert_same(tensors_of(resumed), tensors_of(whole))
    assert resumed.best == whole.best == pytest.approx(max(scores(run)), rel=1e-5)
    teacher = resumed.folder.load_teacher(True, resumed.device)
    assert teacher is not None and not teacher.flow.training
    assert not any(p.requires_grad for p in teacher.flow.parameters())
    # The model needs no teacher.
    shutil.rmtree(run / TEACHER)
    vocoder = waveflow.load(run)
    assert not [name for name in vocoder.flow.state_dict() if "teacher" in name]
    assert vocoder(speech(4)[1][0]).shape == (4 * HOP,)
    provenance = load_checkpoint(run)[0].provenance
    assert provenance.data == f"made up, taught by {folder}: data not stated"
    assert (provenance.measure, provenance.log_likelihood) == ("negative KL", whole.best)
    assert main(["info", str(run)]) == 0
    [line] = [s for s in capsys.readouterr().out.splitlines() if s.startswith("negative KL ")]
    assert "on validation speech, log-likelihood " in line
    with pytest.raises(CheckpointError, match=rf"teacher of this run: .*{TEACHER}$"):
        Trainer(recipe(folder, steps=9), cache, run, resume=True)


WRONG: dict[str, tuple[FlowConfig, MelConfig, str]] = {
    "other mel": (
        WAVENET,
        MEL.model_copy(update={"win_length": 128}),
        "teacher .* has other mel settings than the recipe: win_length 128, not 256",
    ),
    "mixture": (WAVENET.model_copy(update={"head": "mixture"}), MEL, "give a WaveNet with a Gauss"),
    "other type": (WAVEGLOW, MEL, "teacher .*: give a WaveNet with a Gaussian head"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_teacher_of_another_kind_is_refused(
    cache: TrainingCache, tmp_path: Path, case: str
) -> None:
    model, mel, message = WRONG[case]
    folder = save_teacher(tmp_path / "teacher", model, mel)
    with pytest.raises(ConfigError, match=message) as caught:
        Trainer(recipe(folder), cache, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_missing_teacher_is_one_line(
    cache: TrainingCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CheckpointError, match=r"teacher of this run: no model './runs/none'"):
        Trainer(recipe("./runs/none"), cache, tmp_path / "run")
    with pytest.raises(ConfigError, match="learns from a trained WaveNet: name it as the"):
        Trainer(recipe(""), cache, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # The command line says so before it prepares the data.
    (tmp_path / "recipe.json").write_text(recipe("./runs/none").model_dump_json())
    argv = [
        "train",
        str(tmp_path / "recipe.json"),
        "--data",
        "nowhere",
        "-o",
        str(tmp_path / "run"),
    ]
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith("waveflow: no model './runs/none'")
