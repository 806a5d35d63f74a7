"""Folder jobs that several processes share, as torchrun starts them, and alone in turns."""

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import torch.distributed
from conftest import N_MELS, SAMPLE_RATE, make_voice

from waveflow.cli import shards
from waveflow.cli.main import main
from waveflow.cli.shards import Group, local_device, merge, shard
from waveflow.errors import ConfigError

ROOT = Path(__file__).parent.parent


class Outcome(NamedTuple):
    """What one process ended with."""

    status: int
    out: str
    err: str


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
        monkeypatch.setattr(shards, "_connect", lambda: store)
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
    from waveflow.metrics import evaluate

    light = tuple(metric for metric in evaluate.METRICS if metric.package is None)
    monkeypatch.setattr(evaluate, "METRICS", light)
    folder = tmp_path / "recordings"
    folder.mkdir()
    for seed in range(4):
        voice = make_voice(0.1 + 0.05 * seed, seed)
        soundfile.write(folder / f"clip{seed}.wav", voice, SAMPLE_RATE, "PCM_16")
    (folder / "clip2.wav").write_text("no audio")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def torchrun(program: list[str], *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Two processes of a program."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    variables = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    return subprocess.run(
        [*launcher, *program, *map(str, args)],
        env=variables | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


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
def test_shard_reads_what_torchrun_sets(monkeypatch, variables, expected):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if expected is None:
        with pytest.raises(ConfigError, match=f"RANK={variables['RANK']}"):
            shard()
    else:
        assert shard() == expected


def test_each_process_takes_its_own_gpu(monkeypatch):
    assert local_device("cuda") == "cuda"
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert [local_device(name) for name in ("cuda", "cuda:3", "cpu")] == ["cuda:1", "cuda:3", "cpu"]


def test_gather_waits_for_all_and_gives_rank_0_everything_in_order(monkeypatch):
    monkeypatch.setattr(shards, "_PIECE", 7)
    store, results, late = torch.distributed.HashStore(), {}, threading.Event()
    values = [["a"] * 10, {"é\udc80": math.inf}, []]

    def process(rank: int) -> None:
        if rank == 2:
            late.wait()
        results[rank] = Group(rank, 3, store).gather("values", values[rank])

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    threads[0].join(0.3)
    assert not results  # nobody leaves before the last has come: torchrun's store may go with him
    late.set()
    for thread in threads:
        thread.join(30)
    assert results == {0: values, 1: None, 2: None}


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


# Under torchrun itself


def test_torchrun_tries_all_files_before_it_fails(mels, tmp_path, tiny_model):
    (mels / "clip1.npy").write_text("no array")
    out = tmp_path / "wavs"
    result = torchrun(["-m", "waveflow"], "vocode", mels, "-o", out, "--model", tiny_model)
    assert result.returncode == 1  # torchrun's own; our process ended with 2
    assert "exitcode  : 2" in result.stderr
    summary, bad = ours(result.stderr)
    assert f"4 written to {out} by 2 processes, 1 failed" in summary
    assert "clip1.npy" in bad
    assert names(out) == ["clip0.wav", "clip2.wav", "clip3.wav", "clip4.wav"]


KILLED = """
import os, signal, sys
from waveflow.audio import io
from waveflow.cli.main import main

write = io.write_audio

def killed(path, *args):
    if path.name == "clip3.wav":
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, *args)

io.write_audio = killed
sys.exit(main())
"""


def test_a_killed_process_ends_the_job_and_a_rerun_continues(mels, tmp_path, tiny_model, capsys):
    program, out = tmp_path / "killed.py", tmp_path / "wavs"
    program.write_text(KILLED)
    args = ("vocode", mels, "-o", out, "--model", tiny_model)
    result = torchrun([str(program)], *args)
    # Rank 0, at the end of its share or in it, does not wait for rank 1 forever.
    assert result.returncode == 1 and "SIGKILL" in result.stderr
    assert ours(result.stderr) == []
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("clip*.wav")}
    assert "clip1.wav" in before and "clip3.wav" not in before

    assert main([*map(str, args)]) == 0
    n_kept = len(before)
    assert f"{5 - n_kept} written to {out}, {n_kept} kept" in capsys.readouterr().err
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("clip*.wav")}
    assert len(after) == 5 and before.items() <= after.items()
