"""The process that reads a foreign file. It has no files, no network, little memory and time.

`sandbox.read_torch_file` starts `main` with the file as standard input. `main` writes to standard
output where the model's tensors are in the file, as JSON (see `sandbox.Contents`). If it refuses
the file, it writes the reason to standard error.
"""

import encodings.cp437  # noqa: F401  zipfile decodes names with it; later nothing can be imported
import json
import os
import sys
from typing import BinaryIO

from waveflow.errors import CheckpointError
from waveflow.foreign.model import find_model
from waveflow.torchfile.container import open_torch_file

READ_FAILED, OUT_OF_MEMORY = 3, 4
MAX_OUTPUT = 2**24


def main(max_cpu_seconds: int, max_memory: int) -> None:
    """Reads standard input within limits that a hostile file cannot lift."""
    _limit(max_cpu_seconds, max_memory)
    try:
        sys.stdout.write(describe(sys.stdin.buffer))
        sys.stdout.flush()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # there may be no memory for a message
    except (CheckpointError, OSError) as error:
        os.write(2, str(error).encode(errors="replace"))
        os._exit(READ_FAILED)


def _limit(max_cpu_seconds: int, max_memory: int) -> None:
    """Limits time, memory and output, and forbids further files, connections and processes."""
    try:
        import resource
    except ImportError:  # Windows has no such limits, but sandbox.py limits the time
        return
    limits = {
        resource.RLIMIT_CPU: max_cpu_seconds,
        resource.RLIMIT_AS: max_memory,
        resource.RLIMIT_FSIZE: MAX_OUTPUT,
        resource.RLIMIT_NOFILE: 3,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)  # the user's session may have tighter ones
        try:
            resource.setrlimit(kind, (limit, limit))
        except (ValueError, OSError):
            # macOS accepts no limit of memory.
            if kind != resource.RLIMIT_AS or sys.platform == "linux":
                raise


def describe(file: BinaryIO) -> str:
    """Finds the WaveGlow in a file of torch.save, and gives a `sandbox.Contents` as JSON.

    Raises:
        CheckpointError: no such file, damaged, refused, or without a model.
    """
    try:
        torch_file = open_torch_file(file)
        facts, tensors = find_model(torch_file.root)
        places = {
            name: {
                "kind": tensor.storage.kind,
                "n_items": tensor.storage.n_items,
                "place": torch_file.locate(tensor.storage),
                "offset": tensor.offset,
                "shape": tensor.shape,
                "strides": tensor.strides,
            }
            for name, tensor in tensors.items()
        }
        header = {"container": torch_file.container, **facts}
        return json.dumps({"header": header, "tensors": places})
    except (CheckpointError, MemoryError, OSError):
        raise
    except Exception as error:  # a damaged file raises nearly anything
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"it is damaged: {type(error).__name__}: {reason}") from error
