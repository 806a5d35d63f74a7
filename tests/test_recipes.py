"""Every recipe file: it is read, builds its model, is described, and takes a step."""

import math
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from waveflow.data.cache import TrainingCache
from waveflow.data.prepare import prepare
from waveflow.models.registry import build_flow
from waveflow.models.waveglow import WaveGlowConfig
from waveflow.training.config import Recipe, read_recipe
from waveflow.training.trainer import Trainer

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
    """One item as short as it may be; no more than one step for the pitch head."""
    train = recipe.train.model_copy(
        update={
            "batch_size": 1,
            "segment_frames": 16,
            "accumulate": 1,
            "pitch_steps": min(1, recipe.train.pitch_steps),
        }
    )
    return recipe.model_copy(update={"train": train})


@pytest.mark.parametrize("path", LJSPEECH, ids=name)
def test_the_readme_lists_the_recipe_and_its_parameters(path: Path) -> None:
    lines = (RECIPES / "ljspeech" / "README.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith(f"| `{path.name}` |")]
    assert rows and f"| {parameters(read_recipe(path)) / 1e6:.1f} M |" in rows[0]


@pytest.mark.parametrize("path", [path for path in FILES if path != LARGE], ids=name)
def test_the_recipe_takes_a_step(path: Path, corpus: Path, tmp_path: Path) -> None:
    recipe = small(read_recipe(path))
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
