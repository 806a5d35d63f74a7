"""Memory that a synthesis takes beyond its loaded model, on every path.

    python benchmarks/memory.py frameglow-cc0 waveglow-256 --precision float32 int8 --seconds 1 4

Each figure is the growth of the peak in a process of its own, because memory that an earlier call
freed and kept would hide it: resident memory on a CPU (Linux), torch's allocations on a GPU.
"""

import ctypes
import gc
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import torch

import lab
from waveflow.cli.bench import short
from waveflow.cli.console import show_table
from waveflow.errors import ConfigError

# A short call comes first, so that what libraries set up once does not count.
WARM_UP_SECONDS = 0.1


@torch.inference_mode()
def growth(model: str, path: str, seconds: float, device: str) -> int:
    """Bytes by which one synthesis raises the peak of this process."""
    torch.set_num_threads(1)
    system = lab.load(model, path, device)
    mel = lab.speech(system.mel_config, seconds, device)
    # Compiled code is made for a length, and making it must not count.
    warm_up = seconds if path.startswith("compiled") else WARM_UP_SECONDS
    system(lab.speech(system.mel_config, warm_up, device))
    return rise(partial(system, mel), mel.is_cuda)


def rise(work: Callable[[], object], on_gpu: bool = False) -> int:
    """Bytes by which the peak of this process rises above what it holds before."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # freed memory goes back to the system; used again, it would not count
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man 5 proc)
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(model: str, path: str, seconds: float, device: str = "cpu") -> str:
    """MB in a fresh process, or why there is no figure."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return short(pool.submit(growth, model, path, seconds, device).result() / 1e6)
        except BrokenProcessPool:
            return "died"  # perhaps for want of memory
        except ConfigError:
            return "cannot run"
        except OSError:
            return "not told"  # not Linux, or one that forbids the reset


def main(argv: Sequence[str] | None = None) -> None:
    """Prints MB of every path, a column for each length."""
    options = ("precision", "seconds", "device", "compile", "no-peers")
    args = lab.parser(__doc__, *options).parse_args(argv)
    rows = [("model", "path", *(f"MB, {seconds:g} s" for seconds in args.seconds))]
    with lab.folders([*args.models, *(() if args.no_peers else lab.PEERS)]) as found:
        for model, source in found.items():
            for path in lab.paths(source, args.precision, args.compile):
                cells = [measure(source, path, seconds, args.device) for seconds in args.seconds]
                rows.append((model, path, *cells))
    show_table(rows)


if __name__ == "__main__":
    lab.run(main)
