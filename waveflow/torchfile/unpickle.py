"""Reads the pickle inside a PyTorch file as plain data.

Python's unpickler imports whatever a file names and calls it. This one looks nothing up: a name
stays a `Name`, and a call of a `Name` gives a `Record` (a few functions of torch give tensors). A
file can make numbers, texts, tuples, lists and the four classes below. `Name` is the only one of
them that can be called.

The base class is the unpickler that the standard library has in Python. The faster one in C,
although it would call nothing either, is not safe: it takes tuples as keys of dicts, and the hash
of a nested tuple can last for ever or overflow the stack; and a file of ten bytes can make it fill
32 GB of memory.
"""

import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from waveflow.errors import CheckpointError
from waveflow.limits import TENSORS


class Name(NamedTuple):
    """A class or function that the file names: two texts, never the thing itself."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module:.60}.{self.name:.60}"

    def __call__(self, *args: Any) -> object:
        rebuild = _REBUILD.get(str(self))
        return Record(self) if rebuild is None else rebuild(*args)


class Record:
    """A dict, or an object of any class, as the file describes it.

    Attributes:
        kind: the object's class; None for a dict.
        items: what a dict holds. Entries whose key is not a text are dropped.
        state: the object's attributes.
    """

    __slots__ = ("items", "kind", "state")

    def __init__(self, kind: Name | None = None) -> None:
        self.kind = kind
        self.items: dict[str, object] = {}
        self.state: dict[str, object] = {}

    def __setitem__(self, key: object, value: object) -> None:
        if type(key) is str:
            self.items[key] = value

    def append(self, item: object) -> None:
        """Drops what a subclass of list holds."""


class Storage(NamedTuple):
    """The numbers of one or more tensors: their type, name in the file, and count."""

    kind: str
    key: str
    n_items: int


class TensorRef(NamedTuple):
    """A tensor whose numbers have not been read; offset and strides are in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_pickle(file: io.BytesIO, storages: dict[str, Storage] | None = None) -> object:
    """Reads the pickle that starts here, and leaves the file behind its end.

    Args:
        file: the pickle, and perhaps more.
        storages: filled with the storages that the pickle refers to, by key.

    Raises:
        CheckpointError: refused. A damaged pickle raises any other exception.
    """
    return _Unpickler(file, {} if storages is None else storages).load()


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> TensorRef:
    # Behind requires_grad and hooks: that the numbers are to be negated or conjugated.
    if any(isinstance(it, Record) and it.items for it in rest[2:]):
        raise CheckpointError("its pickle has a tensor with negated or conjugated numbers")
    if len(shape) > 8 or not _are_counts(offset, *shape, *strides):
        raise CheckpointError("its pickle has a tensor of odd sizes")
    return TensorRef(storage, offset, tuple(shape), tuple(strides))


def _are_counts(*values: object) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _ordered_dict(pairs: Iterable[Any] = ()) -> Record:
    record = Record()
    for key, value in pairs:  # Python 2 wrote the items as an argument
        record[key] = value
    return record


# All that a file can have called; every other call gives a Record.
_REBUILD: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._tensor._rebuild_from_type_v2": lambda function, kind, args, state: function(*args),
    "collections.OrderedDict": _ordered_dict,
}


def _set_state(machine: Any) -> None:
    """Keeps the attributes of a record; sets no attribute of anything."""
    state = machine.stack.pop()
    if type(machine.stack[-1]) is Record and type(state) is Record:
        machine.stack[-1].state = state.items


class _Operations(dict[int, Callable[[Any], None]]):
    """The function of each operation that a pickle may have."""

    def __missing__(self, code: int) -> Callable[[Any], None]:
        raise CheckpointError(
            f"its pickle has the operation {code:#x}, which torch.save does not write: refused"
        )


# Left out are operations that torch.save does not write: above all those that ask for memory by a
# number alone, or for an object that other code has registered.
_WRITTEN = (
    "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 "
    "BINFLOAT BINUNICODE SHORT_BINUNICODE BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS SETITEM SETITEMS "
    "EMPTY_SET ADDITEMS FROZENSET BYTEARRAY8 BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET "
    "GLOBAL STACK_GLOBAL BINPERSID REDUCE NEWOBJ"
)
# These do the same as others of the library.
_AS = {
    # Sets become lists, so that nothing is hashed.
    "EMPTY_SET": "EMPTY_LIST",
    "ADDITEMS": "APPENDS",
    "FROZENSET": "LIST",
    # Its own would take memory before it reads.
    "BYTEARRAY8": "BINBYTES8",
    # A new object is a call of its class.
    "NEWOBJ": "REDUCE",
}


def _code(name: str) -> int:
    return int(getattr(pickle, name)[0])


class _Unpickler(pickle._Unpickler):
    dispatch = _Operations(
        {
            _code(name): pickle._Unpickler.dispatch[_code(_AS.get(name, name))]
            for name in _WRITTEN.split()
        }
    )
    dispatch[_code("EMPTY_DICT")] = lambda machine: machine.append(Record())
    dispatch[_code("BUILD")] = _set_state

    def __init__(self, file: io.BytesIO, storages: dict[str, Storage]) -> None:
        super().__init__(file, encoding="latin-1")  # Python 2 wrote bytes as texts
        self._storages = storages

    def find_class(self, module: str, name: str) -> Name:
        return Name(module, name)

    def persistent_load(self, pid: Any) -> object:
        """Gives a storage, or (legacy container) a class that comes with its source code."""
        what, name, *rest = pid
        if what == "module":
            return name
        key, _device, n_items, *views = rest
        if type(name) is not Name or type(key) is not str or not _are_counts(n_items):
            raise CheckpointError("its pickle has a storage without a type, a name or a size")
        if any(view is not None for view in views):
            raise CheckpointError("its storages are views of others, which ended before WaveGlow")
        TENSORS.check("its pickle has", len(self._storages), CheckpointError)
        storage = Storage(name.name, key, n_items)
        if self._storages.setdefault(key, storage) != storage:
            raise CheckpointError(f"its storage {key!r:.60} has two types or sizes")
        return storage
