"""The process that reads a foreign file: no files, no network, little memory and time.

Run by `sandbox.read_torch_file` as `main`, with the file as standard input. It writes a safetensors
file of the model's tensors, its metadata a `Header`, to standard output, or one line of what is
wrong to standard error.
"""

import encodings.cp437  # noqa: F401  what zipfile decodes names with; nothing is imported later
import json
import os
import struct
import sys
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np

from waveflow.errors import CheckpointError
from waveflow.foreign.container import TorchFile, open_torch_file
from waveflow.foreign.unpickle import ITEM_SIZE, Record, TensorRef

# Their names in safetensors. Weights are of no other type.
DTYPES = {"DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16"}
DTYPES["BFloat16Storage"] = "BF16"

_MODEL_SIZES = ("n_mel_channels", "n_flows", "n_group", "n_early_every", "n_early_size")
_NETWORK_SIZES = ("n_layers", "n_channels", "kernel_size")
READ_FAILED, OUT_OF_MEMORY = 3, 4
MAX_DEPTH = 16


def main(max_cpu_seconds: int, max_memory: int) -> None:
    """Standard input to standard output, within limits that a hostile file cannot lift."""
    _limit(max_cpu_seconds, max_memory)
    try:
        write(sys.stdin.buffer, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # not even a message could be made
    except (CheckpointError, OSError) as error:
        # Names in the file are in it: nothing that would steer a terminal.
        plain = "".join(c if c.isprintable() else " " for c in str(error))
        os.write(2, " ".join(plain.split()).encode())
        os._exit(READ_FAILED)


def _limit(max_cpu_seconds: int, max_memory: int) -> None:
    """No more time, memory and output; no further file, connection or process."""
    try:
        import resource
    except ImportError:  # Windows has no such limits; sandbox.py's time limit holds there too
        return
    limits = {
        resource.RLIMIT_CPU: max_cpu_seconds,
        resource.RLIMIT_AS: max_memory,
        resource.RLIMIT_FSIZE: os.fstat(0).st_size + 2**20,
        resource.RLIMIT_NOFILE: 3,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)  # a limit that the user's own session has, stays
        try:
            resource.setrlimit(kind, (limit, limit))
        except (ValueError, OSError):
            # macOS does not take a limit of memory.
            if kind != resource.RLIMIT_AS or sys.platform == "linux":
                raise


def write(file: BinaryIO, out: BinaryIO) -> None:
    """Turns a file of torch.save that holds a WaveGlow into safetensors.

    Raises:
        CheckpointError: no such file, damaged, refused, or without a model.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    torch_file = open_torch_file(file)
    header, tensors = model_folder(torch_file)
    entries: dict[str, object] = {"__metadata__": {"waveflow": json.dumps(header)}}
    place = 0
    # The widest first, so that each starts at a multiple of its width.
    names = sorted(tensors, key=lambda name: (-_item_size(tensors[name]), name))
    for name in names:
        end = place + tensors[name].n_items * _item_size(tensors[name])
        entries[name] = {
            "dtype": DTYPES[tensors[name].storage.kind],
            "shape": tensors[name].shape,
            "data_offsets": (place, end),
        }
        place = end
    if place > size:
        raise CheckpointError("its tensors share storages: more of them than the file is large")
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    out.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        out.write(_in_order(tensors[name], torch_file))


def _item_size(tensor: TensorRef) -> int:
    return ITEM_SIZE[tensor.storage.kind]


def _in_order(tensor: TensorRef, file: TorchFile) -> bytes:
    """The tensor's bytes, last axis fastest; storages may hold another order."""
    if not tensor.n_items:
        return b""
    item = _item_size(tensor)
    flat = np.frombuffer(file.read(tensor.storage), f"V{item}")[tensor.offset :]
    strides = [item * stride for stride in tensor.strides]
    # TensorRef has checked that this stays within the storage.
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False).tobytes()


def model_folder(file: TorchFile) -> tuple[dict[str, object], dict[str, TensorRef]]:
    """The fields of a `sandbox.Header`, and the model's tensors by the names in its state dict."""
    root = file.root
    outer: Mapping[object, object] = root if isinstance(root, dict) else {}
    model = outer.get("model", outer.get("state_dict", root))
    sizes: dict[str, int] = {}
    tensors: dict[str, TensorRef] = {}
    if isinstance(model, Record):
        _flatten(model, "", tensors, set())
        sizes = _sizes_of_modules(model)
    elif isinstance(model, dict):
        tensors = {k: v for k, v in model.items() if isinstance(k, str) and _is_tensor(v)}
        if len(tensors) < len(model):
            raise CheckpointError(
                "it holds no model: looked for a module or a state dict at its top, or under "
                "'model' or 'state_dict'"
            )
    config = outer.get("config")
    if isinstance(config, dict):
        networks = config.get("WN_config")
        sizes |= _integers(config, _MODEL_SIZES)
        sizes |= _integers(networks if isinstance(networks, dict) else {}, _NETWORK_SIZES)
    if not tensors:
        raise CheckpointError("it holds no tensors of a model")
    for name, tensor in tensors.items():
        if not (name.isascii() and name.isprintable()):
            raise CheckpointError(f"its tensor {name!r:.60} has a name that none has")
        if tensor.storage.kind not in DTYPES:
            raise CheckpointError(f"its tensor {name:.60} is a {tensor.storage.kind}: no weights")
    iteration = outer.get("iteration")
    header: dict[str, object] = {
        "container": file.container,
        "module": model.kind.module if isinstance(model, Record) else None,
        "has_config": isinstance(config, dict) and "state_dict" in outer,
        "iteration": iteration if type(iteration) is int else 0,
        "sizes": sizes,
    }
    return header, tensors


def _is_tensor(value: object) -> bool:
    return isinstance(value, TensorRef)


def _flatten(record: Record, prefix: str, tensors: dict[str, TensorRef], seen: set[int]) -> None:
    """Fills in what `module.state_dict()` would hold.

    Plain attributes are no part of it: old weight norm leaves a stale `weight` there, the
    published synthesis an inverse.
    """
    if id(record) in seen or prefix.count(".") > MAX_DEPTH:
        raise CheckpointError(f"its module {prefix:.60} is in itself, in two places, or too deep")
    seen.add(id(record))
    for group in ("_parameters", "_buffers"):
        for name, value in _items(record, group):
            if isinstance(value, TensorRef):
                tensors[f"{prefix}{name}"] = value
    for name, value in _items(record, "_modules"):
        if isinstance(value, Record):
            _flatten(value, f"{prefix}{name}.", tensors, seen)


def _items(record: Record, group: str) -> list[tuple[str, object]]:
    found = record.state.get(group)
    return list(found.items()) if isinstance(found, dict) else []


def _sizes_of_modules(model: Record) -> dict[str, int]:
    """Sizes that the modules keep as attributes."""
    sizes = _integers(model.state, _MODEL_SIZES)
    modules = dict(_items(model, "_modules"))
    upsample, networks = modules.get("upsample"), modules.get("WN")
    if isinstance(upsample, Record):
        stride = upsample.state.get("stride")
        if isinstance(stride, tuple) and len(stride) == 1:
            sizes |= _integers({"hop_length": stride[0]}, ("hop_length",))
    if isinstance(networks, Record):
        for _, network in _items(networks, "_modules")[:1]:
            if isinstance(network, Record):
                sizes |= _integers(network.state, _NETWORK_SIZES)
    return sizes


def _integers(values: Mapping[str, object], names: tuple[str, ...]) -> dict[str, int]:
    found = {}
    for name in names:
        value = values.get(name)
        if type(value) is int and 0 < value < 2**31:
            found[name] = value
    return found
