"""Two gloo processes on a CPU against one; run as a script, this file starts the two."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forking import command, fork_group, free_port
from tiny_training import MEL, recipe, tensors_of, write_cache
from torch import Tensor

from waveflow.bijections import ActNorm
from waveflow.bijections.base import Condition
from waveflow.checkpoint import WEIGHTS, parse_tensors, resolve_run
from waveflow.data.cache import TrainingCache
from waveflow.data.segments import SegmentSampler
from waveflow.errors import CheckpointError, ConfigError, WaveflowError
from waveflow.objective import Batch, Loss, Share
from waveflow.training import distributed, run_folder
from waveflow.training.distributed import on_main, own_share, process_group, rank
from waveflow.training.loop import Trainer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

ROOT = Path(__file__).parent.parent

# Three items and three validation clips for two processes: shares are uneven. The first steps
# are the pitch head's, whose loss is divided by the batch's voiced frames.
CURVE = {"steps": 12, "batch_size": 3, "validate_every": 6}
IN_PARTS = {"steps": 3, "batch_size": 4, "pitch_steps": 1, "validate_every": 3}


def curve_of(trainer: Trainer) -> list[dict[str, float]]:
    """Runs a trainer; what each step reports."""
    curve: list[dict[str, float]] = []
    trainer.run(report=lambda progress: curve.append(progress.values))
    return curve


def signal_and_mask() -> tuple[Tensor, Tensor]:
    """x (3, 4, 50) whose items differ in mean, and a mask that leaves out some of the last's."""
    x = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.ones(3, 1, 50).double()
    mask[2, :, 20:] = 0
    return x + torch.arange(3)[:, None, None], mask


def started_norm(share: Share) -> list[list[float]]:
    norm = ActNorm(4).double().train()
    x, mask = signal_and_mask()
    norm(share.of(x), Condition(share.of(x), share.of(mask)))
    return [norm.shift.tolist(), norm.log_scale.tolist()]


# --- in two processes ---


def work(out: Path, many: Path, few: Path) -> dict[str, Any]:
    """What both processes do together; `many` and `few` validation clips."""
    found: dict[str, Any] = {}
    with process_group("cpu"):
        distributed._BUCKET = 1000  # so that gradients do not fit into one message
        trainer = Trainer(recipe(**CURVE), TrainingCache(many), out / "curve")
        found["curve"] = curve_of(trainer)
        found["validation"] = [trainer.best, trainer.provenance.draw_log_likelihood]
        found["weights"] = {k: v.double().sum().item() for k, v in tensors_of(trainer).items()}
        cache = TrainingCache(few)
        found["in parts"] = curve_of(
            Trainer(recipe(**IN_PARTS, accumulate=2), cache, out / "parts")
        )
        found["actnorm"] = started_norm(own_share(3))
        found["non-finite"] = non_finite_in_rank_1(cache, out / "non-finite")
        found["stopped"] = stopped_by_rank_1(cache, out / "stopped")
        found["resumed"] = resumed_past_damage(cache, out / "stopped")
        found["full disk"] = error_of(lambda: cannot_save(cache, out / "full"))
        found["small batch"] = error_of(lambda: Trainer(recipe(batch_size=1), cache, out / "small"))
    return found


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except WaveflowError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def non_finite_in_rank_1(cache: TrainingCache, out: Path) -> list[object]:
    trainer = Trainer(recipe(pitch_steps=0), cache, out)
    before = {k: v.clone() for k, v in trainer.flow.state_dict().items()}

    (phase,) = trainer.phases

    def spoilt(batch: Batch) -> Loss:
        value, terms = phase.loss(batch)
        return Loss(value * torch.nan if rank() == 1 else value, terms)

    trainer.phases = [phase._replace(loss=spoilt)]
    trainer._train_step()
    same = all(torch.equal(v, before[k]) for k, v in trainer.flow.state_dict().items())
    return [trainer.skipped, same]


def stopped_by_rank_1(cache: TrainingCache, out: Path) -> int:
    trainer = Trainer(recipe(steps=1000, checkpoint_every=2, pitch_steps=0), cache, out)
    trainer.run(stop=lambda: rank() == 1 and trainer.step == 3)
    return trainer.step


def resumed_past_damage(cache: TrainingCache, out: Path) -> int:
    def damage() -> None:
        with open(resolve_run(out, "last") / WEIGHTS, "r+b") as file:
            file.truncate(100)

    on_main(damage)
    changed = recipe(steps=1000, checkpoint_every=2, pitch_steps=0)
    return Trainer(changed, cache, out, resume=True).step


def cannot_save(cache: TrainingCache, out: Path) -> None:
    def full(*_: object) -> None:
        raise CheckpointError(f"no space in rank {rank()}")

    save, run_folder.save_checkpoint = run_folder.save_checkpoint, full
    try:
        Trainer(recipe(steps=1, pitch_steps=0), cache, out).run()
    finally:
        run_folder.save_checkpoint = save


def write_events(folder: str) -> list[str]:
    """A list that fills with what this process changes below a folder."""
    events: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            writes = set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
        else:
            path, writes = (args or [""])[0], event in {"os.mkdir", "os.rename", "os.remove"}
        if writes and str(path).startswith(folder):
            events.append(f"{event} {path}")

    sys.addaudithook(hook)
    return events


def member(rank: int, out: Path, many: Path, few: Path, other_port: str) -> int:
    events = write_events(str(out))
    found = work(out, many, few)
    # The command, which joins the processes by itself: at another port, or one process might still
    # reach the group that the other has left.
    os.environ["MASTER_PORT"] = other_port
    found["status"] = command(
        ["train", out / "recipe.json", "--data", few, "--out", out / "command"]
    )
    found["writes"] = events
    Path(out, f"rank{rank}.json").write_text(json.dumps(found))
    return 0


def main() -> None:
    """Two processes that share the imports of this one, which has never trained."""
    import torch._dynamo  # noqa: F401 - the optimizers import it

    out, many, few = map(Path, sys.argv[1:])
    other_port = free_port()
    job = fork_group(2, lambda rank: member(rank, out, many, few, other_port), out)
    _, status = os.wait()
    for process in job if status else ():
        process.kill(signal.SIGKILL)  # it would wait for the one that has failed
    sys.exit(bool(status or os.wait()[1]))


# --- what came of it ---


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """With three validation clips for two processes, and with one."""
    folder = tmp_path_factory.mktemp("caches")
    splits = ["train", "train", "val", "val", "val"]
    write_cache(folder / "many", splits)
    write_cache(folder / "few", splits[:3])
    return [folder / "many", folder / "few"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def both(out: Path, caches: list[Path]) -> list[dict[str, Any]]:
    """What the two processes found, and beside it what they printed."""
    (out / "recipe.json").write_text(recipe(steps=2).model_dump_json())
    subprocess.run(
        [sys.executable, __file__, out, *caches],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    found = []
    for number in range(2):
        printed, errors = (Path(out, f"rank{number}", n).read_text() for n in ("stdout", "stderr"))
        assert (out / f"rank{number}.json").is_file(), errors
        found.append(json.loads((out / f"rank{number}.json").read_text()))
        found[-1] |= {"printed": printed, "errors": errors}
    return found


@pytest.fixture(scope="module")
def alone(caches: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """The run that `work` makes, in one process, with its `curve`."""
    out = tmp_path_factory.mktemp("alone") / "run"
    trainer = Trainer(recipe(**CURVE), TrainingCache(caches[0]), out)
    trainer.curve = curve_of(trainer)
    return trainer


def assert_close(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert [step.keys() for step in ours] == [step.keys() for step in theirs]
    for step, expected in zip(ours, theirs, strict=True):
        # The gradient of an L1 norm jumps where its terms change signs, by rounding too.
        for name, value in expected.items():
            rel = 1e-3 if name == "gradient_norm" else 1e-5
            assert step[name] == pytest.approx(value, rel=rel, abs=1e-5), name


def test_two_processes_have_the_curve_of_one(both: list[dict[str, Any]], alone: Trainer) -> None:
    """Of every term and of the gradient's norm, in 12 steps of uneven shares."""
    assert len(alone.curve) == 12
    assert {"pitch_loss", "energy", "calibration"} <= set().union(*alone.curve)
    assert_close(both[0]["curve"], alone.curve)
    assert both[1]["curve"] == both[0]["curve"]


def test_two_processes_reach_the_weights_of_one(
    both: list[dict[str, Any]], alone: Trainer, out: Path
) -> None:
    assert both[0]["weights"] == both[1]["weights"]
    last = resolve_run(out / "curve", "last") / WEIGHTS
    for name, value in parse_tensors(last.read_bytes(), last).items():
        # A learning rate of 1e-3: gradients that differ by rounding move weights by 1e-5, and
        # those of L1 norms, which jump, by some more.
        torch.testing.assert_close(value, alone.average[name], rtol=1e-4, atol=2e-4)


def test_validation_is_shared_and_added_up(both: list[dict[str, Any]], alone: Trainer) -> None:
    """Three clips of different lengths in two processes, and in each the mean of all."""
    expected = [alone.best, alone.provenance.draw_log_likelihood]
    assert both[0]["validation"] == both[1]["validation"]
    assert both[0]["validation"] == pytest.approx(expected, abs=1e-5)


def test_a_batch_in_parts_in_two_processes(
    both: list[dict[str, Any]], caches: list[Path], tmp_path: Path
) -> None:
    whole = Trainer(recipe(**IN_PARTS), TrainingCache(caches[1]), tmp_path / "run")
    assert_close(both[0]["in parts"], curve_of(whole))


def test_actnorm_starts_from_the_whole_batch(both: list[dict[str, Any]]) -> None:
    expected = np.array(started_norm(Share(0, 3, 3)))
    assert np.abs(expected - np.array(started_norm(Share(0, 2, 3)))).max() > 0.1
    for found in both:
        np.testing.assert_allclose(found["actnorm"], expected, rtol=0, atol=1e-12)


def test_all_decide_alike(both: list[dict[str, Any]]) -> None:
    """On a loss that is not finite, a stop, a damaged checkpoint and a full disk in one of them."""
    for found in both:
        assert found["non-finite"] == [1, True]
        assert found["stopped"] == 3
        assert found["resumed"] == 2
        assert found["full disk"] == "CheckpointError: no space in rank 0"
        assert found["small batch"].startswith("ConfigError: batch_size 1 is too small for 2")


def test_only_rank_0_writes_and_speaks(both: list[dict[str, Any]], out: Path) -> None:
    assert len(both[0]["writes"]) > 50
    assert both[1]["writes"] == []
    assert [found["status"] for found in both] == [0, 0]
    assert f"{out / 'command'}: 2 steps" in both[0]["printed"]
    assert both[1]["printed"] == ""
    assert "going on from" in both[0]["errors"]
    with open(out / "curve" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    # Once, and not once for each process.
    scores = [row for row in rows if (row["kind"], row["name"]) == ("validation", "lower_bound")]
    assert [row["step"] for row in scores] == ["6", "12"]


# --- in one process ---


def test_shares_are_all_of_a_batch() -> None:
    for total in range(1, 9):
        for n_parts in range(1, total + 3):
            parts = Share(0, total, total).split(n_parts)
            sizes = [part.stop - part.start for part in parts]
            assert [i for part in parts for i in range(part.start, part.stop)] == [*range(total)]
            assert len(parts) == min(n_parts, total)
            assert max(sizes) - min(sizes) <= 1
            assert sum(part.weight for part in parts) == pytest.approx(1)
    assert Share(2, 7, 12).split(2) == [Share(2, 4, 12), Share(4, 7, 12)]


def test_a_share_of_a_batch_is_in_the_batch(caches: list[Path]) -> None:
    def batch(items: slice) -> tuple[Tensor, Tensor]:
        return SegmentSampler(TrainingCache(caches[0]), 32, 5, MEL, 7, (0.5, 4.0), items).batch(3)

    whole = batch(slice(None))
    parts = [batch(slice(0, 2)), batch(slice(2, 3)), batch(slice(3, 5))]
    for index in range(2):
        assert torch.equal(torch.cat([part[index] for part in parts]), whole[index])


def test_a_batch_in_parts_is_the_batch(alone: Trainer, caches: list[Path], tmp_path: Path) -> None:
    parts = recipe(**CURVE, accumulate=3)
    assert_close(curve_of(Trainer(parts, TrainingCache(caches[0]), tmp_path / "run")), alone.curve)


def test_an_environment_that_is_not_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"cannot be reached: .*RANK"), process_group("cpu"):
        pass


if __name__ == "__main__":
    main()
