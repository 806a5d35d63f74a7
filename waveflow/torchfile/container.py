"""Opens the two containers of torch.save: the zip archive, and the one before PyTorch 1.6."""

import io
import struct
import zipfile
from collections.abc import Callable
from typing import BinaryIO, Literal, NamedTuple

from waveflow.errors import CheckpointError
from waveflow.limits import PICKLE_BYTES, TENSORS, Limit
from waveflow.torchfile.unpickle import Record, Storage, read_pickle

ZIP_START = b"PK\x03\x04"
# Bytes of an element of each type of storage.
ITEM_SIZE = {
    f"{kind}Storage": size
    for size, kinds in {
        16: "ComplexDouble",
        8: "Double ComplexFloat Long",
        4: "Float Int",
        2: "Half BFloat16 Short",
        1: "Char Byte Bool Untyped",
    }.items()
    for kind in kinds.split()
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


class TorchFile(NamedTuple):
    """The data that torch.save was given, without the numbers of its tensors.

    Attributes:
        container: which of the two.
        root: the data, see `unpickle`.
        locate: gives the place of a storage's numbers in the file, in bytes, and their CRC-32 if
            the file has one.
    """

    container: Literal["zip", "legacy"]
    root: object
    locate: Callable[[Storage], tuple[int, int | None]]


def open_torch_file(file: BinaryIO, most: Limit = PICKLE_BYTES) -> TorchFile:
    """Reads everything but the numbers of tensors.

    Args:
        most: bytes of all pickles together.

    Raises:
        CheckpointError: no such file, or refused. A damaged file raises any other exception.
    """
    start = file.read(len(ZIP_START))
    file.seek(0)
    if start == ZIP_START:
        return _open_zip(file, most)
    if start[:1] != b"\x80":
        raise CheckpointError("it is neither a file of torch.save nor of safetensors")
    return _open_legacy(file, most)


def _open_zip(file: BinaryIO, most: Limit) -> TorchFile:
    archive = zipfile.ZipFile(file)
    TENSORS.check("its archive holds", len(archive.infolist()), CheckpointError)
    records = {info.filename: info for info in archive.infolist()}
    if len(records) != len(archive.infolist()):
        raise CheckpointError("its archive holds two records of one name")
    roots = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")]
    if len(roots) != 1 or f"{roots[0]}constants.pkl" in records:
        raise CheckpointError("torch.save did not write its archive (TorchScript is not read)")
    root = roots[0]
    for info in records.values():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise CheckpointError(f"its record {info.filename!r:.60} is compressed: refused")
    if f"{root}byteorder" in records and archive.read(f"{root}byteorder") != b"little":
        raise CheckpointError("a big-endian machine wrote it")
    most.check("its pickle has", records[f"{root}data.pkl"].file_size, CheckpointError)

    def locate(storage: Storage) -> tuple[int, int]:
        info = records.get(f"{root}data/{storage.key}")
        if info is None or info.file_size != storage.n_items * ITEM_SIZE[storage.kind]:
            raise CheckpointError(f"its storage {storage.key!r:.60} is missing or of another size")
        file.seek(info.header_offset)
        # The record's own header repeats its name, with another extra field.
        n_name, n_extra = struct.unpack("<26xHH", file.read(30))
        return info.header_offset + 30 + n_name + n_extra, info.CRC

    return TorchFile("zip", read_pickle(io.BytesIO(archive.read(f"{root}data.pkl"))), locate)


def _open_legacy(file: BinaryIO, most: Limit) -> TorchFile:
    """Five pickles (magic number, protocol, machine, data, names of storages), then storages."""
    head = io.BytesIO(file.read(most.value))
    if read_pickle(head) != _LEGACY_MAGIC or read_pickle(head) != _LEGACY_PROTOCOL:
        raise CheckpointError("it is a pickle, but torch.save did not write it")
    machine = read_pickle(head)
    if not isinstance(machine, Record) or machine.items.get("little_endian") is not True:
        raise CheckpointError("it does not say that a little-endian machine wrote it")
    storages: dict[str, Storage] = {}
    data = read_pickle(head, storages)
    keys = read_pickle(head)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError("its list of storages is damaged")
    if sorted(keys) != sorted(storages):
        raise CheckpointError("its list of storages is not that of its tensors")
    place, places = head.tell(), {}
    for key in keys:
        file.seek(place)
        count = file.read(8)
        places[key] = place + 8
        place += 8 + storages[key].n_items * ITEM_SIZE[storages[key].kind]
        if struct.unpack("<q", count) != (storages[key].n_items,):
            raise CheckpointError(f"its storage {key!r:.60} is of another size")
    return TorchFile("legacy", data, lambda storage: (places[storage.key], None))
