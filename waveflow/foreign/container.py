"""The two containers of torch.save: the zip archive, and what came before PyTorch 1.6."""

import io
import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO, Literal

from waveflow.errors import CheckpointError
from waveflow.foreign.unpickle import Storage, read_pickle

ZIP_START = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


@dataclass(frozen=True)
class TorchFile:
    """What torch.save was given, as plain data.

    Attributes:
        container: which of the two.
        root: the data; its tensors are `TensorRef`s.
        read: the bytes of a storage of this file.
    """

    container: Literal["zip", "legacy"]
    root: object
    read: Callable[[Storage], bytes]


def open_torch_file(file: BinaryIO) -> TorchFile:
    """Reads everything but the numbers.

    Raises:
        CheckpointError: no such file, damaged, or refused (see `unpickle`).
    """
    start = file.read(len(ZIP_START))
    file.seek(0)
    if start == ZIP_START:
        return _open_zip(file)
    if start[:1] != b"\x80":
        raise CheckpointError("it is neither a file of torch.save nor of safetensors")
    return _open_legacy(file)


def _open_zip(file: BinaryIO) -> TorchFile:
    try:
        archive = zipfile.ZipFile(file)
        records = {info.filename: info for info in archive.infolist()}
        if len(records) != len(archive.infolist()):
            raise CheckpointError("its archive holds two records of one name")
        roots = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")]
        if len(roots) != 1 or f"{roots[0]}constants.pkl" in records:
            raise CheckpointError("its archive is none of torch.save (TorchScript is not read)")
        root = roots[0]
        for info in records.values():
            # torch.save compresses nothing, so that no record is larger than the file.
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise CheckpointError(f"its record {info.filename:.60} is compressed: refused")
        if f"{root}byteorder" in records and archive.read(f"{root}byteorder") != b"little":
            raise CheckpointError("it was written by a big-endian machine")
        data = read_pickle(io.BytesIO(archive.read(f"{root}data.pkl")))
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # damaged archives raise from zipfile, struct and the parser
        raise CheckpointError(f"its archive is damaged: {error}") from error

    @lru_cache(maxsize=1)  # tensors of one storage follow each other
    def read(storage: Storage) -> bytes:
        info = records.get(f"{root}data/{storage.key}")
        if info is None or info.file_size != storage.n_bytes:
            raise CheckpointError(f"its storage {storage.key!r:.60} is missing or of another size")
        try:
            return archive.read(info)
        except Exception as error:  # as above
            raise CheckpointError(f"its archive is damaged: {error}") from error

    return TorchFile("zip", data, read)


def _open_legacy(file: BinaryIO) -> TorchFile:
    """Five pickles (magic number, protocol, machine, data, storage keys), then the storages."""
    if read_pickle(file) != _LEGACY_MAGIC or read_pickle(file) != _LEGACY_PROTOCOL:
        raise CheckpointError("it is a pickle, but none of torch.save")
    machine = read_pickle(file)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise CheckpointError("it does not say that it was written by a little-endian machine")
    storages: dict[str, Storage] = {}
    data = read_pickle(file, storages)
    keys = read_pickle(file)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError("its list of storages is damaged")
    if sorted(keys) != sorted(storages):
        raise CheckpointError("its list of storages is not that of its tensors")
    place, end = file.tell(), file.seek(0, os.SEEK_END)
    places = {}
    for key in keys:
        file.seek(place)
        places[key] = place + 8
        place += 8 + storages[key].n_bytes
        count = file.read(8)
        if place > end or struct.unpack("<q", count) != (storages[key].n_items,):
            raise CheckpointError(f"its storage {key!r:.60} is cut off or of another size")

    @lru_cache(maxsize=1)
    def read(storage: Storage) -> bytes:
        file.seek(places[storage.key])
        return file.read(storage.n_bytes)

    return TorchFile("legacy", data, read)
