"""Runs that are killed, stopped or damaged, and disks that are full."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import largest_file
from tiny_training import assert_same, copied, recipe, tensors_of, write_cache

from waveflow.checkpoint import (
    CONFIG,
    FORMAT,
    MANIFEST,
    RUN_POINTER,
    WEIGHTS,
    load_checkpoint,
    manifest_bytes,
    read_files,
    resolve_run,
    run_checkpoints,
)
from waveflow.cli.main import main
from waveflow.data.cache import MANIFEST_FILE, TrainingCache, file_sha256
from waveflow.errors import CheckpointError, ConfigError
from waveflow.files import atomic_path
from waveflow.training import loop, run_folder
from waveflow.training.loop import Progress, Trainer
from waveflow.training.run_folder import TRAINING

ROOT = Path(__file__).parent.parent

# Saves at every step; validates at steps 4 and 6.
QUICK = {"energy_weight": 0.0, "calibration_weight": 0.0, "validate_every": 4}
RECIPE = recipe(steps=6, checkpoint_every=1, **QUICK)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TrainingCache:
    return write_cache(tmp_path_factory.mktemp("caches") / "tiny", ["train", "train", "val"])


@pytest.fixture(scope="module")
def finished(cache: TrainingCache, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A whole run; do not change it."""
    trainer = Trainer(RECIPE, cache, tmp_path_factory.mktemp("runs") / "x")
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def stopped(cache: TrainingCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    trainer = Trainer(RECIPE, cache, tmp_path_factory.mktemp("runs") / "stopped")
    trainer.run(stop=lambda: trainer.step == 5)
    return trainer.folder.path


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """A run that was stopped at step 5, with the checkpoints of steps 4 (the best) and 5."""
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    assert [path.name for path in run_checkpoints(run)] == ["step-00000005", "step-00000004"]
    return run


# --- damaged checkpoints ---


def truncate(checkpoint: Path) -> None:
    with open(checkpoint / TRAINING, "r+b") as file:
        file.truncate(1000)


def corrupt(checkpoint: Path) -> None:
    with open(checkpoint / WEIGHTS, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / CONFIG).unlink()


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()


def make_newer(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps(manifest | {"format": FORMAT + 1}))


def give_another_config(checkpoint: Path) -> None:
    """Of a larger model, in a checkpoint whose hashes are right."""
    config = json.loads((checkpoint / CONFIG).read_text())
    config["model"]["hidden_channels"] *= 2
    (checkpoint / CONFIG).write_text(json.dumps(config))
    hashes = json.loads((checkpoint / MANIFEST).read_text())["sha256"]
    hashes[CONFIG] = file_sha256(checkpoint / CONFIG)
    (checkpoint / MANIFEST).write_bytes(manifest_bytes(hashes))


DAMAGE = {
    truncate: rf"{TRAINING} is damaged: its SHA-256",
    corrupt: rf"{WEIGHTS} is damaged: its SHA-256",
    lose_a_file: f"no readable '{CONFIG}'",
    lose_the_manifest: f"no readable '{MANIFEST}'",
    make_newer: f"has checkpoint format {FORMAT + 1}; this waveflow reads {FORMAT}",
    give_another_config: f"{CONFIG} is not the model of the run's recipe",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_resume_goes_on_from_the_newest_whole_checkpoint(
    cache: TrainingCache,
    finished: Trainer,
    run: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
) -> None:
    damage(run / "step-00000005")
    trainer = Trainer(RECIPE, cache, run, resume=True)
    assert trainer.step == 4
    said, then = caplog.messages
    assert "step-00000005" in said and DAMAGE[damage] in said
    assert then == f"going on from {run / 'step-00000004'}, the newest that is whole"
    trainer.run()
    assert_same(tensors_of(trainer), tensors_of(finished))
    for folder in run_checkpoints(run):
        read_files(folder)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_where_none_is_whole_that_is_an_error(
    cache: TrainingCache, run: Path, damage: Callable[[Path], None]
) -> None:
    for folder in run_checkpoints(run):
        damage(folder)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* the newest: ") as caught:
        Trainer(RECIPE, cache, run, resume=True)
    assert DAMAGE[damage] in str(caught.value)
    assert "step-00000005" in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_that_does_not_fit_its_weights_is_named(run: Path) -> None:
    give_another_config(run / "step-00000004")
    with pytest.raises(CheckpointError, match="the config makes it"):
        load_checkpoint(run / "step-00000004")


def test_what_cannot_be_read_is_not_deleted(cache: TrainingCache, run: Path) -> None:
    """A newer waveflow may read it."""
    make_newer(run / "step-00000005")
    shutil.copytree(run / "step-00000005", run / "step-00000900")
    trainer = Trainer(RECIPE, cache, run, resume=True)
    trainer.run()
    names = [folder.name for folder in run_checkpoints(run)]
    assert names[:3] == ["step-00000900", "step-00000006", "step-00000005"]
    with pytest.raises(CheckpointError, match="format"):
        read_files(run / names[0])
    read_files(run / names[2])  # made anew


def test_a_damaged_best_is_made_anew(
    cache: TrainingCache, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert json.loads((run / RUN_POINTER).read_text())["best"] == "step-00000004"
    corrupt(run / "step-00000004")
    trainer = Trainer(RECIPE, cache, run, resume=True)
    assert trainer.step == 5 and trainer.best is None
    assert "the next validation makes a new best checkpoint" in caplog.text
    load_checkpoint(run)  # meanwhile the last is the best
    trainer.run()
    assert trainer.best_name == "step-00000006"


def test_a_pointer_that_is_behind_is_put_right(
    cache: TrainingCache, finished: Trainer, tmp_path: Path
) -> None:
    """As after a kill between a checkpoint and its pointer, here the last of a run."""
    run = tmp_path / "run"
    shutil.copytree(finished.folder.path, run)
    right = (run / RUN_POINTER).read_bytes()
    for wrong in (b'{"last": "step-00000005", "best": "step-00000004"}', b"{", None):
        (run / RUN_POINTER).unlink()
        if wrong is not None:
            (run / RUN_POINTER).write_bytes(wrong)
        assert Trainer(RECIPE, cache, run, resume=True).step == 6
        assert (run / RUN_POINTER).read_bytes() == right


def test_a_half_removed_checkpoint_is_none(
    cache: TrainingCache, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill while the run removes one that is too old."""

    def killed(folder: Path, **_: object) -> None:
        if folder.exists():
            (folder / MANIFEST).unlink()
            raise KeyboardInterrupt

    trainer = Trainer(RECIPE, cache, run, resume=True)
    trainer.best_name = "step-00000005"  # so that step 4 is too old at step 6
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    monkeypatch.undo()
    assert list(run.glob(".step-00000004.old"))
    for folder in run_checkpoints(run):
        read_files(folder)
    trainer._save()
    assert not list(run.glob(".*"))


# --- killed early ---


def test_a_run_that_has_no_checkpoint_yet_starts_anew(
    cache: TrainingCache, finished: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    Trainer(RECIPE, cache, run)
    (run / ".step-00000001.1234.tmp").mkdir()  # killed within its first save
    resumed = Trainer(RECIPE, cache, run, resume=True)
    assert "holds no checkpoint yet: the run starts at step 0" in caplog.text
    resumed.run()
    assert_same(tensors_of(resumed), tensors_of(finished))
    assert not list(run.glob(".step-*"))


def test_a_run_from_other_weights_has_them_from_the_start(
    cache: TrainingCache, finished: Trainer, tmp_path: Path
) -> None:
    """Else one that is killed early would go on from random ones."""
    weights = copied(finished.average)
    Trainer(RECIPE, cache, tmp_path / "run", init=(finished.folder.path, weights))
    resumed = Trainer(RECIPE, cache, tmp_path / "run", resume=True)
    assert_same(dict(resumed.flow.state_dict()), weights)
    assert resumed.first_steps == 0


def test_a_checkpoint_without_a_pointer_is_a_run(
    cache: TrainingCache, finished: Trainer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.folder.path, run)
    (run / RUN_POINTER).unlink()
    with pytest.raises(ConfigError, match="holds a run"):
        Trainer(RECIPE, cache, run)


def test_a_restart_prepares_no_corpus_again(
    cache: TrainingCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a worker of torchrun, which starts it again with the same command line."""
    run, corpus = tmp_path / "run", tmp_path / "corpus"
    corpus.mkdir()  # of which nothing could be prepared
    shutil.copytree(cache.folder, run / "cache")
    made = (run / "cache" / MANIFEST_FILE).stat().st_mtime_ns
    (tmp_path / "recipe.json").write_text(RECIPE.model_dump_json())
    command = ["train", str(tmp_path / "recipe.json"), "--data", str(corpus), "--out", str(run)]
    assert main(command) == 2
    assert "no audio" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main([*command, "--max-minutes", "0"]) == 0
    assert "holds no checkpoint yet" in capsys.readouterr().err
    assert (run / "cache" / MANIFEST_FILE).stat().st_mtime_ns == made
    assert main(command) == 0
    assert resolve_run(run, "last").name == "step-00000006"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert main(command) == 2
    assert "holds a run: go on with it (--resume)" in capsys.readouterr().err


# --- full disks ---


def test_a_full_disk_leaves_the_old_checkpoints_whole(
    cache: TrainingCache, finished: Trainer, run: Path
) -> None:
    trainer = Trainer(RECIPE, cache, run, resume=True)
    size = (run / "step-00000005" / TRAINING).stat().st_size
    with (
        pytest.raises(CheckpointError, match=r"cannot write checkpoint .*step-00000006") as caught,
        largest_file(size // 2),
    ):
        trainer.run()
    assert "File too large" in str(caught.value) and "\n" not in str(caught.value)
    assert [folder.name for folder in run_checkpoints(run)] == ["step-00000005", "step-00000004"]
    assert not list(run.glob(".*"))
    for which in ("last", "previous", "best"):
        read_files(resolve_run(run, which))
    resumed = Trainer(RECIPE, cache, run, resume=True)
    resumed.run()
    assert_same(tensors_of(resumed), tensors_of(finished))


@pytest.mark.parametrize("file", ["checkpoints.json", "metrics.csv"])
def test_a_disk_that_is_full_elsewhere(
    cache: TrainingCache, run: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """The checkpoint fitted, its pointer does not; or a line of the metrics does not."""
    trainer = Trainer(RECIPE, cache, run, resume=True)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if file == "checkpoints.json":
        monkeypatch.setattr(run_folder, "_write_text", full)
    else:
        monkeypatch.setattr(loop.MetricsLog, "__exit__", full)
    with pytest.raises(CheckpointError, match=r"cannot write to the run .*No space left"):
        trainer.run()
    monkeypatch.undo()
    load_checkpoint(run)
    assert Trainer(RECIPE, cache, run, resume=True).step == 6


def test_a_file_that_does_not_fit_is_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OSError), largest_file(10), atomic_path(path) as temporary:
        temporary.write_text("too long for the disk")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


# --- stopped ---


def command(cache: TrainingCache, folder: Path, **train: object) -> list[str]:
    """The arguments that train into `folder / "run"`."""
    path = folder / "recipe.json"
    path.write_text(recipe(**train).model_dump_json())
    train_verb = ["-m", "waveflow", "train", path, "--data", cache.folder, "--out", folder / "run"]
    return [str(argument) for argument in train_verb]


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Waits for a checkpoint of this step or a later one, as long as the process lives."""
    while not any(folder.name >= f"step-{step:08d}" for folder in run_checkpoints(run)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_stopping_saves_and_changes_nothing(
    cache: TrainingCache, finished: Trainer, tmp_path: Path
) -> None:
    """Also where no checkpoint was due."""
    rare = recipe(steps=6, checkpoint_every=100, **QUICK)
    trainer = Trainer(rare, cache, tmp_path / "run")
    seen: list[Progress] = []
    trainer.run(report=seen.append, stop=lambda: len(seen) == 3)
    assert trainer.step == 3
    resumed = Trainer(rare, cache, tmp_path / "run", resume=True)
    assert resumed.step == 3
    resumed.run()
    assert_same(tensors_of(resumed), tensors_of(finished))


def test_sigterm_saves_and_ends_well(
    cache: TrainingCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the middle of a step, whose work is not lost."""
    settings = {"steps": 30, "checkpoint_every": 100, **QUICK}
    train_step = Trainer._train_step

    def step(self: Trainer) -> dict[str, float]:
        if self.step == 4:
            signal.raise_signal(signal.SIGTERM)
        return train_step(self)

    monkeypatch.setattr(Trainer, "_train_step", step)
    _, _, *arguments = command(cache, tmp_path, **settings)
    before = signal.getsignal(signal.SIGTERM)
    assert main(arguments) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    captured = capsys.readouterr()
    assert "asked to stop: saved at step 5" in captured.err
    assert "5 steps" in captured.out
    assert Trainer(recipe(**settings), cache, tmp_path / "run", resume=True).step == 5


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_run_is_whole_and_goes_on(cache: TrainingCache, tmp_path: Path) -> None:
    """It saves at every step, so the kill most often falls into a save."""
    settings = {"steps": 1000, "checkpoint_every": 1, **QUICK}
    process = start(*command(cache, tmp_path, **settings))
    run = tmp_path / "run"
    try:
        wait_for_step(process, run, 5)
    finally:
        process.kill()
        process.communicate()
    load_checkpoint(run)
    load_checkpoint(resolve_run(run, "last"))
    # What a kill in the middle of a save leaves behind goes away with the next save.
    (run / ".step-00000003.1234.tmp").mkdir()
    (run / ".step-00000003.old").mkdir(exist_ok=True)  # the kill may have left one itself
    (run / ".abc.tmp.json").touch()
    trainer = Trainer(recipe(**settings), cache, run, resume=True)
    assert trainer.step >= 4
    trainer.run(max_minutes=0)
    named = set(json.loads((run / RUN_POINTER).read_text()).values())
    assert {path.name for path in run.iterdir() if path.is_dir()} == named
    assert not list(run.glob(".*"))
    assert resolve_run(run, "last").name == f"step-{trainer.step:08d}"


# --- under torchrun ---

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_a_killed_worker_is_started_again_and_changes_nothing(
    cache: TrainingCache, tmp_path: Path
) -> None:
    settings = {"steps": 300, "batch_size": 3, "checkpoint_every": 7, "validate_every": 50}
    (tmp_path / "whole").mkdir()
    whole = start(*TORCHRUN, *command(cache, tmp_path / "whole", **settings))
    _, errors = whole.communicate()
    assert whole.returncode == 0, errors
    process = start(*TORCHRUN, "--max-restarts", "2", *command(cache, tmp_path, **settings))
    try:
        for step, worker in ((20, 1), (150, 0)):
            wait_for_step(process, tmp_path / "run", step)
            os.kill(workers_of(process)[worker], signal.SIGKILL)
        _, errors = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 0, errors
    ends = [resolve_run(folder / "run", "last") for folder in (tmp_path, tmp_path / "whole")]
    assert [end.name for end in ends] == ["step-00000300"] * 2
    for name in (TRAINING, WEIGHTS):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()
    assert "Signal 9 (SIGKILL)" in errors or "exitcode: -9" in errors


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
@pytest.mark.parametrize("whom", ["a worker", "torchrun"])
def test_sigterm_stops_all_workers_at_one_step(
    cache: TrainingCache, tmp_path: Path, whom: str
) -> None:
    settings = {"steps": 5000, "checkpoint_every": 5000, **QUICK}
    process = start(*TORCHRUN, *command(cache, tmp_path, **settings))
    try:
        wait_for_step(process, tmp_path / "run", 4)
        receiver = workers_of(process)[1] if whom == "a worker" else process.pid
        os.kill(receiver, signal.SIGTERM)
        printed, errors = process.communicate()
    finally:
        process.kill()
    last = Trainer(recipe(**settings), cache, tmp_path / "run", resume=True).step
    assert f"asked to stop: saved at step {last}" in errors
    assert f"{last} steps" in printed
    # torchrun itself reports the signal that it got as a failure.
    assert (process.returncode == 0) == (whom == "a worker")


@pytest.mark.slow
def test_the_survival_script() -> None:
    process = start(str(ROOT / "tests" / "stress" / "survival.py"), "--kills", "5")
    printed, errors = process.communicate()
    assert process.returncode == 0, printed + errors
    assert printed.startswith("5 kills in ")
