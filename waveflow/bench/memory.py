"""How much memory a synthesis takes beyond its model: the high-water mark of a fresh process."""

import ctypes
import gc
import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from waveflow.bench.subjects import RunPath, load_subject, speech_mel
from waveflow.engine.vocoder import VocoderWarning

# A short call before, so that what libraries set up once is not counted.
WARM_UP_FRAMES = 8

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def memory_growth(
    name: str, path: RunPath, n_frames: int, batch: int, device: str, threads: int
) -> int | None:
    """Bytes by which one synthesis raises the peak over the model, loaded and warmed up.

    Measured in a process of its own, because memory that was freed and kept would hide the
    growth: resident memory on the CPU, torch's allocations on an accelerator.

    Args:
        name, path: a subject and one of its paths.
        n_frames: mel frames of each item.
        batch: items.
        device, threads: as torch takes them.

    Returns:
        None where the system does not tell: other than Linux, or one that forbids the reset.

    Raises:
        BrokenProcessPool: the process died, as it does where memory runs out.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(_growth, name, path, n_frames, batch, device, threads).result()
        except OSError:
            return None


def _growth(name: str, path: RunPath, n_frames: int, batch: int, device: str, threads: int) -> int:
    torch.set_num_threads(threads)
    subject = load_subject(name, torch.device(device))
    system = subject.system(path)
    mel = speech_mel(subject.mel_config, n_frames, batch).to(device)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", VocoderWarning)
        # Compiled code is made for a length; its making must not be counted.
        system(mel if path.kind == "compiled" else mel[..., :WARM_UP_FRAMES])
        if mel.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            system(mel)
            return torch.cuda.max_memory_allocated() - before
        _give_back_freed()
        # Resets VmHWM (man 5 proc).
        _RESET.write_text("5")
        before = _resident("VmRSS")
        system(mel)
        return _resident("VmHWM") - before


def _give_back_freed() -> None:
    """Returns freed memory to the system, where it would serve the synthesis unseen."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"{_STATUS} has no {field}")
