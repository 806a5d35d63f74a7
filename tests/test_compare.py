"""`waveflow compare`: rows, intervals, references, and the whole command on tiny models."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import MEL, RATE, WAVEGLOW, write_cache

from waveflow import pretrained
from waveflow.cli import compare as verb
from waveflow.cli.main import main
from waveflow.data.cache import TrainingCache
from waveflow.engine.cost import macs_per_second
from waveflow.errors import DivergedError
from waveflow.models.nice import NICEConfig
from waveflow.models.registry import model_types
from waveflow.training import compare
from waveflow.training.compare import Goal, Job, Result, for_comparison, measure
from waveflow.training.compare_table import Row, estimate, text_table, training_curve, write_picture
from waveflow.training.config import Recipe, TrainConfig, read_recipe

Run = Callable[..., tuple[int, str, str]]

RECIPE = """
[mel]
sample_rate = 8000
n_fft = 256
hop_length = 64
win_length = 256
n_mels = 20
f_max = 4000.0
[model]
type = "nice"
squeeze_factor = 4
n_flows = 2
hidden_channels = 4
n_features = 4
[train]
batch_size = 2
segment_frames = 8
warmup_steps = 2
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TrainingCache:
    folder = tmp_path_factory.mktemp("caches") / "tiny"
    return write_cache(folder, ["train", "train", "val", "val", "val"])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["compare", *map(str, args)])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Measures in this process, which is faster than another one; lists the jobs."""
    done = []

    def measured(job: Job, title: str) -> tuple[Result | None, str, bool]:
        done.append(job.name)
        received: list[Any] = []
        sender: Any = type("Sender", (), {"send": received.append})
        before = signal.getsignal(signal.SIGINT)
        verb._measure(job, title, sender, False)
        signal.signal(signal.SIGINT, before)
        return received[0]

    monkeypatch.setattr(verb, "_in_own_process", measured)
    return done


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed and multiply-adds are measured elsewhere."""
    monkeypatch.setattr(compare, "TIMED_SECONDS", 1e-9)
    monkeypatch.setattr(compare, "macs_per_second", lambda vocoder: 2.5e9)


def job(cache: TrainingCache, out: Path, goal: Goal, **train: Any) -> Job:
    model = NICEConfig(squeeze_factor=4, n_flows=2, hidden_channels=4, n_features=4)
    settings = TrainConfig(batch_size=2, segment_frames=8, warmup_steps=2, **train)
    shared = for_comparison(Recipe(model=model, mel=MEL, train=settings), goal, seed=3)
    return Job("small", shared, goal, cache.folder, out, "cpu")


# --- figures ---


def row(name: str, log_probs: list[float], **fields: Any) -> Row:
    sizes = tuple(100 for _ in log_probs)
    return Row(
        name, Result(name=name, n_samples=sizes, log_probs=log_probs, parameters=7, **fields)
    )


def test_the_paired_interval_is_that_of_the_differences() -> None:
    one, other = row("one", [100.0, 300.0, 500.0]), row("other", [130.0, 340.0, 520.0])
    assert one.result is not None and other.result is not None
    # Differences of 0.3, 0.4, 0.2: mean 0.3, deviation 0.1, t of 2 degrees 4.303 (tables).
    mean, interval = estimate(other.result, one.result)
    assert mean == pytest.approx(0.3)
    assert interval == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=0.05)
    # The means alone do not tell the two apart: 1, 3, 5 have a deviation of 2.
    mean, interval = estimate(one.result)
    assert (mean, interval) == pytest.approx((3.0, 4.303 * 2 / math.sqrt(3)), rel=0.05)


def test_pieces_of_other_lengths_weigh_by_their_samples() -> None:
    result = Result(name="x", n_samples=(100, 300), log_probs=(100.0, 900.0), parameters=1)
    assert estimate(result).mean == pytest.approx(2.5)
    alone = Result(name="x", n_samples=(10,), log_probs=(5.0,), parameters=1)
    assert estimate(alone) == (0.5, None)
    assert str(estimate(alone)) == "0.500"


@pytest.mark.parametrize(
    ("first", "other", "mark"),
    [(False, True, "≥ "), (True, False, "≤ "), (True, True, "≈ "), (False, False, "")],
)
def test_bounds_are_marked(first: bool, other: bool, mark: str) -> None:
    rows = [
        row("a", [1.0, 2.0], is_bound=first),
        row("b", [2.0, 4.0], is_bound=other, draw_log_likelihood=1.0),
    ]
    cells = dict(zip(*(text_table(rows)[i] for i in (0, 2)), strict=True))
    assert cells["above a"].startswith(f"{mark}0.015")
    bound = "≥ " if other else ""
    assert cells["log-likelihood"].startswith(f"{bound}0.030")
    assert cells["own draws"] == f"{bound}1.000"


def test_a_first_row_that_failed_leaves_the_others_without_difference() -> None:
    _, failed, good = text_table([Row("a", None, "it diverged"), row("b", [1.0, 2.0])])
    assert failed == ["a", "-", "-", "failed", *["-"] * 6]
    assert good[1] == "7"
    assert good[3].startswith("0.015") and good[4] == "-"


def test_the_references_are_the_best_of_their_kind(cache: TrainingCache) -> None:
    recipe = Recipe(model=NICEConfig(squeeze_factor=4), mel=MEL)
    gaussian, _ = compare.references(cache, recipe)
    x = np.concatenate([cache.audio(clip) / 32768 for clip in cache.clips("train")])
    variance = np.mean(x**2)
    held = [audio.numpy() for audio, _ in compare.held_speech(cache, compare.MelSpectrogram(MEL))]
    assert gaussian.n_samples == tuple(map(len, held))
    expected = [-0.5 * np.sum(y**2 / variance + np.log(2 * np.pi * variance)) for y in held]
    # The reference knows of the dequantising noise too.
    assert gaussian.log_probs == pytest.approx(expected, rel=1e-4)
    # Of the clips that they are made of, no other weights and no other variance make more.
    own = [(torch.from_numpy(x).float(), torch.zeros(1))]
    plain, prediction = (compare.linear_prediction("", cache, own, order) for order in (0, 2))
    design = np.stack([np.concatenate([np.zeros(k), x[:-k]]) for k in (1, 2)], 1)
    squares = np.linalg.lstsq(design, x, rcond=None)[1][0]
    best = -0.5 * (1 + math.log(2 * math.pi * squares / len(x)))
    assert estimate(prediction).mean == pytest.approx(best, abs=0.02)
    assert estimate(plain).mean < best - 0.5


def test_held_speech_is_the_middle_of_clips_spread_over_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = write_cache(tmp_path / "cache", ["train"] + ["val"] * 5)
    monkeypatch.setattr(compare, "HELD_CLIPS", 3)
    monkeypatch.setattr(compare, "HELD_SECONDS", 10 * 64 / RATE)
    held = list(compare.held_speech(cache, compare.MelSpectrogram(MEL)))
    assert len(held) == 3
    for (audio, mel), clip in zip(held, cache.clips("val")[::2], strict=True):
        first = (clip.frames - 10) // 2
        whole = cache.audio(clip) / 32768
        assert mel.shape == (20, 10) and audio.shape == (640,)
        part = whole[first * 64 : (first + 10) * 64]
        assert np.abs(audio.numpy() - part).max() <= 0.5 / 32768 + 1e-7


# --- a model's run ---


def test_a_run_ends_at_its_goal_without_a_validation(cache: TrainingCache, tmp_path: Path) -> None:
    result = measure(job(cache, tmp_path / "run", Goal(steps=3)))
    assert result is not None
    assert (result.steps, len(result.log_probs)) == (3, 3)
    assert result.macs_per_second and result.samples_per_second and result.audio_per_second
    assert result.peak_bytes is None or 0 < result.peak_bytes < 1e9
    assert "validation" not in (tmp_path / "run" / "metrics.csv").read_text()
    assert (
        json.loads((tmp_path / "run" / "checkpoints.json").read_text())["last"] == "step-00000003"
    )
    # The log-likelihoods are those of the weights that were saved.
    vocoder = compare.load(tmp_path / "run")
    held = list(compare.held_speech(cache, vocoder.mel_spectrogram))
    with torch.no_grad():
        own = [vocoder.flow(a[None], m[None]).item() for a, m in held]
    found = np.array(result.log_probs) / np.array(result.n_samples)
    assert found == pytest.approx(own, rel=1e-5)


def test_multiply_adds_of_a_network_with_weight_norm_are_counted(
    cache: TrainingCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "macs_per_second", macs_per_second)
    work = job(cache, tmp_path / "run", Goal(steps=1))
    work = work._replace(recipe=work.recipe.model_copy(update={"model": WAVEGLOW}))
    result = measure(work)
    assert result is not None and result.macs_per_second is not None
    assert result.macs_per_second > result.parameters


def test_a_run_stops_when_asked_and_goes_on(cache: TrainingCache, tmp_path: Path) -> None:
    whole = measure(job(cache, tmp_path / "whole", Goal(steps=3)))
    steps: list[int] = []
    work = job(cache, tmp_path / "parts", Goal(steps=3))
    assert measure(work, lambda p: steps.append(p.step), lambda: len(steps) == 2) is None
    parts = measure(work, lambda p: steps.append(p.step))
    assert steps == [1, 2, 3]
    assert whole is not None and parts is not None
    assert parts.log_probs == whole.log_probs


def test_minutes_are_those_of_all_calls(cache: TrainingCache, tmp_path: Path) -> None:
    goal = Goal(minutes=1e-9)
    first = measure(job(cache, tmp_path / "run", goal))
    assert first is not None and first.steps == 1
    with pytest.raises(compare.ConfigError, match="more than asked for"):
        compare._check_not_beyond(
            type("T", (), {"minutes": 2.0, "step": 500}),  # type: ignore[arg-type]
            job(cache, tmp_path / "run", Goal(minutes=1.0)),
        )


def test_the_curve_averages_steps_and_knows_terms_of_a_bound(tmp_path: Path) -> None:
    lines = ["kind,step,minutes,name,value"]
    for step in (20, 40, 20, 40):  # resumed before the last checkpoint
        lines += [
            f"train,{step},{step / 60},{name},{value}"
            for name, value in (
                ("reconstruction", -3.0),
                ("kl", step / 20),
                ("learning_rate", 1e-3),
                ("skipped", 0),
            )
        ]
    lines.append("validation,40,1,log_likelihood,9")
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    seconds, values = training_curve(tmp_path)
    assert seconds == pytest.approx([20, 40]) and values == pytest.approx([2, 1])
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("train,6")  # a process was killed
    assert training_curve(tmp_path)[1] == pytest.approx([2, 1])
    assert [len(part) for part in training_curve(tmp_path / "none")] == [0, 0]
    write_picture(tmp_path / "x.png", {"a": tmp_path, "b": tmp_path / "none"}, "a machine")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


# --- the command ---


def test_a_table_is_printed_saved_resumed_and_skipped(
    run: Run, here: list[str], cache: TrainingCache, recipe: Path, tmp_path: Path
) -> None:
    wide = tmp_path / "wide.toml"
    wide.write_text(RECIPE.replace("hidden_channels = 4", "hidden_channels = 6"))
    out = tmp_path / "out"
    args = ("--recipes", recipe, "--recipes", wide, "--data", cache.folder, "-o", out)
    status, text, err = run(*args, "--steps", "2")
    assert status == 0
    told = [f"waveflow: {n}: {p}, step {k}," for n in ("small, 1 of 2", "wide, 2 of 2")
            for p, k in (("50%", 1), ("100%", 2))]  # fmt: skip
    assert [line[: len(t)] for line, t in zip(err.splitlines(), told, strict=True)] == told
    assert here == ["small", "wide"]
    lines = text.splitlines()
    assert "torch" in lines[0] and lines[1].split()[0] == "model"
    assert [line.split()[0] for line in lines[2:6]] == ["small", "wide", "Gaussian", "linear"]
    assert "2 steps of each model" in text and "3 validation clips" in text
    assert "not trained enough to say much: small, wide." in text
    saved = (out / "compare.csv").read_text().splitlines()
    assert saved[0] == f"# {lines[0]}"
    rows = list(csv.DictReader(saved[1:]))
    assert [r["steps"] for r in rows] == ["2", "2", "", ""]
    assert rows[0]["difference"] == "" and float(rows[1]["difference_interval"]) > 0
    assert float(rows[2]["log_likelihood"]) == pytest.approx(float(lines[4].split()[6]), abs=1e-3)
    markdown = (out / "compare.md").read_text().splitlines()
    assert markdown[0] == lines[0] and markdown[4].startswith("| small | ")
    assert (out / "compare.png").is_file()

    # All is done already; then one of them is not, and then more is asked for.
    assert run(*args, "--steps", "2") == (0, text, "")
    (out / "wide" / "comparison.json").unlink()
    assert run(*args, "--steps", "2")[0] == 0
    assert here == ["small", "wide", "wide"]
    assert run(*args, "--seconds", 3 * 2 * 8 * 64 / RATE)[0] == 0
    assert here[3:] == ["small", "wide"]
    rows = list(csv.DictReader((out / "compare.csv").read_text().splitlines()[1:]))
    assert [r["steps"] for r in rows] == ["3", "3", "", ""]
    status, _, err = run(*args, "--steps", "1")
    assert status == 2 and err.count("more than asked for") == 2
    # Another seed is another run.
    status, _, err = run(*args, "--steps", "3", "--seed", "1")
    assert status == 2 and "resume with the recipe of the run" in err


def test_a_model_that_fails_has_a_row_and_the_others_go_on(
    run: Run,
    here: list[str],
    cache: TrainingCache,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad, odd = tmp_path / "bad.toml", tmp_path / "odd.toml"
    for path in (bad, odd):
        path.write_text(RECIPE)
    plain = compare._scored

    def scored(job: Job, cache: TrainingCache) -> Result:
        if job.name == "bad":
            raise DivergedError("it has\ndiverged")
        if job.name == "odd":
            raise ZeroDivisionError("a fault")
        return plain(job, cache)

    monkeypatch.setattr(compare, "_scored", scored)
    args = ("--recipes", bad, "--recipes", recipe, "--data", cache.folder, "--steps", 1)
    status, text, err = run(*args, "-o", tmp_path / "out")
    assert status == 2 and "\nwaveflow: bad: it has diverged\n" in err
    assert "bad failed: it has diverged" in text
    lines = text.splitlines()
    assert lines[2].split()[:4] == ["bad", "-", "-", "failed"]
    assert lines[3].split()[0] == "small"
    rows = list(csv.DictReader((tmp_path / "out" / "compare.csv").read_text().splitlines()[1:]))
    assert [r["status"] for r in rows] == ["it has diverged", "done", "done", "done"]
    # The next call tries it again, and a fault of ours is called one.
    status, _, err = run(*args, "--recipes", odd, "-o", tmp_path / "out")
    assert here == ["bad", "small", "bad", "odd"]
    assert status == 1 and "odd: internal error (ZeroDivisionError)" in err


@pytest.mark.parametrize("name", ["comparison.json", "metrics.csv"])
def test_a_pipe_in_the_folder_of_a_run_is_not_read(
    run: Run, here: list[str], cache: TrainingCache, recipe: Path, tmp_path: Path, name: str
) -> None:
    """It would wait for a writer for ever."""
    args = ("--recipes", recipe, "--data", cache.folder, "--steps", 1, "-o", tmp_path / "out")
    assert run(*args)[0] == 0
    member = tmp_path / "out" / "small" / name
    member.unlink()
    os.mkfifo(member)
    assert run(*args)[0] == 0
    assert here == (["small", "small"] if name == "comparison.json" else ["small"])


@pytest.mark.slow
def test_each_model_has_a_process_of_its_own_that_may_die(
    run: Run, cache: TrainingCache, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("--recipes", recipe, "--data", cache.folder, "--steps", 1, "-o")
    status, text, err = run(*args, tmp_path / "out")
    assert status == 0 and err == ""
    assert text.splitlines()[2].split()[0] == "small"
    monkeypatch.setattr(verb, "_measure", _dies)
    status, text, err = run(*args, tmp_path / "other")
    assert status == 1 and "its process died (exit status 3)" in err


@pytest.mark.slow
def test_sigterm_saves_the_run_and_ends_its_process(
    cache: TrainingCache, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    args = ["--recipes", recipe, "--data", cache.folder, "--minutes", 60, "-o", out]
    command = [sys.executable, "-m", "waveflow", "compare", *map(str, args)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (out / "small" / "metrics.csv").is_file():  # the run has begun
        assert process.poll() is None
        time.sleep(0.2)
    process.terminate()
    # Its pipe ends when no process of it is left.
    assert process.communicate()[1] == "waveflow: interrupted\n"
    assert process.returncode == 130
    assert (out / "small" / "checkpoints.json").is_file()
    assert not (out / "small" / "comparison.json").exists()


def _dies(*_: Any) -> None:
    os._exit(3)


def test_every_model_of_the_zoo_has_a_recipe_on_the_same_segments() -> None:
    zoo = Path(pretrained.__file__).parent.parent / "recipes" / "zoo"
    settings = {path.stem: read_recipe(path) for path in sorted(zoo.glob("*.toml"))}
    verb._check_alike(settings)
    for name, settled in settings.items():
        assert settled.model.type == name or name not in model_types()


def test_names_work_from_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "waveflow" / "recipes" / "zoo"
    inside.mkdir(parents=True)
    (inside / "glow.toml").write_text("")
    monkeypatch.setattr(pretrained, "__file__", str(tmp_path / "waveflow" / "pretrained.py"))
    assert pretrained.zoo_recipe("glow") == inside / "glow.toml"
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '"recipes/zoo" = "waveflow/recipes/zoo"' in text


def test_odd_input_is_one_line(
    run: Run, cache: TrainingCache, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    data = ("--data", cache.folder, "-o", out)

    def refused(*args: Any) -> str:
        status, text, err = run(*args)
        assert status == 2 and text == "" and err.count("\n") == 1
        assert not out.exists()
        return err

    assert "no model 'klatt' in the zoo: there are" in refused("klatt", "--minutes", 1, *data)
    assert "two models are named 'nice'" in refused("nice", "nice", "--minutes", 1, *data)
    named = ("small", "--recipes", recipe)
    assert "no model 'small'" in refused(*named, "--minutes", 1, *data)
    twice = ("--recipes", recipe, "--recipes", recipe)
    assert "two models are named 'small'" in refused(*twice, "--minutes", 1, *data)
    assert "nothing to compare" in refused("--minutes", 1, *data)
    assert "how long" in refused("nice", *data)
    assert "how long" in refused("nice", "--minutes", 1, "--steps", 2, *data)
    for amount in (("--minutes", 0), ("--minutes", "nan"), ("--steps", -1), ("--seconds", "inf")):
        assert f"{amount[0]} {amount[1]}" in refused("nice", *amount, *data)
    assert "--steps 1e+09" in refused("nice", "--steps", 10**9, *data)
    assert "no training data" in refused("nice", "--minutes", 1, "-o", out)
    assert "no such folder" in refused("nice", "--minutes", 1, "--data", tmp_path / "no", "-o", out)
    assert "sample rate" in refused("nice", "--minutes", 1, *data)
    assert "mel of small is not that of nice" in refused(
        "nice", "--recipes", recipe, "--minutes", 1, *data
    )
    longer = tmp_path / "longer.toml"
    longer.write_text(RECIPE.replace("segment_frames = 8", "segment_frames = 16"))
    both = ("--recipes", recipe, "--recipes", longer)
    assert "segment_frames of longer is 16" in refused(*both, "--minutes", 1, *data)
    assert "toaster" in refused("nice", "--minutes", 1, *data, "--device", "toaster")
    assert "--seed" in refused("nice", "--minutes", 1, *data, "--seed", "-1")
    empty = write_cache(tmp_path / "no-val", ["train"])
    args = ("--recipes", recipe, "--minutes", 1, "--data", empty.folder, "-o", out)
    assert "no validation clips" in refused(*args)
