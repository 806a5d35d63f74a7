"""Jobs that several processes share: each process in turns, as threads, forked, by torchrun."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch.distributed
from conftest import N_MELS, SAMPLE_RATE, make_voice
from forking import Outcome, command, fork_group

from waveflow import processes
from waveflow.cli.main import main
from waveflow.data.cache import AUDIO_FILE, F0_FILE, MANIFEST_FILE
from waveflow.errors import ConfigError
from waveflow.processes import ALONE, Group, empty_part, local_device, merge, own_place

ROOT = Path(__file__).parent.parent

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

InTurns = Callable[..., list[Outcome]]
SILENT = Outcome(0, "", "")


@pytest.fixture
def in_turns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> InTurns:
    """Calls the command line as each of n processes, the last first; rank 0 has all the answers."""

    class Arrived(torch.distributed.HashStore):
        """A store at which the others are there already."""

        def add(self, key: str, value: int) -> int:
            return 1_000

    def call(n: int, *args: str | Path) -> list[Outcome]:
        store = Arrived()
        monkeypatch.setattr(processes, "_connect", lambda rank, world_size: store)
        monkeypatch.setenv("WORLD_SIZE", str(n))
        outcomes = []
        for rank in reversed(range(n)):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            capsys.readouterr()
            status = main([str(arg) for arg in args])
            outcomes.append(Outcome(status, *capsys.readouterr()))
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
        return outcomes[::-1]

    return call


@pytest.fixture
def mels(tmp_path: Path) -> Path:
    folder = tmp_path / "mels"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        np.save(folder / f"clip{i}.npy", rng.normal(-5, 1, (N_MELS, 4 + i)).astype(np.float32))
    return folder


@pytest.fixture
def recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four recordings, the third unreadable; only the figure without a package is measured."""
    from waveflow.metrics import copies

    light = tuple(metric for metric in copies.METRICS if metric.package is None)
    monkeypatch.setattr(copies, "METRICS", light)
    monkeypatch.setattr(copies, "griffin_lim", lambda mel, *_: torch.zeros(mel.shape[1] * 256))
    folder = tmp_path / "recordings"
    folder.mkdir()
    for seed in range(4):
        voice = make_voice(0.1 + 0.05 * seed, seed)
        soundfile.write(folder / f"clip{seed}.wav", voice, SAMPLE_RATE, "PCM_16")
    (folder / "clip2.wav").write_text("no audio")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def ours(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("waveflow: ")]


# Shares


@pytest.mark.parametrize(("n_items", "world_size"), [(0, 2), (1, 3), (7, 3), (8, 4), (5, 1)])
def test_every_item_is_in_one_share_and_merging_restores_the_order(n_items, world_size):
    items = list(range(n_items))
    shares = [Group(rank, world_size, None).share(items) for rank in range(world_size)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert merge(shares) == items


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "3"}, (2, 3)),
        ({"RANK": "3", "WORLD_SIZE": "3"}, None),
        ({"RANK": "-1", "WORLD_SIZE": "3"}, None),
        ({"RANK": "one", "WORLD_SIZE": "3"}, None),
        ({"RANK": "1"}, None),
    ],
)
def test_the_place_is_what_torchrun_sets(monkeypatch, variables, expected):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if expected is None:
        with pytest.raises(ConfigError, match=f"RANK={variables['RANK']}"):
            own_place()
    else:
        assert own_place() == expected


def test_each_process_takes_its_own_gpu(monkeypatch):
    assert local_device("cuda") == "cuda"
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert [local_device(name) for name in ("cuda", "cuda:3", "cpu")] == ["cuda:1", "cuda:3", "cpu"]


def in_threads(n: int, work: Callable[[Group], object]) -> list[object]:
    """The results of `work` in n members of a group, by rank."""
    store = torch.distributed.HashStore()
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(work, [Group(rank, n, store) for rank in range(n)]))


def test_gather_waits_for_all_and_gives_rank_0_everything_in_order(monkeypatch):
    monkeypatch.setattr(processes, "_PIECE", 7)
    values = [["a"] * 10, {"é\udc80": math.inf}, []]

    def work(group: Group) -> object:
        time.sleep(0.2 * (group.rank == 2))
        gathered = group.gather("values", values[group.rank])
        # Nobody leaves before the last has come, and rank 0 leaves last: the store may go with it.
        assert group.store.add("values/sent", 0) == 3
        assert group.rank > 0 or group.store.add("values/left", 0) == 3
        return gathered

    assert in_threads(3, work) == [values, None, None]
    assert ALONE.gather("values", 1) == [1]


def test_rank_0_goes_first_and_leaves_when_the_others_have_heard_of_it():
    order: list[int] = []

    def work(group: Group) -> object:
        def step() -> int:
            time.sleep(0.2 * (group.rank == 0))
            order.append(group.rank)
            return group.rank

        result = group.main_first("step", step)
        assert group.rank > 0 or group.store.add("step/seen", 0) == 3
        return result

    assert in_threads(3, work) == [0, 1, 2]
    assert order[0] == 0 and sorted(order) == [0, 1, 2]
    assert ALONE.main_first("step", lambda: 7) == 7


def test_an_error_of_rank_0_is_its_own():
    def fail() -> None:
        raise ValueError("what was wrong")

    with pytest.raises(ValueError, match="what was wrong"):
        Group(0, 2, torch.distributed.HashStore()).main_first("step", fail)


def test_a_part_of_the_store_is_empty_in_every_attempt():
    """The store still holds messages of the processes of earlier attempts."""
    store = torch.distributed.HashStore()
    store.set("word/2", "of one that died before the first attempt began")
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            members = [pool.submit(empty_part, store, rank, 3) for rank in (2, 0, 1)]
            parts = [member.result(timeout=20) for member in members]
        assert not any(part.check(["address"]) for part in parts)
        parts[0].set("address", "here")
        assert [part.get("address") for part in parts] == [b"here"] * 3


def test_processes_that_cannot_meet_say_so_in_one_line(monkeypatch, mels, tmp_path, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main(["vocode", str(mels), "-o", str(tmp_path / "wavs")]) == 2
    (line,) = ours(capsys.readouterr().err)
    assert "cannot be reached" in line and "MASTER_ADDR" in line


# Folder jobs


def test_processes_share_a_folder_and_rank_0_reports(in_turns, mels, tmp_path, tiny_model):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert main(["vocode", str(mels), "-o", str(alone), "--model", str(tiny_model)]) == 0
    shared.mkdir()
    (shared / "clip4.wav").write_text("kept")
    args = ("vocode", mels, "-o", shared, "--model", tiny_model)
    first, *others = in_turns(3, *args)
    assert first.status == 0
    assert f"4 written to {shared} by 3 processes, 1 kept (--force" in first.err
    assert others == [SILENT, SILENT]
    assert (shared / "clip4.wav").read_text() == "kept"
    in_turns(3, *args, "--force")
    assert names(shared) == names(alone)
    for name in names(alone):
        assert (shared / name).read_bytes() == (alone / name).read_bytes()


def test_a_fault_of_ours_in_any_process_is_in_the_status(
    in_turns, mels, tmp_path, tiny_model, monkeypatch
):
    from waveflow.audio import io

    read = io.read_mel

    def broken(path: Path) -> np.ndarray:
        if path.name == "clip1.npy":  # of rank 1
            raise ZeroDivisionError("never thought of")
        return read(path)

    monkeypatch.setattr(io, "read_mel", broken)
    first, other = in_turns(2, "vocode", mels, "-o", tmp_path / "wavs", "--model", tiny_model)
    assert first.status == 1 and other == SILENT
    summary, fault = ours(first.err)
    assert "4 written" in summary and "clip1.npy: internal error (ZeroDivisionError)" in fault


def test_each_file_is_made_once(in_turns, mels, tmp_path, tiny_model, monkeypatch):
    from waveflow.audio import io

    written: list[str] = []
    write = io.write_audio

    def counted(path: Path, *args: object) -> None:
        written.append(path.name)
        write(path, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(io, "write_audio", counted)
    # The second process sees what the first has done, as when they start at different times.
    in_turns(2, "vocode", mels, "-o", tmp_path / "wavs", "--model", tiny_model)
    assert sorted(written) == names(tmp_path / "wavs") == [f"clip{i}.wav" for i in range(5)]


def test_bad_files_of_all_shares_are_listed_once_by_rank_0(in_turns, mels, tmp_path, tiny_model):
    for i in (0, 3):
        (mels / f"clip{i}.npy").write_text("no array")
    out = tmp_path / "wavs"
    rank_0, other = in_turns(2, "vocode", mels, "-o", out, "--model", tiny_model)
    # Status 2 here would have torchrun end rank 0 before it has reported.
    assert other == SILENT
    assert rank_0.status == 2
    summary, first, second = ours(rank_0.err)
    assert "3 written" in summary and "2 failed" in summary
    assert "clip0.npy" in first and "clip3.npy" in second


def test_more_processes_than_files(in_turns, mels, tmp_path, tiny_model):
    for i in range(1, 5):
        (mels / f"clip{i}.npy").unlink()
    outcomes = in_turns(3, "vocode", mels, "-o", tmp_path / "wavs", "--model", tiny_model)
    assert [outcome.status for outcome in outcomes] == [0, 0, 0]
    assert "1 written" in outcomes[0].err


def test_one_file_and_pipes_are_not_shared(in_turns, mels, tmp_path, tiny_model):
    for source, out in ((mels / "clip0.npy", tmp_path / "a.wav"), (mels / "clip0.npy", "-")):
        for outcome in in_turns(2, "vocode", source, "-o", out, "--model", tiny_model):
            assert outcome.status == 2 and "leave torchrun out" in outcome.err
    assert not (tmp_path / "a.wav").exists()


def test_evaluate_gives_the_same_table(in_turns, recordings, tmp_path, tiny_model, capsys):
    def figures(name: str) -> tuple[str | Path, ...]:
        options = ("--model", tiny_model, "--threads", "1", "--json", tmp_path / name)
        return ("evaluate", recordings, *options)

    capsys.readouterr()
    assert main([str(arg) for arg in figures("alone.json")]) == 2
    alone = capsys.readouterr()
    rank_0, other = in_turns(2, *figures("shared.json"))
    # To the bit: each clip is measured alone, and the means are taken in the files' order.
    assert json.loads((tmp_path / "alone.json").read_text())["n_clips"] == 3
    assert (tmp_path / "shared.json").read_bytes() == (tmp_path / "alone.json").read_bytes()
    assert rank_0 == (2, alone.out, alone.err)
    assert "clip2.wav" in alone.err
    assert other == SILENT


# What an output may be


def test_a_link_among_the_inputs_protects_the_output_that_it_leads_to(tmp_path, capsys):
    sources, out = tmp_path / "in", tmp_path / "out"
    sources.mkdir()
    out.mkdir()
    soundfile.write(out / "a.wav", make_voice(0.2), SAMPLE_RATE, "PCM_16")
    before = (out / "a.wav").read_bytes()
    (sources / "a.wav").symlink_to(out / "a.wav")
    args = ["denoise", str(sources), "-o", str(out), "--noise", str(out / "a.wav"), "--force"]
    assert main(args) == 2
    assert "also an input" in capsys.readouterr().err
    assert (out / "a.wav").read_bytes() == before


def test_a_folder_onto_itself_is_refused_without_force_too(tmp_path, capsys):
    soundfile.write(tmp_path / "a.WAV", make_voice(0.2), SAMPLE_RATE, "PCM_16", format="WAV")
    # On some file systems a.wav is a.WAV.
    assert main(["resynth", str(tmp_path), "-o", str(tmp_path / ".")]) == 2
    assert "also an input" in capsys.readouterr().err
    assert names(tmp_path) == ["a.WAV"]


# Processes of their own


@needs_fork
def test_two_processes_try_all_files_before_they_fail(mels, tmp_path, tiny_model):
    (mels / "clip1.npy").write_text("no array")
    out = tmp_path / "wavs"
    args = ("vocode", mels, "-o", out, "--model", tiny_model, "--threads", "1")
    job = fork_group(2, lambda rank: command(args), tmp_path)
    rank_0, other = [process.wait() for process in job]
    assert other == SILENT and rank_0.status == 2
    summary, bad = ours(rank_0.err)
    assert f"4 written to {out} by 2 processes, 1 failed" in summary
    assert "clip1.npy" in bad
    assert names(out) == ["clip0.wav", "clip2.wav", "clip3.wav", "clip4.wav"]


def kill_at_clip_3() -> None:
    from waveflow.audio import io

    write = io.write_audio

    def killed(path: Path, *args: object) -> None:
        if path.name == "clip3.wav":
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, *args)  # type: ignore[arg-type]

    io.write_audio = killed


@needs_fork
def test_ctrl_c_ends_the_wait_for_a_dead_process_and_a_rerun_continues(
    mels, tmp_path, tiny_model, capsys
):
    out = tmp_path / "wavs"
    args = ("vocode", mels, "-o", out, "--model", tiny_model, "--threads", "1")

    def action(rank: int) -> int:
        if rank == 1:
            kill_at_clip_3()
        return command(args)

    rank_0, other = fork_group(2, action, tmp_path)
    assert other.wait().status == -signal.SIGKILL
    while not all((out / f"clip{i}.wav").exists() for i in (0, 2, 4)):
        time.sleep(0.05)
    time.sleep(0.3)  # it waits for the other's result now
    rank_0.kill(signal.SIGINT)
    outcome = rank_0.wait()
    assert outcome.status == 130 and ours(outcome.err) == ["waveflow: interrupted"]
    assert "clip3.wav" not in names(out)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("clip*.wav")}
    # The killed process may have been writing clip1, too.
    assert {"clip0.wav", "clip2.wav", "clip4.wav"} <= set(before)

    capsys.readouterr()
    assert main([*map(str, args)]) == 0
    n = len(before)
    assert f"{5 - n} written to {out}, {n} kept" in capsys.readouterr().err
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("clip*.wav")}
    assert len(after) == 5 and before.items() <= after.items()


@needs_fork
def test_two_processes_prepare_a_cache(recordings, tmp_path):
    pytest.importorskip("pyworld")
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert main(["prepare", str(recordings), "-o", str(alone), "--workers", "1"]) == 0
    job = fork_group(2, lambda rank: command(["prepare", recordings, "-o", shared]), tmp_path)
    rank_0, other = [process.wait() for process in job]
    assert other == SILENT
    assert rank_0.status == 0 and rank_0.err == ""
    assert rank_0.out.startswith(f"{shared}: 2 clips") and "1 files left out" in rank_0.out
    for name in (AUDIO_FILE, F0_FILE, MANIFEST_FILE):
        assert (alone / name).read_bytes() == (shared / name).read_bytes()
    assert ".shared.parts" not in names(tmp_path)


KILLED = """
import sys
from test_processes import kill_at_clip_3
from waveflow.cli.main import main

kill_at_clip_3()
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kill", [True, False])
def test_under_torchrun(mels, tmp_path, tiny_model, kill):
    """torchrun ends all when one is killed, and lets rank 0 report when files are bad."""
    (mels / "clip1.npy").write_text("no array")
    program, out = tmp_path / "killed.py", tmp_path / "wavs"
    program.write_text(KILLED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    args = ["vocode", mels, "-o", out, "--model", tiny_model]
    result = subprocess.run(
        [*launcher, *([program] if kill else ["-m", "waveflow"]), *args],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1  # torchrun's own
    if kill:
        assert "SIGKILL" in result.stderr and ours(result.stderr) == []
        return
    assert "exitcode  : 2" in result.stderr
    summary, bad = ours(result.stderr)
    assert f"4 written to {out} by 2 processes, 1 failed" in summary
    assert "clip1.npy" in bad
