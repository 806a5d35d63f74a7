"""Processes that live long: memory that is bounded, and forks after a load."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from waveflow.engine.vocoder import load

ROOT = Path(__file__).parent.parent
CAPS = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "32 64"), (dict.fromkeys(CAPS, "7"), "7 7")], ids=["ours", "own"]
)
def test_the_caches_of_onednn_are_small(given: dict[str, str], expected: str) -> None:
    """Before torch reads the variables, so already by `import waveflow`."""
    code = f"import os, waveflow; print(*(os.environ[name] for name in {CAPS}))"
    environment = {name: value for name, value in os.environ.items() if name not in CAPS}
    environment |= {"PYTHONPATH": str(ROOT), **given}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert printed.stdout.split() == expected.split()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
@pytest.mark.parametrize("precision", ["float32", "auto", "int8"])
def test_a_load_leaves_no_threads(tiny_model: Path, precision: str) -> None:
    """A pool that belongs to the thread that loads would hang the processes forked from it."""
    added = []

    def work() -> None:
        # This thread has no pool yet, whatever the tests before have computed.
        before = set(os.listdir("/proc/self/task"))
        load(tiny_model, precision=precision)
        deadline = time.monotonic() + 2
        while (new := set(os.listdir("/proc/self/task")) - before) and time.monotonic() < deadline:
            time.sleep(0.01)
        added.append(new)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
    finally:
        torch.set_num_threads(threads)
    assert added == [set()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
@pytest.mark.parametrize("products", [[], ["--onednn"]])
def test_a_long_life(products: list[str]) -> None:
    script = ROOT / "tests" / "stress" / "long_life.py"
    life = ["--lengths", "150", "--seconds", "2", "--threads", "4", *products]
    environment = {k: v for k, v in os.environ.items() if k not in CAPS} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script, *life], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
