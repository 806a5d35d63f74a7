"""Reads a file of torch.save in a process of its own that can do nothing else."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from waveflow.errors import CheckpointError
from waveflow.foreign.reader import OUT_OF_MEMORY, READ_FAILED

MAX_CPU_SECONDS = 60
# Over twice the file's size: the interpreter, NumPy, and the pickle's objects.
MEMORY_MARGIN = 2**30
_MAX_SECONDS = 600

# -I: no user site, no environment variables, nothing from the current folder.
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from waveflow.foreign.reader import main; "
    "main(int(sys.argv[2]), int(sys.argv[3]))"
)


class Header(BaseModel):
    """What a file says besides its tensors.

    Attributes:
        container: zip, or legacy (before PyTorch 1.6); safetensors has none.
        module: Python file of the pickled class, such as "glow"; None for a state dict.
        has_config: a state dict with the model's config beside it, as in DeepLearningExamples.
        iteration: of its training; 0 where it does not say.
        sizes: those that it states, under the names of the published config.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    container: Literal["zip", "legacy", "safetensors"]
    module: str | None = None
    has_config: bool = False
    iteration: NonNegativeInt = 0
    sizes: dict[str, PositiveInt] = {}


def read_torch_file(
    path: Path, max_cpu_seconds: int = MAX_CPU_SECONDS, memory_margin: int = MEMORY_MARGIN
) -> tuple[Header, dict[str, Tensor]]:
    """The model's tensors in a file of torch.save, without running anything of it.

    Args:
        path: the file.
        max_cpu_seconds: after which the reading process is killed.
        memory_margin: bytes that it may have beyond twice the file's size.

    Raises:
        CheckpointError: no such file, damaged, refused, or beyond the limits.
    """
    with tempfile.TemporaryDirectory(prefix="waveflow-") as folder:
        result = Path(folder) / "model.safetensors"
        try:
            source = open(path, "rb")  # noqa: SIM115  closed below
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        with source, open(result, "wb") as target:
            max_memory = 2 * os.fstat(source.fileno()).st_size + memory_margin
            root = Path(__file__).parents[2]
            command = [sys.executable, "-I", "-c", _START, root, max_cpu_seconds, max_memory]
            try:
                done = subprocess.run(
                    [str(part) for part in command],
                    stdin=source,
                    stdout=target,
                    stderr=subprocess.PIPE,
                    # Each thread of OpenBLAS would take its share of the memory limit.
                    env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                    timeout=_MAX_SECONDS,
                )
            except subprocess.TimeoutExpired as error:
                raise CheckpointError(f"{path}: reading took over {_MAX_SECONDS} s") from error
        if done.returncode == READ_FAILED:
            raise CheckpointError(f"{path}: {done.stderr.decode(errors='replace')}")
        if done.returncode < 0 or done.returncode == OUT_OF_MEMORY:
            raise CheckpointError(
                f"{path}: refused, because reading it takes more than {max_cpu_seconds} s or more "
                "memory than its size explains"
            )
        if done.returncode:
            words = done.stderr.decode(errors="replace").split()
            raise CheckpointError(f"{path}: its reader failed: {' '.join(words)[-200:]}")
        return _read_back(result, path)


def _read_back(result: Path, path: Path) -> tuple[Header, dict[str, Tensor]]:
    """What the process wrote is checked as if it were the file itself."""
    try:
        with safe_open(result, framework="pt") as file:
            header = Header.model_validate_json((file.metadata() or {}).get("waveflow", ""))
            names = file.keys()
            # Cloned, because the file that they are mapped from goes away.
            return header, {name: file.get_tensor(name).clone() for name in names}
    except (SafetensorError, ValidationError) as error:
        raise CheckpointError(f"{path}: what its reader wrote is damaged") from error
