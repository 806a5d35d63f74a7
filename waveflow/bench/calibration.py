"""The machine under a benchmark: what it is, its clock, and how fast it multiplies matrices."""

import contextlib
import platform
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from waveflow.engine.fast.product import Product

# Rows, inner and columns, as of a coupling network over a block of rows.
MATMUL_SHAPE = (1024, 768, 512)
# One product takes 1 to 10 ms on a CPU; so many are timed at once that it is about this long.
MATMUL_SECONDS = 0.04
# What decides how fast the precisions are beside each other, as /proc/cpuinfo spells it.
CPU_FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm",
)  # fmt: skip
LIBRARIES = ("torch", "onnxruntime", "openvino", "numpy")


class Machine(BaseModel):
    """What must stand beside a figure for it to mean anything.

    Attributes:
        device: torch's name of it, and the accelerator's own.
        processor: of the CPU.
        cpu_flags: those of `CPU_FLAGS` that it has; empty where the system does not tell.
        threads: torch's CPU threads.
        libraries: version by name, of those that are installed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    processor: str
    cpu_flags: tuple[str, ...]
    threads: int
    libraries: dict[str, str]


class Timing(NamedTuple):
    """Seconds of one piece of work: by the clock, and of this process on any core."""

    wall: float
    cpu: float


class Matmul(NamedTuple):
    """Matrix products to be timed.

    Attributes:
        routine: which of torch's routines makes them.
        work: makes all of them.
        operations: of all of them, a multiply-add counted as two.
    """

    routine: str
    work: Callable[[], object]
    operations: int


def describe_machine(device: torch.device) -> Machine:
    """The machine as it is set up now."""
    name = device.type
    if device.type == "cuda":
        name = f"{device}, {torch.cuda.get_device_name(device)}"
    cpu = _cpu_info()
    flags = set(cpu.get("flags", cpu.get("Features", "")).split())
    return Machine(
        device=name,
        processor=cpu.get("model name") or platform.processor() or platform.machine(),
        cpu_flags=tuple(flag for flag in CPU_FLAGS if flag in flags),
        threads=torch.get_num_threads(),
        libraries={name: found for name in LIBRARIES if (found := _version(name))},
    )


def timed(work: Callable[[], object]) -> Timing:
    """Time of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def matmul(precision: str, device: torch.device) -> Matmul | None:
    """The fastest routine for products of a precision here; None where torch has none."""
    rows, inner, columns = MATMUL_SHAPE
    seconds: dict[str, float] = {}
    routines = _routines(getattr(torch, precision), device)
    for name, product in routines.items():
        # Older torches lack some; some types have no product on some devices.
        with contextlib.suppress(RuntimeError, AttributeError):
            seconds[name] = min(timed(partial(_repeat, product, 1)).wall for _ in range(5))
    if not seconds:
        return None
    fastest = min(seconds, key=seconds.__getitem__)
    repeats = max(1, round(MATMUL_SECONDS / seconds[fastest]))
    work = partial(_repeat, routines[fastest], repeats)
    return Matmul(fastest, work, 2 * rows * inner * columns * repeats)


def _routines(dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Ways to make one product."""
    rows, inner, columns = MATMUL_SHAPE
    left = torch.ones(rows, inner, device=device).to(dtype)
    right = torch.ones(inner, columns, device=device).to(dtype)
    if dtype == torch.int8:
        return {"torch._int_mm": lambda: torch._int_mm(left, right)}
    routines: dict[str, Callable[[], Tensor]] = {"torch.mm": lambda: torch.mm(left, right)}
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        # What the engine uses; torch.mm is MKL, which is slow on AMD's CPUs.
        with contextlib.suppress(RuntimeError):
            product = Product(right.T, dtype, rows)
            routines["oneDNN"] = lambda: product(left)
    return routines


def _repeat(product: Callable[[], Tensor], repeats: int) -> None:
    for _ in range(repeats):
        result = product()
    # Waits for an accelerator.
    result[0, 0].item()


def _cpu_info() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
