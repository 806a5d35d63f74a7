"""What a run says of itself, when it stops, what reproduces it, and how fast steps are made."""

import csv
import json
import logging
import math
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_voice
from test_training import HOP, MEL, MODEL, RATE, recipe, tensors_of, write_cache
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from waveflow.audio.mel import MelSpectrogram
from waveflow.bijections import ActNorm, Affine, AllActive, Chain, Coupling, Inverse, Squeeze
from waveflow.bijections.base import record_log_dets
from waveflow.checkpoint import load_checkpoint
from waveflow.data.cache import TrainingCache
from waveflow.distributions import standard_normal_log_prob
from waveflow.errors import ConfigError
from waveflow.flow import Flow
from waveflow.models.frameglow import FrameGlowConfig
from waveflow.models.registry import build_flow
from waveflow.models.waveglow import WaveGlowConfig
from waveflow.training import trainer as trainer_module
from waveflow.training.compile import compile_networks
from waveflow.training.config import Recipe, read_recipe
from waveflow.training.diagnostics import (
    latent_statistics,
    learned_steps,
    power_sums,
    record_step_log_dets,
)
from waveflow.training.log import WANDB_SWITCH, MetricsLog, mel_picture
from waveflow.training.losses import SpectralDistance, objectives
from waveflow.training.prefetch import Prefetch
from waveflow.training.record import RUN_RECORD
from waveflow.training.trainer import Trainer
from waveflow.training.validation import (
    Validation,
    _interval,
    _student_95,
    score_clips,
    summarise,
    validate,
)

WAVEGLOW = WaveGlowConfig(
    n_mels=20,
    hop_length=HOP,
    n_flows=3,
    n_early_every=2,
    n_layers=2,
    hidden_channels=8,
    upsample_kernel=2 * HOP,
)
MODELS = {"frameglow": MODEL, "waveglow": WAVEGLOW}
PLAIN: dict[str, object] = {"pitch_steps": 0, "energy_weight": 0.0, "calibration_weight": 0.0}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TrainingCache:
    folder = tmp_path_factory.mktemp("caches") / "tiny"
    return write_cache(folder, ["train", "train", "val", "val", "val"])


def perturbed(model: FrameGlowConfig | WaveGlowConfig, seed: int = 0) -> Flow:
    """A flow of random weights, none of them at the zeros that it would start from."""
    torch.manual_seed(seed)
    flow = build_flow(model, MEL)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return flow.eval()


def speech(n_frames: int = 40, n_items: int = 2) -> tuple[Tensor, Tensor]:
    voices = [torch.from_numpy(make_voice(1.0, i, RATE)) for i in range(n_items)]
    audio = torch.stack([voice[: n_frames * HOP] for voice in voices])
    return audio, MelSpectrogram(MEL)(audio)


def validated(flow: Flow, cache: TrainingCache) -> Validation:
    return validate(flow, cache, MelSpectrogram(MEL), torch.device("cpu"))


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
        "frameglow": [coupling] * 2 + [coupling, mixing] * 2,  # base, one level, two flows
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
    flow = perturbed(MODEL)
    result = validated(flow, cache)
    mean, deviation, _ = result.latent
    gaussian = -0.5 * (mean**2 + deviation**2 + math.log(2 * math.pi))
    assert result.log_likelihood == pytest.approx(
        gaussian + sum(result.log_dets.values()), abs=1e-4
    )
    assert result.speech.shape == result.example.shape
    assert result.speech.dim() == 1
    # Encoding its own draws gives back their noise: as likely as they are, on average.
    assert result.draw_log_likelihood != result.log_likelihood


def test_tables_of_several_processes_add_up_exactly(cache: TrainingCache) -> None:
    flow = perturbed(MODEL)
    scores, audio, draw = score_clips(flow, cache, MelSpectrogram(MEL), torch.device("cpu"))
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


def test_the_interval_of_equal_clips_is_that_of_a_mean() -> None:
    values = torch.tensor([4.0, 5.0, 5.5, 6.0, 4.5, 5.2], dtype=torch.float64)
    expected = 2.5706 * values.std().item() / math.sqrt(6)  # Student's t, 5 degrees of freedom
    found = _interval(values * 1000, torch.full_like(values, 1000))
    assert found == pytest.approx(expected, rel=2e-3)
    assert _interval(values[:1], torch.ones(1)) is None


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
        covered += abs(mean - 5.0) <= _interval(values * weights, weights)
    assert 0.92 <= covered / 1000 <= 0.97


# --- what is written down ---


def test_the_table_holds_the_curves(cache: TrainingCache, tmp_path: Path) -> None:
    Trainer(recipe(steps=20, **PLAIN), cache, tmp_path / "run").run()
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["kind"], row["name"]): float(row["value"]) for row in rows if row["step"] == "20"}
    assert {name for kind, name in found if kind == "train"} == {
        "log_likelihood",
        "gradient_norm",
        "learning_rate",
        "waiting_share",
        "skipped",
    }
    assert {name for kind, name in found if kind == "z"} == {
        "mean",
        "standard_deviation",
        "kurtosis",
    }
    assert ("log_det", "01_coupling") in found
    assert found["validation", "interval"] > 0
    assert 0 <= found["train", "waiting_share"] < 1
    assert found["train", "learning_rate"] == pytest.approx(1e-3 / math.sqrt(1 + 19 / 4000))


def test_tensorboard_has_curves_sounds_and_pictures(cache: TrainingCache, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    Trainer(recipe(steps=20, **PLAIN), cache, tmp_path / "run").run()
    events = accumulator.EventAccumulator(str(tmp_path / "run")).Reload().Tags()
    assert set(events["audio"]) == {"speech", "draw"}
    assert set(events["images"]) == {"speech_mel", "draw_mel"}
    assert {
        "train/learning_rate",
        "train/gradient_norm",
        "validation/interval",
        "z/kurtosis",
    } <= set(events["scalars"])


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
    short = recipe(steps=20, validate_every=10, **PLAIN)
    Trainer(short, cache, tmp_path / "run").run()
    Trainer(short, cache, tmp_path / "run", resume=True).run()
    first, second = stand_in.started
    assert (first["project"], first["name"], first["resume"]) == ("vocoders", "run", "allow")
    assert first["id"] == second["id"]
    assert json.loads(first["config"]["recipe"])["train"]["steps"] == 20
    assert stand_in.finished == 2
    names = {name for values in stand_in.logged for name in values}
    assert {"train/learning_rate", "z/kurtosis", "draw", "draw_mel", "speech"} <= names
    assert all("step" in values for values in stand_in.logged)
    [sound, _] = [values["draw"] for values in stand_in.logged if "draw" in values]
    assert sound[1] == RATE


def test_weights_and_biases_is_off_and_optional(
    cache: TrainingCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delenv(WANDB_SWITCH, raising=False)
    with MetricsLog(tmp_path, 0):
        pass
    monkeypatch.setenv(WANDB_SWITCH, "vocoders")
    with pytest.raises(ConfigError, match=r"waveflow\[wandb\]"), MetricsLog(tmp_path, 0):
        pass


# --- a run that is made again ---


def test_a_run_folder_reproduces_the_run(cache: TrainingCache, tmp_path: Path) -> None:
    first = Trainer(recipe(), cache, tmp_path / "first", data="made up")
    first.run()
    record = json.loads((tmp_path / "first" / RUN_RECORD).read_text())
    assert record["command"] == sys.argv
    assert record["packages"]["torch"] == torch.__version__
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


def test_a_damaged_json_recipe_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ConfigError, match=r"recipe\.json is not JSON"):
        read_recipe(tmp_path / "recipe.json")


# --- knowing when to stop ---


def test_a_run_without_progress_stops_and_says_why(
    cache: TrainingCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scores = iter([-3.0, -2.0, -2.5, -1.0, -1.5, -1.2, -1.1, 0.0])

    def scored(*args: object) -> object:
        return validate(*args)._replace(log_likelihood=next(scores))

    monkeypatch.setattr(trainer_module, "validate", scored)
    patient = recipe(steps=100, validate_every=2, checkpoint_every=50, patience=3, **PLAIN)
    trainer = Trainer(patient, cache, tmp_path / "run")
    with caplog.at_level(logging.INFO, "waveflow"):
        trainer.run()
    assert trainer.step == 14
    assert trainer.best == -1.0
    [line] = [record.message for record in caplog.records if "stopped" in record.message]
    assert line == (
        "stopped at step 14: since step-00000008 no validation log-likelihood was above -1.0000"
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


# --- precision ---


@pytest.mark.parametrize("name", ["fp16", "float16", "half"])
def test_half_precision_is_not_offered(name: str) -> None:
    with pytest.raises(ValueError, match="fp16 is not offered"):
        recipe(precision=name)


SENSITIVE = ("exp", "log", "sum", "mean", "var", "logdet", "slogdet", "inv", "det", "cumsum", "pow")


class Rounded(TorchDispatchMode):
    """Names the operations that read or write bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        flat, _ = torch.utils._pytree.tree_flatten((args, kwargs, result))
        if any(isinstance(t, Tensor) and t.dtype == torch.bfloat16 for t in flat):
            self.names.add(function.overloadpacket.__name__.removesuffix("_"))
        return result


@pytest.mark.parametrize("name", MODELS)
def test_under_bf16_only_the_networks_are_rounded(name: str) -> None:
    """Log-determinants, exponentials, inverses of 1x1 convolutions and reductions are not."""
    flow, (audio, mel) = perturbed(MODELS[name]).train(), speech()
    with Rounded() as rounded, record_log_dets():
        terms = objectives(flow, SpectralDistance(MEL), audio, mel, True, True, "bf16")
    # Products and the convolutions, with what lies between them, and nothing else.
    assert rounded.names & {"mm", "addmm", "convolution", "mkldnn_rnn_layer"}
    wrong = {n for n in rounded.names if any(part in n.split("_") for part in SENSITIVE)}
    assert wrong == set()
    assert {term.dtype for term in terms} == {torch.float32}
    sum(terms).backward()
    assert {p.grad.dtype for p in flow.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("name", MODELS)
def test_under_bf16_volumes_and_latents_are_float32_to_the_last_bit(name: str) -> None:
    """z is found again from the same parameters: the inverse's error is not bfloat16's 4e-3."""
    flow, (audio, mel) = perturbed(MODELS[name]), speech()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), record_log_dets() as terms:
        cond = flow.condition(mel)
        log_prob, z = flow.log_prob(audio, cond)
        back, _ = flow.bijection.inverse(z, cond)
    assert {t.dtype for t in (*terms, z, log_prob, back)} == {torch.float32}
    torch.testing.assert_close(back[:, 0], audio, rtol=0, atol=1e-4)


# --- steps in parts, compiled, fused ---


def gradients_of(trainer: Trainer) -> tuple[Tensor, dict[str, float]]:
    values = trainer._gradients()
    flow = trainer.flow
    flat = [p.grad.flatten() for p in flow.parameters() if p.grad is not None]
    return torch.cat(flat), values


@pytest.mark.parametrize("accumulate", [2, 3, 4])
@pytest.mark.parametrize("step", [0, 5], ids=["pitch", "flow"])
def test_parts_give_the_gradient_of_the_whole(
    cache: TrainingCache, tmp_path: Path, accumulate: int, step: int
) -> None:
    """With all three objectives, whose random numbers and norms are those of the batch."""
    results = []
    for parts in (1, accumulate):
        trainer = Trainer(
            recipe(batch_size=4, accumulate=parts, pitch_steps=1), cache, tmp_path / f"{parts}"
        )
        trainer.flow.load_state_dict(perturbed(MODEL).state_dict())
        trainer.step = step
        results.append(gradients_of(trainer))
    (whole, terms), (summed, part_terms) = results
    # Sums in another order: float32's rounding of values that partly cancel.
    assert (whole - summed).norm() < 1e-4 * whole.norm()
    assert part_terms == pytest.approx(terms, rel=1e-4)
    assert whole.norm() > 0


def test_layers_that_start_from_data_see_the_whole_batch(
    cache: TrainingCache, tmp_path: Path
) -> None:
    norms = []
    for parts in (1, 4):
        settings = recipe(batch_size=4, accumulate=parts, **PLAIN)
        trainer = Trainer(settings, cache, tmp_path / f"{parts}")
        norm = ActNorm(HOP)
        trainer.flow.bijection.steps.append(norm)
        trainer._gradients()
        norms.append(norm)
    assert norms[1].initialized
    torch.testing.assert_close(norms[1].shift, norms[0].shift, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norms[1].log_scale, norms[0].log_scale, rtol=1e-4, atol=1e-5)


def test_a_batch_cannot_be_cut_into_more_parts_than_items() -> None:
    with pytest.raises(ValueError, match="accumulate 3 parts of batch_size 2"):
        recipe(batch_size=2, accumulate=3)


def compiled_gradients(
    model: FrameGlowConfig | WaveGlowConfig, backend: str, draws: bool
) -> tuple[Tensor, ...]:
    """Of the same weights, without and with compiled networks."""
    results = []
    for compiled in (False, True):
        flow, (audio, mel) = perturbed(model).train(), speech()
        names = set(flow.state_dict())
        if compiled:
            compile_networks(flow, torch.device("cpu"), backend)
            assert set(flow.state_dict()) == names
        torch.manual_seed(1)
        terms = objectives(flow, SpectralDistance(MEL), audio, mel, draws, draws)
        sum(term for term in terms if term is not None).backward()
        flat = [p.grad.flatten() for p in flow.parameters() if p.grad is not None]
        results.append(torch.cat(flat))
    return tuple(results)


def test_compiled_networks_have_the_same_gradients() -> None:
    """As torch traces them; that its C++ is right, too, is the slow test below."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = WAVEGLOW.model_copy(update={"n_flows": 1})
    plain, compiled = compiled_gradients(model, "aot_eager", draws=False)
    assert (plain - compiled).norm() < 1e-5 * plain.norm()
    assert dict(torch._dynamo.utils.counters["frames"]) == {"total": 1, "ok": 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_compiled_code_has_the_same_gradients(name: str) -> None:
    torch._dynamo.reset()
    plain, compiled = compiled_gradients(MODELS[name], "inductor", draws=True)
    assert (plain - compiled).norm() < 1e-5 * plain.norm()


def test_the_recipe_compiles(
    cache: TrainingCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(trainer_module, "compile_networks", lambda *args: seen.append(args))
    Trainer(recipe(**PLAIN), cache, tmp_path / "plain")
    assert seen == []
    trainer = Trainer(recipe(compile=True, **PLAIN), cache, tmp_path / "compiled")
    assert seen == [(trainer.flow, torch.device("cpu"))]


def test_without_a_compiler_compile_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        compile_networks(perturbed(MODEL), torch.device("cpu"))


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
