"""Reading recipes; and every recipe file: it builds its model, is described, takes a step."""

import math
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from waveflow.audio.mel import MEL_PRESETS
from waveflow.checkpoint import ModelConfig, save_checkpoint
from waveflow.data.cache import TrainingCache
from waveflow.data.prepare import prepare
from waveflow.errors import ConfigError
from waveflow.models.registry import build_flow
from waveflow.models.waveglow import WaveGlowConfig
from waveflow.training.config import Recipe, TrainConfig, read_recipe
from waveflow.training.loop import Trainer
from waveflow.training.optimizer import learning_rate

RECIPES = Path(__file__).parent.parent / "recipes"
FILES = sorted(RECIPES.rglob("*.toml"))
LJSPEECH = sorted((RECIPES / "ljspeech").glob("*.toml"))
# 88 M weights take seconds for each step; WaveGlow's other recipes run the same code.
LARGE = RECIPES / "ljspeech" / "waveglow.toml"


def name(path: Path) -> str:
    return str(path.relative_to(RECIPES))


@pytest.fixture(scope="module")
def smoke() -> dict[str, Any]:
    """The names in the smoke recipe's script, which does not run."""
    return runpy.run_path(str(RECIPES / "smoke" / "run.py"))


@pytest.fixture(scope="module")
def corpus(smoke: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes") / "corpus"
    smoke["make_corpus"](folder)
    return folder


def parameters(recipe: Recipe) -> int:
    """Of its model, whose weights are not made where they would be many."""
    waveglow = isinstance(recipe.model, WaveGlowConfig)
    with torch.device("meta" if waveglow else "cpu"):
        flow = build_flow(recipe.model, recipe.mel)
    return sum(p.numel() for p in flow.parameters())


def small(recipe: Recipe) -> Recipe:
    """One short item, at most one step for the pitch head, and float32: some CPUs emulate bf16."""
    train = recipe.train.model_copy(
        update={
            "batch_size": 1,
            "segment_frames": 8,
            "accumulate": 1,
            "pitch_steps": min(1, recipe.train.pitch_steps),
            "likelihood_steps": 0,
            "precision": "float32",
            "recompute": False,
        }
    )
    return recipe.model_copy(update={"train": train})


def taught(recipe: Recipe, folder: Path) -> Recipe:
    """With a new model for its teacher, of the recipe that has the teacher's name."""
    other = read_recipe(RECIPES / "zoo" / f"{Path(recipe.train.teacher).name}.toml")
    config = ModelConfig(model=other.model, mel=other.mel)
    save_checkpoint(folder, config, build_flow(other.model, other.mel).state_dict())
    train = recipe.train.model_copy(update={"teacher": str(folder)})
    return recipe.model_copy(update={"train": train})


# --- reading a recipe ---


def test_the_shipped_models_recipe() -> None:
    read = read_recipe(RECIPES / "ljspeech" / "frameglow.toml")
    assert read.mel == MEL_PRESETS["hifigan"]
    assert min(read.train.energy_weight, read.train.calibration_weight) > 0
    assert read.train.likelihood_steps > 0


RECIPE = 'mel = "hifigan"\n[model]\ntype = "frameglow"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RECIPE + "n_flow = 3", r"model\.n_flow: Extra inputs .* \(got 3\)"),
        (RECIPE + "[train]\nrecompute = 2", r"train\.recompute.* \(got 2\)"),
        (RECIPE + "[train]\nrecompute = true\nreversible = true", r"train\.reversible: Extra"),
        (RECIPE + "[train]\nlr = 1", r"train\.lr: Extra inputs"),
        (
            RECIPE + "[train]\nlikelihood_steps = 5",
            r"likelihood_steps 5: all steps train by likelihood alone; leave it out, or give ",
        ),
        (
            RECIPE + "[train]\nlikelihood_steps = 5\nlikelihood_weight = 0\nenergy_weight = 1",
            r"likelihood_steps 5: likelihood_weight is 0",
        ),
        (RECIPE + "[train]\nsteps = 0", r"train\.steps: .* greater than 0 \(got 0\)"),
        (RECIPE + "[train]\nlearning_rate = nan", r"train\.learning_rate"),
        (RECIPE + '[train]\nprecision = "int8"', r"train\.precision"),
        (RECIPE + "[train]\ngain_range = [1]", r"train\.gain_range"),
        ('mel = "griffin"\n[model]\ntype = "frameglow"', "there are nvidia, hifigan"),
        (
            'mel = "hifigan"\n[model]\ntype = "os.system"',
            "model.type 'os.system' is .*there are .*frameglow",
        ),
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


@pytest.mark.parametrize(
    ("older", "meaning"),
    [("true", True), ("false", False), ('"auto"', "auto"), ('"checked"', True)],
)
def test_recipes_of_older_versions_call_it_reversible(
    tmp_path: Path, older: str, meaning: bool | str
) -> None:
    """So do the recipes in their runs, which are resumed."""
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE + f"[train]\nreversible = {older}")
    read = read_recipe(path)
    assert read.train.recompute == meaning
    assert "reversible" not in read.model_dump_json()


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
    rates = [learning_rate(config, step, 1000 - step, 0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.2)
    assert np.argmax(rates) == 9
    assert rates[4] == pytest.approx(2.0 * 5 / 10 / math.sqrt(1.04))
    assert rates[300] == pytest.approx(1.0)  # 1 / sqrt(1 + 3)
    assert (np.diff(rates[10:]) < 0).all()
    # The last steps go down to zero, and those before are as they were.
    ended = [learning_rate(config, step, 1000 - step, 50) for step in range(1001)]
    assert ended[:950] == rates[:950]
    assert ended[975] == pytest.approx(rates[975] / 2)
    assert ended[1000] == 0


def test_a_damaged_json_recipe_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ConfigError, match=r"recipe\.json is not JSON"):
        read_recipe(tmp_path / "recipe.json")


# --- the recipe files ---


@pytest.mark.parametrize("path", LJSPEECH, ids=name)
def test_the_readme_lists_the_recipe_and_its_parameters(path: Path) -> None:
    lines = (RECIPES / "ljspeech" / "README.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith(f"| `{path.name}` |")]
    assert rows and f"| {parameters(read_recipe(path)) / 1e6:.1f} M |" in rows[0]


@pytest.mark.parametrize("path", [path for path in FILES if path != LARGE], ids=name)
def test_the_recipe_takes_a_step(path: Path, corpus: Path, tmp_path: Path) -> None:
    recipe = small(read_recipe(path))
    if recipe.train.teacher:
        recipe = taught(recipe, tmp_path / "teacher")
    prepare([corpus], tmp_path / "cache", recipe.mel, workers=1)
    trainer = Trainer(recipe, TrainingCache(tmp_path / "cache"), tmp_path / "run")
    for step in range(1 + recipe.train.pitch_steps):
        before = {key: p.detach().clone() for key, p in trainer.flow.named_parameters()}
        values = trainer._train_step()
        trainer.step += 1
        moved = {
            key for key, p in trainer.flow.named_parameters() if not torch.equal(p, before[key])
        }
        assert values and all(math.isfinite(value) for value in values.values())
        in_pitch = step < recipe.train.pitch_steps
        assert moved and in_pitch == all(key.startswith("conditioner.pitch.") for key in moved)
    assert ("energy" in values) == (recipe.train.energy_weight > 0)
    assert ("calibration" in values) == (recipe.train.calibration_weight > 0)


def test_the_smoke_recipe_trains_both_families(smoke: dict[str, Any]) -> None:
    files = (RECIPES / "smoke").glob("*.toml")
    assert {read_recipe(path).model.type for path in files} == {"frameglow", "waveglow"}


@pytest.mark.parametrize("fault", ["missing", "silent", "short", "other rate"])
def test_the_smoke_recipe_fails_loudly(smoke: dict[str, Any], tmp_path: Path, fault: str) -> None:
    rate, hop, audio = 8000, 100, np.full(8000, 0.1) * np.sin(np.arange(8000))
    for number in range(smoke["N_CLIPS"]):
        soundfile.write(tmp_path / f"{number}.wav", audio, rate)
    smoke["expect_speech"](tmp_path, rate, hop)
    last = tmp_path / f"{smoke['N_CLIPS'] - 1}.wav"
    if fault == "missing":
        last.unlink()
    elif fault == "silent":
        soundfile.write(last, 0 * audio, rate)
    elif fault == "short":
        soundfile.write(last, audio[:-hop], rate)
    else:
        soundfile.write(last, audio, 2 * rate)
    with pytest.raises(SystemExit, match="smoke: "):
        smoke["expect_speech"](tmp_path, rate, hop)


def test_the_smoke_recipe_stops_at_a_command_that_fails(smoke: dict[str, Any]) -> None:
    with pytest.raises(SystemExit, match="smoke: waveflow info failed"):
        smoke["command"]("info", "no-such-model")


@pytest.mark.parametrize(
    "command",
    [
        "listen.py nowhere.wav",
        "pictures.py picture.png nowhere.wav",
        "ship.py nowhere name nowhere.wav --licence CC0-1.0",
        "naturalness.py nowhere",
        "tts/intelligibility.py nowhere",
    ],
)
def test_a_script_says_in_one_line_what_is_not_there(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A copy of the checkout, because scripts write into theirs.
    shutil.copytree(RECIPES, tmp_path / "recipes")
    page = tmp_path / "docs" / "listen" / "index.html"
    page.parent.mkdir(parents=True)
    page.touch()
    before = sorted(tmp_path.rglob("*"))
    script, *arguments = command.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "recipes"))
    monkeypatch.setattr("sys.argv", [script, *arguments])
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(tmp_path / "recipes" / script), run_name="__main__")
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"{Path(script).name}: ") and "nowhere" in last
    assert sorted(tmp_path.rglob("*")) == before
