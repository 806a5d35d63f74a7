"""Reads a file of torch.save without executing anything of it.

A process that can do nothing else reads the pickle and tells where the tensors are. Their numbers
are then read here.
"""

import math
import os
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from torch import Tensor

from waveflow.errors import CheckpointError
from waveflow.foreign.reader import MAX_OUTPUT, OUT_OF_MEMORY, READ_FAILED

MAX_CPU_SECONDS = 60
# For the interpreter and the objects of the pickle.
MAX_MEMORY = 2**30
_MAX_SECONDS = 300

# -I -S: no environment variables, nothing from the current folder or from other packages.
_START = (
    "import sys; sys.path.append(sys.argv[1]); from waveflow.foreign.reader import main; "
    "main(int(sys.argv[2]), int(sys.argv[3]))"
)
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}

_Count = Annotated[int, Field(ge=0, lt=2**48)]


class Header(BaseModel):
    """The facts that a file states besides its tensors.

    Attributes:
        container: zip, or legacy (before PyTorch 1.6); safetensors has none.
        lineage: the code that the weights belong to, if a class or a config in the file tells it.
        iteration: steps of its training; 0 if the file does not say.
        hop_length: the stride of the upsampler, which only a pickled module states.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    container: Literal["zip", "legacy", "safetensors"]
    lineage: Literal["glow", "glow_old", "dle"] | None = None
    iteration: NonNegativeInt = 0
    hop_length: PositiveInt | None = None


class StoredTensor(BaseModel):
    """Where a tensor's numbers are in the file.

    Attributes:
        kind: type of storage.
        n_items: elements of its storage.
        place: of its storage in the file, in bytes, and the storage's CRC-32 if known.
        offset, strides: in elements.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    n_items: _Count
    place: tuple[_Count, int | None]
    offset: _Count
    shape: tuple[_Count, ...]
    strides: tuple[_Count, ...]

    @property
    def span(self) -> int:
        """Elements of the storage from the first to the last of the tensor."""
        steps = zip(self.shape, self.strides, strict=True)
        return 0 if 0 in self.shape else 1 + sum((n - 1) * step for n, step in steps)


class Contents(BaseModel):
    """Output of the reading process."""

    header: Header
    tensors: dict[str, StoredTensor]


def read_torch_file(
    path: Path, max_cpu_seconds: int = MAX_CPU_SECONDS, max_memory: int = MAX_MEMORY
) -> tuple[Header, dict[str, Tensor]]:
    """Reads the model's tensors from a file of torch.save and executes nothing of it.

    Args:
        path: the file.
        max_cpu_seconds: the reading process is killed after this time.
        max_memory: bytes that it may have.

    Raises:
        CheckpointError: no such file, damaged, refused, or beyond the limits.
    """
    try:
        with open(path, "rb") as file:
            return load(_describe(file, max_cpu_seconds, max_memory), file)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _describe(file: BinaryIO, max_cpu_seconds: int, max_memory: int) -> bytes:
    """Runs `reader.main`."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-I", "-S", "-c", _START, root, max_cpu_seconds, max_memory]
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                [str(part) for part in command],
                stdin=file,
                stdout=output,
                stderr=subprocess.PIPE,
                timeout=_MAX_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise CheckpointError(f"reading took over {_MAX_SECONDS} s") from error
        # Names in the file may be among these words, and must not steer a terminal.
        words = done.stderr.decode(errors="replace")
        words = " ".join("".join(c if c.isprintable() else " " for c in words).split())
        if done.returncode == READ_FAILED:
            raise CheckpointError(words)
        if done.returncode < 0 or done.returncode == OUT_OF_MEMORY:
            raise CheckpointError(
                f"refused, because reading it takes more than {max_cpu_seconds} s or "
                f"{max_memory >> 20} MiB of memory"
            )
        if done.returncode:
            raise CheckpointError(f"its reader failed: {words[-200:]}")
        output.seek(0)
        return output.read(MAX_OUTPUT)


def load(description: bytes, file: BinaryIO) -> tuple[Header, dict[str, Tensor]]:
    """Reads the numbers. The description is checked as if it were the file itself.

    Raises:
        CheckpointError: tensors that are no weights, or are not in the file.
    """
    try:
        contents = Contents.model_validate_json(description)
    except ValidationError as error:
        raise CheckpointError("the output of its reader is damaged") from error
    rest = file.seek(0, os.SEEK_END)
    tensors = {}
    for name, stored in contents.tensors.items():
        dtype = _DTYPES.get(stored.kind)
        if dtype is None or len(stored.shape) != len(stored.strides):
            raise CheckpointError(f"its tensor {name!r:.60} is a {stored.kind!r:.40}: no weights")
        rest -= dtype.itemsize * max(stored.span, math.prod(stored.shape))
        if rest < 0:
            raise CheckpointError("its tensors have more numbers than the file")
        try:
            tensors[name] = _load(stored, dtype, file)
        except ValueError as error:
            raise CheckpointError(f"its tensor {name!r:.60} {error}") from error
    return contents.header, tensors


def _load(stored: StoredTensor, dtype: torch.dtype, file: BinaryIO) -> Tensor:
    if not stored.span:
        return torch.empty(0, dtype=dtype)
    if stored.offset + stored.span > stored.n_items:
        raise ValueError("reaches beyond its storage")
    place, checksum = stored.place
    file.seek(place + stored.offset * dtype.itemsize)
    data = bytearray(file.read(stored.span * dtype.itemsize))
    is_known = checksum is not None and stored.span == stored.n_items
    if len(data) < stored.span * dtype.itemsize or (is_known and zlib.crc32(data) != checksum):
        raise ValueError("is cut off or damaged")
    return torch.frombuffer(data, dtype=dtype).as_strided(stored.shape, stored.strides).clone()
