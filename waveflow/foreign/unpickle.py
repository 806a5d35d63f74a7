"""Reads the pickle inside a PyTorch file with a machine that can call nothing.

Python's own unpickler imports what a file names and calls it. This one runs the few operations
that torch.save writes on plain lists, dicts, tuples and numbers; a name is a pair of strings that
is looked up in a short list, an object is a `Record` of its attributes. Nothing is imported, no
attribute of anything is set, and there is no operation that a file could use to get further.
"""

import math
import pickletools
from dataclasses import dataclass, field
from typing import BinaryIO, TypeVar

from waveflow.errors import CheckpointError

T = TypeVar("T")

# A full WaveGlow with its optimizer takes some 200,000.
MAX_OPERATIONS = 3_000_000
MAX_AXES = 8

# Bytes of an element of each storage type.
ITEM_SIZE = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
}


@dataclass(frozen=True)
class Global:
    """A name that a pickle refers to: two strings, never the thing itself."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Record:
    """What a pickle says of an object: its class by name, and its attributes."""

    kind: Global
    state: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Storage:
    """Where the numbers of tensors lie.

    Attributes:
        kind: a key of ITEM_SIZE.
        key: its name in the file.
        n_items: elements in the file.
    """

    kind: str
    key: str
    n_items: int

    @property
    def n_bytes(self) -> int:
        return self.n_items * ITEM_SIZE[self.kind]


@dataclass(frozen=True)
class TensorRef:
    """A tensor whose numbers have not been read: a view of a storage that it surely fits.

    Attributes:
        offset: first element.
        shape, strides: in elements.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def n_items(self) -> int:
        return math.prod(self.shape)


_ORDERED_DICT = Global("collections", "OrderedDict")
_TENSOR = Global("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_SET = Global("__builtin__", "set")
_BACKEND = Global("torch.nn.backends.thnn", "_get_thnn_function_backend")
_FUNCTIONS = {_ORDERED_DICT, _TENSOR, _PARAMETER, _SET, _BACKEND}
_STORAGES = {Global("torch", kind) for kind in ITEM_SIZE}
_MODULES = {
    Global("torch.nn.modules.conv", "Conv1d"),
    Global("torch.nn.modules.conv", "ConvTranspose1d"),
    Global("torch.nn.modules.container", "ModuleList"),
    Global("torch.nn.utils.weight_norm", "WeightNorm"),
}
# The published classes, whatever package their two files were put in.
_WAVEGLOW_FILES = {"glow", "glow_old"}
_WAVEGLOW_CLASSES = {"WaveGlow", "WN", "Invertible1x1Conv"}

_CONSTANTS: dict[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE",
    # What Python 2 writes for str.
    "BINSTRING",
    "SHORT_BINSTRING",
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickle(file: BinaryIO, storages: dict[str, Storage] | None = None) -> object:
    """The plain data of the pickle that starts here; the file is left behind its end.

    Args:
        file: open for reading.
        storages: filled with the storages that the pickle refers to, by key.

    Raises:
        CheckpointError: damaged, or with any name or operation that is not on the list.
    """
    machine = _Machine({} if storages is None else storages)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count == MAX_OPERATIONS:
                raise CheckpointError(f"its pickle has more than {MAX_OPERATIONS:,} operations")
            machine.step(opcode.name, argument)
        (result,) = machine.stack
        return result
    except (ValueError, IndexError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"its pickle is damaged: {type(error).__name__}: {reason}") from error


class _Machine:
    """The stack machine of PEP 307, without what imports, calls or sets attributes."""

    def __init__(self, storages: dict[str, Storage]) -> None:
        self.stack: list[object] = []
        self.outer: list[list[object]] = []
        self.memo: dict[int, object] = {}
        self.storages = storages

    def step(self, operation: str, argument: object) -> None:
        """One operation; its argument is an int, float, str or None."""
        push = self.stack.append
        if operation in _VALUES:
            push(argument)
        elif operation in _CONSTANTS:
            push(_CONSTANTS[operation])
        elif operation in ("BINPUT", "LONG_BINPUT"):
            self.memo[_as(int, argument)] = self.stack[-1]
        elif operation in ("BINGET", "LONG_BINGET"):
            push(self.memo[_as(int, argument)])
        elif operation == "MARK":
            self.outer.append(self.stack)
            self.stack = []
        elif operation == "TUPLE":
            whole = tuple(self._since_mark())
            self.stack.append(whole)
        elif operation in _TUPLES:
            push(tuple([self.stack.pop() for _ in range(_TUPLES[operation])][::-1]))
        elif operation == "EMPTY_TUPLE":
            push(())
        elif operation == "EMPTY_LIST":
            push([])
        elif operation == "EMPTY_DICT":
            push({})
        elif operation in ("APPEND", "APPENDS"):
            items = [self.stack.pop()] if operation == "APPEND" else self._since_mark()
            _as(list, self.stack[-1]).extend(items)
        elif operation in ("SETITEM", "SETITEMS"):
            items = self._last_two() if operation == "SETITEM" else self._since_mark()
            _fill(self.stack[-1], list(zip(items[::2], items[1::2], strict=True)))
        elif operation == "GLOBAL":
            push(_listed(*_as(str, argument).split(" ", 1)))
        elif operation == "BINPERSID":
            push(self._persistent(_as(tuple, self.stack.pop())))
        elif operation == "REDUCE":
            function, arguments = self._last_two()
            push(_rebuilt(_as(Global, function), _as(tuple, arguments)))
        elif operation == "NEWOBJ":
            kind, arguments = self._last_two()
            push(_new_record(_as(Global, kind), arguments))
        elif operation == "BUILD":
            target, state = self._last_two()
            push(_with_state(target, _as(dict, state)))
        elif operation not in ("PROTO", "STOP"):
            raise CheckpointError(
                f"its pickle uses {operation}, which a checkpoint written by torch.save does not: "
                "refused, and nothing was run"
            )

    def _since_mark(self) -> list[object]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def _last_two(self) -> list[object]:
        second = self.stack.pop()
        return [self.stack.pop(), second]

    def _persistent(self, identity: tuple[object, ...]) -> object:
        """A storage, or (legacy container) a class that comes with its source, which is ignored."""
        what, kind = _as(str, identity[0]), _as(Global, identity[1])
        if what == "module":
            return kind
        if what != "storage" or kind not in _STORAGES:
            raise CheckpointError(f"its pickle refers to a {what:.60} of type {kind}: refused")
        _, _, key, _device, n_items, *views = identity
        if any(view is not None for view in views):
            raise CheckpointError("its storages are views of others, which ended before WaveGlow")
        storage = Storage(kind.name, _as(str, key), _natural(n_items))
        if self.storages.setdefault(storage.key, storage) != storage:
            raise CheckpointError(f"its storage {storage.key!r:.60} has two types or sizes")
        return storage


def _listed(module: str, name: str) -> Global:
    found = Global(module, name)
    is_waveglow = module.rpartition(".")[2] in _WAVEGLOW_FILES and name in _WAVEGLOW_CLASSES
    if is_waveglow or found in _FUNCTIONS | _STORAGES | _MODULES:
        return found
    raise CheckpointError(
        f"it refers to {module:.60}.{name:.60}, which no WaveGlow checkpoint needs: refused, and "
        "nothing was run"
    )


def _rebuilt(function: Global, arguments: tuple[object, ...]) -> object:
    """What the functions of the list would return, as plain data."""
    if function == _TENSOR:
        storage, offset, shape, strides, *_ = arguments
        return _tensor(_as(Storage, storage), offset, _as(tuple, shape), _as(tuple, strides))
    if function == _PARAMETER:
        return _as(TensorRef, arguments[0])
    if function == _ORDERED_DICT:
        pairs = [_as(list, pair) for pair in (_as(list, arguments[0]) if arguments else [])]
        result: dict[object, object] = {}
        _fill(result, [(key, value) for key, value in pairs])
        return result
    if function == _SET:
        return _as(list, arguments[0])
    if function == _BACKEND:
        return None
    raise CheckpointError(f"its pickle calls {function}: refused, and nothing was run")


def _tensor(
    storage: Storage, offset: object, shape: tuple[object, ...], strides: tuple[object, ...]
) -> TensorRef:
    if len(shape) > MAX_AXES:
        raise CheckpointError(f"its pickle has a tensor of {len(shape)} axes")
    tensor = TensorRef(
        storage,
        _natural(offset),
        tuple(_natural(size) for size in shape),
        tuple(_natural(stride) for stride in strides),
    )
    steps = zip(tensor.shape, tensor.strides, strict=True)
    last = tensor.offset + sum((size - 1) * stride for size, stride in steps)
    # A tensor that repeats elements (a stride of 0) could ask for any amount of memory.
    if tensor.n_items and (last >= storage.n_items or tensor.n_items > storage.n_items):
        raise CheckpointError(
            f"a tensor of shape {list(tensor.shape)!s:.60} reaches beyond its storage of "
            f"{storage.n_items:,} elements"
        )
    return tensor


def _new_record(kind: Global, arguments: object) -> Record:
    if arguments != () or kind in _FUNCTIONS | _STORAGES:
        raise CheckpointError(f"its pickle makes a {kind} from arguments: refused")
    return Record(kind)


def _with_state(target: object, state: dict[object, object]) -> object:
    if isinstance(target, Record):
        target.state = {_as(str, name): value for name, value in state.items()}
    elif not isinstance(target, dict):  # an OrderedDict's attributes are of no use
        raise CheckpointError(f"its pickle sets the state of a {type(target).__name__}: refused")
    return target


def _fill(target: object, pairs: list[tuple[object, object]]) -> None:
    for key, value in pairs:
        if type(key) not in (str, int):
            raise CheckpointError(f"its pickle has a dict key of type {type(key).__name__}")
        _as(dict, target)[key] = value


def _natural(value: object) -> int:
    count = _as(int, value)
    if count < 0:
        raise CheckpointError(f"its pickle has {count} where a count belongs")
    return count


def _as(kind: type[T], value: object) -> T:
    """The value, if it is of the kind and of no other.

    Messages name types alone: what lists a list that lists a list twice has no end when printed.
    """
    if type(value) is not kind:
        raise CheckpointError(
            f"its pickle has a {type(value).__name__} where a {kind.__name__} belongs"
        )
    return value
