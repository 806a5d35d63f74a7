"""recipes/ray: 2,000 mels by a local Ray, one worker killed in the middle."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "recipes" / "ray" / "vocode.py"
N_MELS, N_FRAMES = 2000, 6


def workers() -> list[int]:
    """Processes of the pipeline's actors on this machine."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(b"ray::MapWorker"):
                found.append(int(entry.name))
    return found


def made(folder: Path) -> list[Path]:
    """Recordings that are there, whole."""
    return [path for path in folder.glob("*.wav") if not path.name.startswith(".")]


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(tmp_path: Path, tiny_model: Path) -> None:
    pytest.importorskip("ray.data", reason="the recipe needs ray[data]")
    mels, wavs = tmp_path / "mels", tmp_path / "wavs"
    mels.mkdir()
    rng = np.random.default_rng(0)
    for i in range(N_MELS):
        np.save(mels / f"{i:04d}.npy", (-6 + rng.random((80, N_FRAMES))).astype(np.float32))
    np.save(mels / "bad.npy", np.zeros((3, 4), np.float32))
    command = [sys.executable, SCRIPT, mels, wavs, "--model", tiny_model, "--actors", "2"]
    settings = {"PYTHONPATH": str(ROOT), "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    log = tmp_path / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=out, stderr=out, env={**os.environ, **settings}
        )
        while len(made(wavs)) < N_MELS // 4:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        made_before = {path.name: path.stat().st_ino for path in made(wavs)}
        os.kill(workers()[0], signal.SIGKILL)
        assert process.wait() == 2, log.read_text()  # because of bad.npy alone
    assert f"{N_MELS} of {N_MELS + 1} recordings are there" in log.read_text()
    assert "bad.npy" in log.read_text()
    assert {path.name for path in wavs.iterdir()} == {f"{i:04d}.wav" for i in range(N_MELS)}
    # A file that was there is not made again.
    assert all((wavs / name).stat().st_ino == inode for name, inode in made_before.items())
    for path in wavs.iterdir():
        assert soundfile.info(path).frames == N_FRAMES * 256
