"""Runs that diverge or are stopped early, and what a run's files may not say."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import load_file, save_file
from tiny_training import MEL, PLAIN, assert_same, recipe, tensors_of, write_cache

from waveflow.audio.mel import MelConfig
from waveflow.checkpoint import MANIFEST, load_checkpoint, manifest_bytes, run_checkpoints
from waveflow.cli import train as train_verb
from waveflow.cli.main import main
from waveflow.data.cache import TrainingCache
from waveflow.engine.vocoder import load
from waveflow.errors import CheckpointError, ConfigError, DivergedError
from waveflow.model_files import SynthesisConfig
from waveflow.models.frameglow import FrameGlowConfig
from waveflow.models.registry import FlowConfig
from waveflow.models.waveglow import WaveGlowConfig
from waveflow.training import loop
from waveflow.training.config import Recipe, TrainConfig, read_recipe
from waveflow.training.loop import Progress, Trainer
from waveflow.training.run_folder import STATE, TRAINING, RunFolder, load_training_tensors
from waveflow.training.validation import validate

OFTEN = {"checkpoint_every": 1, "validate_every": 50, "warmup_steps": 1, **PLAIN}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TrainingCache:
    splits = ["train", "train", "val", "val"]
    return write_cache(tmp_path_factory.mktemp("caches") / "tiny", splits)


@pytest.fixture(scope="module")
def good(cache: TrainingCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps at a rate that is not too high; do not change it."""
    out = tmp_path_factory.mktemp("runs") / "good"
    Trainer(recipe(steps=3, **OFTEN), cache, out).run()
    return out


@pytest.fixture
def run(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "run")


def names(run: Path) -> list[str]:
    return [folder.name for folder in run_checkpoints(run)]


# --- divergence ---


@pytest.mark.parametrize(
    "rate", [*(pytest.param(rate, marks=pytest.mark.slow) for rate in (10.0, 1e5)), 1e38]
)
def test_a_run_that_diverges_stops_and_goes_on_at_a_lower_rate(
    cache: TrainingCache,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    rate: float,
) -> None:
    monkeypatch.setattr(loop, "MOST_SKIPPED", 5)
    steep = recipe(steps=100, learning_rate=rate, **OFTEN)
    with pytest.raises(DivergedError, match=r"diverged at step \d+.*learning_rate, .*--resume"):
        Trainer(steep, cache, run, resume=True).run()
    # Also the checkpoint of the first bad weights is gone, and the good ones are whole.
    assert set(names(run)) >= {"step-00000003"}
    for folder in run_checkpoints(run):
        load_checkpoint(folder)
    flat = Trainer(recipe(steps=6, learning_rate=1e-4, **OFTEN), cache, run, resume=True)
    assert f"learning_rate 0.0001 from step {flat.step} on, {rate:g} before" in caplog.text
    flat.run()
    assert (flat.step, flat.skipped) == (6, 0)
    assert read_recipe(run / "recipe.json").train.learning_rate == 1e-4


def spoil(where: str, value: float) -> Callable[[Trainer], None]:
    """Puts a value into a tensor of a trainer once it has made a step."""

    def change(trainer: Trainer) -> None:
        parameter = next(p for p in trainer.flow.parameters() if trainer.optimizer.state.get(p))
        tensors = {
            "weights": parameter.data,
            "average": next(iter(trainer.average.values())),
            "moments": trainer.optimizer.state[parameter]["exp_avg_sq"],
        }
        tensors[where].view(-1)[0] = value

    return change


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("validation", math.nan),
        ("validation", -math.inf),
        ("weights", math.inf),
        ("average", math.nan),
        ("moments", math.inf),
    ],
)
def test_what_is_not_finite_is_not_saved(
    cache: TrainingCache,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    value: float,
) -> None:
    def spoilt(*args: object) -> object:
        return validate(*args)._replace(log_likelihood=value)

    def step(self: Trainer) -> dict[str, float]:
        spoil(where, value)(self)
        return {"log_likelihood": 0.0}

    if where == "validation":
        monkeypatch.setattr(loop, "validate", spoilt)
    else:
        monkeypatch.setattr(Trainer, "_train_step", step)
    before = names(run)
    trainer = Trainer(recipe(steps=4, **OFTEN), cache, run, resume=True)
    with pytest.raises(DivergedError, match="is not finite"):
        trainer.run()
    assert names(run)[0] == before[0]
    assert trainer.folder.read(names(run)[0]).state.step == 3


@pytest.mark.parametrize(
    ("by", "skipped", "is_error"),
    [("steps", 1, False), ("steps", 2, True), ("a signal", 1, False), ("a signal", 4, True)],
)
def test_a_run_does_not_end_in_skipped_steps(
    cache: TrainingCache,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    skipped: int,
    is_error: bool,
    by: str,
) -> None:
    """One may be chance. Nothing is saved meanwhile, although each step is due."""
    end = 3 + skipped
    settings = recipe(steps=end if by == "steps" else 100, **OFTEN)
    trainer = Trainer(settings, cache, run, resume=True)
    monkeypatch.setattr(trainer, "_gradients", lambda phase: {"log_likelihood": math.nan})
    arguments = {"stop": lambda: trainer.step == end}
    if is_error:
        with pytest.raises(DivergedError, match=f"the last {skipped} steps were skipped"):
            trainer.run(**arguments)
    else:
        trainer.run(**arguments)
    assert names(run)[0] == ("step-00000003" if is_error else f"step-{end:08d}")


def test_a_checkpoint_waits_for_a_step_that_is_not_skipped(
    cache: TrainingCache, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rare = recipe(steps=8, **(OFTEN | {"checkpoint_every": 2}))
    Trainer(rare, cache, run.parent / "rare").run(max_minutes=0)
    trainer = Trainer(rare, cache, run.parent / "rare", resume=True)
    gradients, saved = trainer._gradients, []
    monkeypatch.setattr(
        trainer,
        "_gradients",
        lambda phase: {"log_likelihood": math.nan} if trainer.step < 4 else gradients(phase),
    )
    monkeypatch.setattr(trainer, "_save", lambda: saved.append(trainer.step))
    trainer.run()
    assert saved[0] == 5 and trainer.skipped == 3


def test_without_a_good_checkpoint_it_says_start_anew(
    cache: TrainingCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the command line, with status 2 and one line of its own."""
    monkeypatch.setattr(loop, "MOST_SKIPPED", 3)
    path = tmp_path / "recipe.json"
    path.write_text(recipe(steps=50, learning_rate=1e38, **OFTEN).model_dump_json())
    out = tmp_path / "run"
    arguments = ["train", str(path), "--data", str(cache.folder), "-o", str(out)]
    assert main(arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "diverged" in last and "1e+38" in last and "start anew" in last
    assert not names(out)
    # And it can be started anew.
    path.write_text(recipe(steps=2, **OFTEN).model_dump_json())
    assert main(arguments) == 0


def test_a_model_that_cannot_draw_is_never_the_best(
    cache: TrainingCache, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(recipe(steps=4, **OFTEN), cache, run, resume=True)
    best = trainer.best_name

    def mute(*args: object) -> object:
        return validate(*args)._replace(log_likelihood=9.0, draw_log_likelihood=math.nan)

    monkeypatch.setattr(loop, "validate", mute)
    trainer.run()
    assert trainer.best_name == best == "step-00000003"


@pytest.mark.parametrize("value", [math.nan, 1e30], ids=["nan", "huge"])
def test_a_model_that_diverged_is_blamed_and_not_the_mel(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    value: float,
) -> None:
    """Also one whose weights are finite, from before runs stopped."""
    [best, *_] = run_checkpoints(run)
    change(best, "model.safetensors", "conditioner.level_bias", lambda t: t + value)
    mel = tmp_path / "mel.npy"
    np.save(mel, np.full((MEL.n_mels, 8), -5.0, np.float32))
    status = main(["vocode", str(mel), "-o", str(tmp_path / "out.wav"), "--model", str(best)])
    said = capsys.readouterr().err
    assert status == 2 and said.count("\n") == 1
    reason = "holds values that are not finite" if math.isnan(value) else "training has diverged"
    assert reason in said and "mel," not in said
    assert not (tmp_path / "out.wav").exists()


# --- what a run says of itself ---


def test_a_run_that_was_stopped_in_its_first_phase_says_so(
    cache: TrainingCache,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "run"
    settings = recipe(steps=10, pitch_steps=3, checkpoint_every=1, validate_every=50)
    trainer = Trainer(settings, cache, out)
    trainer.run(stop=lambda: trainer.step == 2)
    source = load_checkpoint(out)[0].provenance
    assert (source.steps, source.phase) == (2, "pitch head")
    assert main(["info", str(out)]) == 0
    said = capsys.readouterr()
    assert "2 steps, 0 minutes, all in the phase 'pitch head'" in said.out
    caplog.clear()
    load(out)
    assert "is not trained" in caplog.text and "pitch head" in caplog.text
    resumed = Trainer(settings, cache, out, resume=True)
    resumed.run(stop=lambda: resumed.step == 4)
    caplog.clear()
    load(out)
    source = load_checkpoint(out)[0].provenance
    assert (source.steps, source.phase, caplog.text) == (4, "", "")


def test_a_checkpoint_has_no_figures_of_other_weights(cache: TrainingCache, run: Path) -> None:
    trainer = Trainer(recipe(steps=9, **OFTEN), cache, run, resume=True)
    trainer.run(stop=lambda: trainer.step == 4)
    newest = load_checkpoint(run_checkpoints(run)[0])[0].provenance
    assert (newest.steps, newest.log_likelihood) == (4, None)
    assert load_checkpoint(run)[0].provenance.log_likelihood == trainer.best


CONFIGS: dict[type[BaseModel], dict[str, object]] = {
    TrainConfig: {},
    SynthesisConfig: {},
    MelConfig: {"sample_rate": 8000},
    FrameGlowConfig: {},
    WaveGlowConfig: {},
}


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (config, name)
        for config in CONFIGS
        for name, field in config.model_fields.items()
        if "float" in str(field.annotation)
    ],
)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_field_takes_no_infinity_that_it_cannot_store(
    config: type[BaseModel], field: str, value: float
) -> None:
    try:
        made = config(**CONFIGS[config], **{field: value})
    except ValidationError:
        return
    assert config.model_validate_json(made.model_dump_json()) == made
    assert (config, field) in {(TrainConfig, "clip_norm")}, "does it mean anything there?"


def test_the_config_of_another_model_stores_infinity() -> None:
    class Config(FlowConfig):
        type: str = "mine"
        bound: float = math.inf

    assert Config.model_validate_json(Config().model_dump_json()) == Config()


def test_a_run_that_clips_nothing_can_be_resumed(cache: TrainingCache, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    settings = recipe(steps=1, clip_norm=math.inf, **PLAIN)
    path.write_text(
        'mel = "hifigan"\n[model]\ntype = "frameglow"\n[train]\nclip_norm = inf\n', "utf-8"
    )
    assert read_recipe(path).train.clip_norm == math.inf
    Trainer(settings, cache, tmp_path / "run").run()
    more = recipe(steps=2, clip_norm=math.inf, **PLAIN)
    resumed = Trainer(more, cache, tmp_path / "run", resume=True)
    resumed.run()
    assert resumed.step == 2
    record = json.loads((tmp_path / "run" / "run.json").read_text(), parse_constant=pytest.fail)
    assert Recipe.model_validate(record["recipe"]) == settings


# --- state that is not what it says ---


def rehash(folder: Path, file: str) -> None:
    hashes = json.loads((folder / MANIFEST).read_text())["sha256"]
    hashes[file] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    (folder / MANIFEST).write_bytes(manifest_bytes(hashes))


def change(
    folder: Path, file: str, name: str, to: Callable[[torch.Tensor], torch.Tensor | None]
) -> None:
    """Replaces a tensor of a checkpoint, whose hashes stay right; None removes it."""
    tensors = load_file(folder / file)
    tensor = to(tensors.pop(name)) if name in tensors else to(torch.zeros(1))
    if tensor is not None:
        tensors[name] = tensor.contiguous()
    save_file(tensors, folder / file)
    rehash(folder, file)


BIAS = "conditioner.level_bias"
TENSORS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor | None], str]] = {
    "longer": (f"optimizer.exp_avg.{BIAS}", lambda t: torch.cat([t, t]), "expected"),
    "shorter": (f"optimizer.exp_avg_sq.{BIAS}", lambda t: t[:1], "expected"),
    "empty": (f"optimizer.exp_avg.{BIAS}", lambda t: t[:0], "expected"),
    "scalar": (f"optimizer.exp_avg_sq.{BIAS}", lambda t: t[0], "expected"),
    "another axis": (f"optimizer.exp_avg.{BIAS}", lambda t: t[None], "expected"),
    "half": (f"optimizer.exp_avg.{BIAS}", torch.Tensor.half, "expected"),
    "double": (f"optimizer.exp_avg_sq.{BIAS}", torch.Tensor.double, "expected"),
    "integers": (f"optimizer.exp_avg.{BIAS}", torch.Tensor.int, "expected"),
    "nan": (f"optimizer.exp_avg.{BIAS}", lambda t: t * math.nan, "not finite"),
    "infinite": (f"optimizer.exp_avg_sq.{BIAS}", lambda t: t + math.inf, "not finite"),
    "negative": (f"optimizer.exp_avg_sq.{BIAS}", lambda t: -t - 1, "negative"),
    "missing": (f"optimizer.exp_avg_sq.{BIAS}", lambda t: None, "is missing"),
    "no step": (f"optimizer.step.{BIAS}", lambda t: None, "is missing"),
    "many steps": (f"optimizer.step.{BIAS}", lambda t: t.expand(3), "expected"),
    "negative step": (f"optimizer.step.{BIAS}", lambda t: -t - 9, "negative"),
    "whole step": (f"optimizer.step.{BIAS}", torch.Tensor.long, "expected"),
    "unknown moment": (f"optimizer.max.{BIAS}", lambda t: t, "unknown tensor"),
    "unknown parameter": ("optimizer.exp_avg.x", lambda t: t, "unknown tensor"),
    "unknown weight": ("raw.x", lambda t: t, "unknown tensor"),
    "unknown kind": ("x", lambda t: t, "unknown tensor"),
    "no weight": (f"raw.{BIAS}", lambda t: None, "lacks tensor"),
    "weight": (f"raw.{BIAS}", lambda t: t[:2], "the config makes it"),
}


@pytest.fixture(scope="module")
def fresh(cache: TrainingCache, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return Trainer(recipe(steps=9, **OFTEN), cache, tmp_path_factory.mktemp("runs") / "fresh")


@pytest.mark.parametrize("name", TENSORS)
def test_training_tensors_are_compared_with_what_they_are_for(
    good: Path, fresh: Trainer, name: str
) -> None:
    """A fused optimizer reads beyond moments that are too short, and the process crashes."""
    tensor, to, message = TENSORS[name]
    newest, *_ = run_checkpoints(good)
    tensors = load_file(newest / TRAINING)
    changed = to(tensors.pop(tensor, torch.zeros(1)))
    if changed is not None:
        tensors[tensor] = changed
    with pytest.raises(CheckpointError, match=message) as caught:
        load_training_tensors(fresh.flow, fresh.optimizer, tensors, newest)
    assert "\n" not in str(caught.value) and TRAINING in str(caught.value)
    assert not fresh.optimizer.state


def test_a_run_goes_on_from_the_checkpoint_before_one_with_wrong_moments(
    cache: TrainingCache, run: Path
) -> None:
    newest, *_ = run_checkpoints(run)
    change(newest, TRAINING, f"optimizer.exp_avg.{BIAS}", lambda t: t[:1])
    assert Trainer(recipe(steps=9, **OFTEN), cache, run, resume=True).step == 2


def test_averages_of_another_precision_go_on(cache: TrainingCache, run: Path) -> None:
    newest, *_ = run_checkpoints(run)
    change(newest, "model.safetensors", BIAS, torch.Tensor.half)
    trainer = Trainer(recipe(steps=4, **OFTEN), cache, run, resume=True)
    trainer.run()
    assert trainer.average[BIAS].dtype == torch.float32


STATES: dict[str, list[object]] = {
    "step": [-1, 10**8, 10**30, 2, 1e400, [3], None],
    "minutes": [-1, 1e400, "x"],
    "skipped": [-1, 10**20],
    "pitch_steps": [-5, 10**20],
    "best": [1e400, "x"],
    "best_name": ["../step-00000001", "step-1", "/step-00000003", "step-00000003\n", 3],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field in STATES for value in STATES[field]]
)
def test_a_state_that_cannot_be_is_one_error(
    fresh: Trainer, run: Path, field: str, value: object
) -> None:
    newest, *_ = run_checkpoints(run)
    state = json.loads((newest / STATE).read_text()) | {field: value}
    (newest / STATE).write_text(json.dumps(state))
    rehash(newest, STATE)
    folder = RunFolder(run, fresh.recipe, fresh.cache)
    with pytest.raises(CheckpointError, match=STATE) as caught:
        folder.read(newest.name)
    assert "\n" not in str(caught.value)


HEAD = 'mel = "hifigan"\n[model]\ntype = "frameglow"\n'
RECIPES = {
    "a dilation of 0": HEAD + "dilations = [0]",
    "a negative dilation": HEAD + "dilations = [1, -2]",
    "a giant dilation": HEAD + "dilations = [1000000000]",
    "very many dilations": HEAD + f"dilations = [{'1,' * 5000}]",
    "doubled too often": HEAD.replace("frameglow", "waveglow") + "n_layers = 64",
    "a nested list": HEAD + f"dilations = {'[' * 2000}{']' * 2000}",
    "a nested table": HEAD + f"[a{'.a' * 3000}]",
    "nested in line": HEAD + f"x = {'{a = ' * 900}1{'}' * 900}",
    "a giant number": HEAD + "n_flows = 1" + "0" * 5000,
    **{
        f"{field} {value}": HEAD + f"[train]\n{field} = {value}"
        for field, values in {
            "steps": (-1, 0, 10**9),
            "seed": (-1, 2**40, 10**300),
            "threads": (0, -4, 10**9),
            "batch_size": (-1, 10**9),
            "segment_frames": (-8, 10**12),
            "warmup_steps": (0, "1" + "0" * 400),
            "checkpoint_every": (-5, 10**300),
            "learning_rate": (-1.0, "inf", "nan"),
            "clip_norm": (-1.0, "nan"),
            "gain_range": ("[-1.0, 1.0]", "[1.0, inf]"),
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_cannot_be_is_one_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPES[name])
    with pytest.raises(ConfigError, match=r"recipe\.toml") as caught:
        read_recipe(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_record_that_is_nested_too_deeply(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    for text in ("[" * 100_000, '{"a":' * 950 + "1" + "}" * 950):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"recipe\.json"):
            read_recipe(path)


# --- stopped in a validation, and what is shown meanwhile ---


def test_a_validation_can_be_stopped_and_is_made_up_for(
    cache: TrainingCache, tmp_path: Path
) -> None:
    settings = recipe(steps=3, **(OFTEN | {"validate_every": 2, "checkpoint_every": 100}))
    whole = Trainer(settings, cache, tmp_path / "whole")
    whole.run()
    seen: list[tuple[int, int]] = []
    trainer = Trainer(settings, cache, tmp_path / "run")

    def clip(done: int, total: int) -> None:
        assert names(tmp_path / "run") == [f"step-{trainer.step:08d}"], "saved before"
        seen.append((done, total))

    trainer.run(stop=lambda: len(seen) == 2, report_clip=clip)
    assert seen == [(0, 2), (1, 2)] and (trainer.step, trainer.best) == (2, None)
    resumed = Trainer(settings, cache, tmp_path / "run", resume=True)
    steps: list[int] = []
    resumed.run(
        report=lambda progress: steps.append(progress.step),
        report_clip=lambda done, total: steps.append(-done),
    )
    assert steps == [0, -1, 3, 0, -1]
    assert (resumed.best, resumed.best_name) == (whole.best, whole.best_name)
    assert_same(tensors_of(resumed), tensors_of(whole))
    assert not Trainer(settings, cache, tmp_path / "run", resume=True)._misses_validation()


REPORT = Progress(323, {"pitch_loss": 1.25}, 41.2, 61.5, "minutes", "pitch head", 323, 3000)


@pytest.mark.parametrize(
    ("report", "where", "values"),
    [
        (
            REPORT,
            "pitch head, step 323 of 3000",
            "pitch loss 1.250, 41.2 s of audio a second, 1 h 2 min to --max-minutes 90",
        ),
        (
            REPORT._replace(
                step=3400,
                values={"log_likelihood": 4.5},
                minutes_left=0.2,
                limit="steps",
                phase="",
                phase_step=3400,
                phase_steps=200000,
            ),
            "step 3400 of 200000",
            "log p 4.500, 41.2 s of audio a second, 1 min to the last step",
        ),
        (
            REPORT._replace(minutes_left=0.2, limit="steps"),
            "pitch head, step 323 of 3000",
            "pitch loss 1.250, 41.2 s of audio a second, 1 min to the end of this phase",
        ),
    ],
)
def test_the_words_of_a_report(report: Progress, where: str, values: str) -> None:
    assert train_verb._where(report) == where
    assert train_verb._values(report, 90) == values


def test_a_log_without_a_terminal_has_a_line_now_and_then(
    cache: TrainingCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    path = tmp_path / "recipe.json"
    settings = recipe(steps=4, energy_weight=0.0, calibration_weight=0.0, validate_every=50)
    path.write_text(settings.model_dump_json())
    data = ["--data", str(cache.folder)]
    assert main(["train", str(path), *data, "-o", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().err.splitlines()
    shown = [line.split(",")[0] for line in lines if "of audio a second" in line]
    assert shown == ["waveflow: pitch head", "waveflow: step 4 of 4"]


def test_the_bar_shows_phase_and_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.progress import Progress as Bar

    shown: list[dict[str, object]] = []
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(Bar, "update", lambda self, task, **fields: shown.append(fields))
    with train_verb._training_bar(90, visible=True) as (show_step, show_clip):
        show_step(REPORT)
        show_clip(2, 6)
    assert shown[0]["description"] == "pitch head, step 323 of 3000"
    assert 0 <= shown[0]["completed"] < 0.01
    assert shown[1]["description"] == "validating 3/6"
