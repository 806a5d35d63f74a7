"""Files that try to execute code or to exhaust the reader: none succeeds.

A payload that works creates a file, the canary. The tests also check that the payloads do work when
Python's own unpickler reads them; otherwise they would prove nothing.
"""

import copyreg
import io
import json
import os
import pickle
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from waveflow.audio.io import read_mel
from waveflow.cli.main import main
from waveflow.errors import CheckpointError, MelMismatchError
from waveflow.foreign import reader, sandbox
from waveflow.foreign.convert import convert
from waveflow.limits import PICKLE_BYTES
from waveflow.torchfile import unpickle

FIXTURES = Path(__file__).parent / "fixtures"
EXTENSION = 0xF7
Payload = Callable[[Path], bytes]

# --- pickles by hand ---


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def stack_name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x10" + value.to_bytes(16, "little", signed=True)


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def list_of(*items: bytes) -> bytes:
    return b"](" + b"".join(items) + b"e"


def dict_of(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + tuple_of(*arguments) + b"R"


def two(data: bytes) -> bytes:
    return b"\x80\x02" + data + b"."


def four(data: bytes) -> bytes:
    return b"\x80\x04" + data + b"."


def shell(canary: Path) -> bytes:
    return text(f"touch '{canary}'")


def code(canary: Path) -> bytes:
    return text(f"open({str(canary)!r}, 'w').close()")


def system(canary: Path) -> bytes:
    return two(call(name("os", "system"), shell(canary)))


ORDERED_DICT = name("collections", "OrderedDict")
TENSOR = name("torch._utils", "_rebuild_tensor_v2")
MODULE = name("glow", "WaveGlow") + b")\x81"

# Each of these creates the canary when pickle.loads reads it.
ARMED: dict[str, Payload] = {
    "os.system": system,
    "posix.system": lambda c: two(call(name("posix", "system"), shell(c))),
    "os.mkdir": lambda c: two(call(name("os", "mkdir"), text(str(c)))),
    "open": lambda c: two(call(name("builtins", "open"), text(str(c)), text("w"))),
    "io.open": lambda c: two(call(name("io", "open"), text(str(c)), text("w"))),
    "eval": lambda c: two(call(name("builtins", "eval"), code(c))),
    "exec": lambda c: two(call(name("builtins", "exec"), code(c))),
    "eval_of_python_2": lambda c: two(call(name("__builtin__", "eval"), code(c))),
    "profile": lambda c: two(call(name("cProfile", "run"), code(c))),
    "compiled": lambda c: two(
        call(
            name("runpy", "_run_code"),
            call(name("builtins", "compile"), code(c), text("x"), text("exec")),
            b"}",
        )
    ),
    "subprocess": lambda c: two(
        call(name("subprocess", "call"), list_of(text("touch"), text(str(c))))
    ),
    "getattr": lambda c: two(
        call(
            call(
                name("builtins", "getattr"),
                call(name("builtins", "__import__"), text("os")),
                text("system"),
            ),
            shell(c),
        )
    ),
    "getattr_chain": lambda c: two(
        call(
            call(
                name("builtins", "getattr"),
                call(
                    name("builtins", "getattr"),
                    call(name("importlib", "import_module"), text("shutil")),
                    text("os"),
                ),
                text("system"),
            ),
            shell(c),
        )
    ),
    "attrgetter": lambda c: two(
        call(
            call(
                call(name("operator", "attrgetter"), text("os.system")),
                call(name("importlib", "import_module"), text("shutil")),
            ),
            shell(c),
        )
    ),
    "methodcaller": lambda c: two(
        call(
            call(name("operator", "methodcaller"), text("system"), shell(c)),
            call(name("importlib", "import_module"), text("os")),
        )
    ),
    "partial": lambda c: two(
        call(call(name("functools", "partial"), name("os", "system"), shell(c)))
    ),
    "map": lambda c: two(
        call(
            name("builtins", "list"),
            call(name("builtins", "map"), name("os", "system"), list_of(shell(c))),
        )
    ),
    "stack_global": lambda c: four(call(stack_name("os", "system"), shell(c))),
    "stack_global_of_builtins": lambda c: four(call(stack_name("builtins", "exec"), code(c))),
    "stack_global_with_dots": lambda c: four(call(stack_name("shutil", "os.system"), shell(c))),
    "global_with_dots": lambda c: four(call(name("posixpath", "os.system"), shell(c))),
    "through_torch": lambda c: four(call(name("torch.serialization", "os.system"), shell(c))),
    "through_an_allowed_module": lambda c: four(
        call(name("collections", "_sys.modules.__getitem__"), text("os"))
        + b"0"
        + call(name("shutil", "os.system"), shell(c))
    ),
    "inst": lambda c: b"(S" + repr(f"touch '{c}'").encode() + b"\nios\nsystem\n.",
    "obj": lambda c: b"(" + name("os", "system") + shell(c) + b"o.",
    "extension": lambda c: two(call(b"\x82" + bytes([EXTENSION]), shell(c))),
    "nested": lambda c: four(
        call(name("pickle", "loads"), b"B" + struct.pack("<I", len(system(c))) + system(c))
    ),
    "setstate": lambda c: two(
        call(name("types", "SimpleNamespace"))
        + dict_of(__setstate__=name("os", "system"))
        + b"b"
        + shell(c)
        + b"b"
    ),
    "append": lambda c: two(
        call(name("types", "SimpleNamespace"))
        + dict_of(append=name("os", "system"))
        + b"b"
        + shell(c)
        + b"a"
    ),
    "in_a_module": lambda c: two(
        name("torch.nn.modules.container", "ModuleList")
        + b")\x81"
        + dict_of(x=call(name("os", "system"), shell(c)))
        + b"b"
    ),
    "as_a_key": lambda c: two(b"}" + call(name("os", "system"), shell(c)) + b"Ns"),
    "in_the_optimizer": lambda c: two(
        dict_of(model=b"}", optimizer=call(name("os", "system"), shell(c)))
    ),
    "after_the_model": lambda c: two(tuple_of(b"}", call(name("os", "system"), shell(c)))),
}

# --- data that would harm a reader that trusts it ---


def storage(n_items: bytes, kind: bytes = name("torch", "FloatStorage")) -> bytes:
    return tuple_of(text("storage"), kind, text("0"), text("cpu"), n_items) + b"Q"


def view(stored: int, offset: bytes, shape: list[bytes], strides: list[bytes]) -> bytes:
    axes = (tuple_of(*shape), tuple_of(*strides))
    return call(TENSOR, storage(number(stored)), offset, *axes, b"\x89", ORDERED_DICT + b")R")


def model(weight: bytes) -> bytes:
    return dict_of(**{"upsample.weight": weight})


def tensor(stored: int, offset: bytes, shape: list[bytes], strides: list[bytes]) -> bytes:
    return two(dict_of(model=model(view(stored, offset, shape, strides))))


def beside(payload: bytes) -> bytes:
    """The payload in one checkpoint with a model of one tensor."""
    good = model(view(4, number(0), [number(4)], [number(1)]))
    # The memo is numbered: the payload goes first.
    return b"\x80\x04}(" + text("beside") + payload[:-1] + text("model") + good + b"u."


def laughing(kind: str, levels: int = 60) -> bytes:
    """A list or tuple that has the same one twice, and so on: 2^60 items, 60 in memory."""
    data = (b"]" if kind == "list" else b")") + b"q\x00"
    for level in range(1, levels):
        twice = (b"h" + bytes([level - 1])) * 2
        held = b"](" + twice + b"e" if kind == "list" else twice + b"\x86"
        data += held + b"q" + bytes([level])
    # All are in one tuple, the largest last.
    return b"(" + data + b"t"


def nested_modules(levels: int, twice: bool) -> bytes:
    """Modules in modules, each once or twice in the next."""
    data = MODULE + b"q\x00"
    for level in range(levels):
        below = b"j" + struct.pack("<I", level)
        inner = dict_of(a=below, b=below) if twice else dict_of(a=below)
        data += MODULE + b"r" + struct.pack("<I", level + 1) + dict_of(_modules=inner) + b"b"
    outermost = b"j" + struct.pack("<I", levels)
    # A dict's key may be any earlier value, and 0 is a value.
    return two(b"(" + data + b"t}(" + text("model") + outermost + b"u\x86")


def model_of(data: bytes) -> bytes:
    return two(dict_of(model=data))


INERT: dict[str, bytes] = {
    # Names and calls.
    "unknown_name": two(name("glow", "os")),
    "name_with_dots": two(name("glow", "WaveGlow.__init__.__globals__")),
    "name_in_a_package": two(name("os.glow", "system")),
    "empty_names": two(name("", "")),
    "method_of_the_allowed": two(name("collections", "OrderedDict.fromkeys")),
    "reconstructor": two(
        call(name("copy_reg", "_reconstructor"), name("glow", "WN"), name("glow", "WN"), b"N")
    ),
    "torch_load": two(call(name("torch", "load"), text("x"))),
    "storage_from_bytes": two(call(name("torch.storage", "_load_from_bytes"), text("x"))),
    "class_as_function": two(call(name("torch.nn.modules.conv", "Conv1d"), number(1))),
    "text_as_function": two(call(text("os.system"), text("true"))),
    "dict_as_function": two(call(b"}", text("true"))),
    "arguments_as_list": two(ORDERED_DICT + b"]R"),
    "ordered_dict_of_a_number": two(call(ORDERED_DICT, number(5))),
    "ordered_dict_of_odd_pairs": two(call(ORDERED_DICT, list_of(list_of(text("a"))))),
    "set_of_a_number": two(call(name("__builtin__", "set"), number(5))),
    "parameter_of_nothing": two(name("torch._utils", "_rebuild_parameter") + b")R"),
    "parameter_of_text": two(call(name("torch._utils", "_rebuild_parameter"), text("x"))),
    "tensor_of_text": two(call(TENSOR, *[text("x")] * 6)),
    "tensor_of_nothing": two(TENSOR + b")R"),
    "new_function": two(TENSOR + b")\x81"),
    "new_storage": two(name("torch", "FloatStorage") + b")\x81"),
    "new_with_arguments": two(name("glow", "WN") + tuple_of(number(1)) + b"\x81"),
    "new_with_keywords": four(name("glow", "WN") + b")}\x92"),
    # States.
    "class_in_state": model_of(MODULE + dict_of(__class__=text("x"), __dict__=b"}") + b"b"),
    "setstate_in_state": model_of(
        MODULE + dict_of(__setstate__=TENSOR) + b"b" + dict_of(a=text("x")) + b"b"
    ),
    "state_of_text": model_of(MODULE + text("x") + b"b"),
    "state_of_two": model_of(MODULE + tuple_of(b"N", dict_of(__class__=text("x"))) + b"b"),
    "state_of_a_name": two(name("glow", "WN") + dict_of(a=text("x")) + b"b"),
    "state_of_a_list": two(b"]" + dict_of(append=text("x")) + b"b"),
    "state_keys": model_of(MODULE + b"}(" + number(1) + text("x") + b"ub"),
    "append_to_a_dict": two(b"}" + text("x") + b"a"),
    "item_of_a_list": two(b"]" + number(0) + text("x") + b"s"),
    "item_of_a_module": two(MODULE + text("x") + text("y") + b"s"),
    # Persistent ids.
    "id_of_text": two(text("x") + b"Q"),
    "id_as_text": b"Pos.system\n.",
    "id_of_nothing": two(b")Q"),
    "id_of_a_code": two(tuple_of(text("code"), name("glow", "WN")) + b"Q"),
    "id_of_a_text_class": two(tuple_of(text("storage"), text("FloatStorage")) + b"Q"),
    "id_of_a_module_class": two(storage(number(1), name("glow", "WN"))),
    "id_too_short": two(tuple_of(text("storage"), name("torch", "FloatStorage")) + b"Q"),
    # Bombs.
    "lists_that_double": model_of(laughing("list")),
    "tuples_that_double": model_of(laughing("tuple")),
    "doubled_key": two(b"}" + laughing("tuple") + b"Ns"),
    "doubled_in_a_set": four(b"\x8f(" + laughing("tuple") + b"\x90"),
    "doubled_in_a_frozenset": four(b"(" + laughing("tuple") + b"\x91"),
    "doubled_id": two(laughing("tuple") + b"Q"),
    "doubled_key_of_a_storage": two(
        tuple_of(
            text("storage"),
            name("torch", "FloatStorage"),
            laughing("tuple"),
            text("cpu"),
            number(1),
        )
        + b"Q"
    ),
    "doubled_function": two(laughing("tuple") + b")R"),
    "modules_that_double": nested_modules(60, twice=True),
    "module_in_itself": two(MODULE + b"q\x00" + dict_of(_modules=dict_of(a=b"h\x00")) + b"b"),
    "modules_a_thousand_deep": nested_modules(1000, twice=False),
    "tuples_deep": two(b")" + b"\x85" * 100_000),
    "lists_deep": two(b"]" * 30_000 + b"a" * 29_999),
    "memo_far_out": two(b"Nr" + b"\xff" * 4 + b"j" + b"\xff" * 4),
    "bytearray_of_8_eb": b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f" + b".",
    "memo_missing": two(b"h\x07"),
    "text_of_4_gb": two(b"X" + b"\xff" * 4 + b"x"),
    "text_of_8_eb": four(b"\x8d" + b"\xff" * 7 + b"\x7f" + b"x"),
    "bytes_of_8_eb": four(b"\x8e" + b"\xff" * 7 + b"\x7f" + b"x"),
    "frame_of_8_eb": four(b"\x95" + b"\xff" * 7 + b"\x7f" + b"N"),
    "long_integer": two(b"\x8b" + struct.pack("<i", 10**6) + b"\x01" * 10**6),
    "negative_integer_size": two(b"\x8b" + struct.pack("<i", -1)),
    "decimal_integer": b"I" + b"9" * 100_000 + b"\n.",
    # Grammar.
    "nothing": b".",
    "no_end": b"\x80\x02N",
    "two_results": two(b"NN"),
    "mark_without_end": two(b"(N"),
    "end_without_mark": two(b"Nt"),
    "pop": two(b"N0N"),
    "odd_items": two(b"}(" + text("a") + b"u"),
    "stack_underflow": two(b"\x87"),
    "unknown_operation": two(b"\xff"),
    "protocol_9": b"\x80\x09N.",
    "text_that_is_none": two(b"X\x02\x00\x00\x00\xff\xfe"),
    "buffer": b"\x80\x05\x97.",
}


def stored_twice(one: bytes, other: bytes) -> bytes:
    return two(tuple_of(storage(one), storage(other)))


# Tensors of the model, and the reason to refuse each.
TENSORS: dict[str, tuple[bytes, str]] = {
    "huge_tensor": (tensor(10**14, number(0), [number(10**14)], [number(1)]), "another size"),
    "huge_shape": (tensor(4, number(0), [number(10**14)], [number(1)]), "more numbers"),
    "expanded": (tensor(4, number(0), [number(10**12)], [number(0)]), "more numbers"),
    "overflowing": (tensor(4, number(0), [number(2**40)] * 2, [number(2**40)] * 2), "more numbers"),
    "negative_stride": (tensor(4, number(3), [number(4)], [number(-1)]), "odd sizes"),
    "negative_offset": (tensor(4, number(-4), [number(4)], [number(1)]), "odd sizes"),
    "negative_size": (tensor(4, number(0), [number(-2), number(-2)], [number(1)] * 2), "odd sizes"),
    "offset_beyond": (tensor(4, number(1), [number(4)], [number(1)]), "beyond its storage"),
    "stride_beyond": (tensor(4, number(0), [number(4)], [number(2)]), "beyond its storage"),
    "strides_missing": (tensor(4, number(0), [number(2), number(2)], [number(1)]), "no weights"),
    "many_axes": (tensor(1, number(0), [number(1)] * 500, [number(1)] * 500), "odd sizes"),
    "bool_as_size": (tensor(4, number(0), [b"\x88"], [number(1)]), "odd sizes"),
    "float_as_size": (
        tensor(4, number(0), [b"G" + struct.pack(">d", 2.0)], [number(1)]),
        "odd sizes",
    ),
    "doubled_shape": (tensor(4, number(0), [laughing("tuple")], [number(1)]), "odd sizes"),
    "storage_that_is_a_view": (
        two(
            tuple_of(
                text("storage"),
                name("torch", "FloatStorage"),
                text("0"),
                text("cpu"),
                number(4),
                tuple_of(text("1"), number(0), number(1)),
            )
            + b"Q"
        ),
        "views of others",
    ),
    "storage_of_two_sizes": (stored_twice(number(1), number(2)), "two types or sizes"),
    "storage_of_negative_size": (two(storage(number(-1))), "without a type, a name or a size"),
    "storage_of_text_size": (two(storage(text("1"))), "without a type, a name or a size"),
    "storage_of_integers": (
        two(
            dict_of(
                model=model(
                    call(
                        TENSOR,
                        storage(number(4), name("torch", "IntStorage")),
                        number(0),
                        tuple_of(number(4)),
                        tuple_of(number(1)),
                        b"\x89",
                        ORDERED_DICT + b")R",
                    )
                )
            )
        ),
        "no weights",
    ),
}


# --- containers ---


def zipped(payload: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/data/0", bytes(16))
        archive.writestr("archive/version", b"3\n")
    return file.getvalue()


def legacy(payload: bytes) -> bytes:
    keys = ["0"] if text("0") in payload else []
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, machine)]
    return b"".join([*head, payload, pickle.dumps(keys, 2), struct.pack("<q", 4), bytes(16)])


CONTAINERS = {"zip": zipped, "legacy": legacy}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture(autouse=True)
def _extension():
    """Fills the registry that the operation EXT1 reads, as some library might."""
    copyreg.add_extension("os", "system", EXTENSION)
    yield
    copyreg.remove_extension("os", "system", EXTENSION)


def read(data: bytes) -> dict[str, Tensor]:
    """The tensors of a file, read in this process."""
    file = io.BytesIO(data)
    _, tensors = sandbox.load(reader.describe(file).encode(), file)
    return tensors


def refusal(data: bytes) -> str:
    """The one line for a file, read in this process."""
    with pytest.raises(CheckpointError) as caught:
        read(data)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 500
    return message


PLAIN = {type(None), bool, int, float, str, bytes, tuple, list, dict}
PLAIN |= {unpickle.Name, unpickle.Record, unpickle.Storage, unpickle.TensorRef}


def is_plain(value: object) -> bool:
    """Whether a value and all values in it are of the types that can do nothing."""
    todo, seen = [value], {}
    while todo:
        value = todo.pop()
        if type(value) not in PLAIN:
            return False
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, unpickle.Record):
            todo += [value.kind, value.items, value.state]
        elif isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, tuple | list):
            todo += value
    return True


@pytest.mark.parametrize("kind", ARMED)
def test_the_payloads_work_elsewhere(canary: Path, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(Exception):  # some fail, too late
            pickle.loads(ARMED[kind](canary))
    assert canary.exists()


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", ARMED)
def test_nothing_is_executed(canary: Path, kind: str, container: str) -> None:
    refusal(CONTAINERS[container](ARMED[kind](canary)))
    assert not canary.exists()


# Operations that torch.save does not write, or calls of what a call gave.
REFUSED = {"inst", "obj", "extension", "getattr", "getattr_chain", "attrgetter", "methodcaller"}
REFUSED |= {"partial"}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", ARMED)
def test_beside_a_model_payloads_do_nothing(canary: Path, kind: str, container: str) -> None:
    data = CONTAINERS[container](beside(ARMED[kind](canary)))
    if kind in REFUSED:
        refusal(data)
    else:
        assert list(read(data)) == ["upsample.weight"]
    assert not canary.exists()


@pytest.mark.parametrize("kind", [*ARMED, *INERT])
def test_a_pickle_gives_plain_data_or_an_error(canary: Path, kind: str) -> None:
    data = ARMED[kind](canary) if kind in ARMED else INERT[kind]
    before = [dict(vars(it)) for it in (unpickle, unpickle.Name, unpickle.Record)]
    value = None
    with suppress(Exception):
        value = unpickle.read_pickle(io.BytesIO(data))
    assert is_plain(value)
    assert [dict(vars(it)) for it in (unpickle, unpickle.Name, unpickle.Record)] == before


def test_the_check_for_plain_data_sees_something() -> None:
    record = unpickle.Record()
    record.state["x"] = [(os.system,)]
    assert is_plain([1, "a", unpickle.Record()]) and not is_plain({"a": record})


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", INERT)
def test_odd_data_harm_nothing(kind: str, container: str) -> None:
    refusal(CONTAINERS[container](INERT[kind]))
    with suppress(CheckpointError):
        assert list(read(CONTAINERS[container](beside(INERT[kind])))) == ["upsample.weight"]


def test_depth_and_length_of_names_are_limited() -> None:
    """Else the names of many tensors in a thousand dicts, or under a long key, fill the memory."""
    deep = two(b"}" + (text("a") + b"}") * 1000 + b"s" * 1000)
    assert list(read(zipped(beside(deep)))) == ["upsample.weight"]
    good = model(view(4, number(0), [number(4)], [number(1)]))
    assert list(read(zipped(two(dict_of(**{"a" * 200: good}))))) == ["upsample.weight"]
    assert "no WaveGlow" in refusal(zipped(two(dict_of(**{"a" * 300: good}))))


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_stay_in_the_file(kind: str, container: str) -> None:
    payload, reason = TENSORS[kind]
    assert reason in refusal(CONTAINERS[container](payload))


@pytest.mark.parametrize("place", range(5))
def test_every_pickle_of_the_legacy_container_is_read_so(canary: Path, place: int) -> None:
    machine = {"little_endian": True}
    good = [pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, machine, {}, [])]
    parts = [*good[:place], system(canary), *good[place + 1 :]]
    refusal(b"".join(parts))
    assert not canary.exists()


def test_source_code_beside_a_class_is_ignored(canary: Path) -> None:
    source = f"open({str(canary)!r}, 'w')"
    identity = tuple_of(text("module"), name("glow", "WaveGlow"), text("glow.py"), text(source))
    weight = view(4, number(0), [number(4)], [number(1)])
    modules = dict_of(upsample=MODULE + dict_of(_parameters=dict_of(weight=weight)) + b"b")
    payload = two(dict_of(model=identity + b"Q)\x81" + dict_of(_modules=modules) + b"b"))
    assert list(read(legacy(payload))) == ["upsample.weight"]
    assert not canary.exists()


FOUR = tensor(4, number(0), [number(4)], [number(1)])
# Records of an archive, and the reason to refuse it.
ARCHIVES: dict[str, tuple[dict[str, bytes], str]] = {
    "upwards": ({"../../canary/data.pkl": FOUR, "../../canary/data/0": b"x"}, "another size"),
    "absolute": ({"/data.pkl": FOUR}, "is missing"),
    "two_roots": ({"a/data.pkl": FOUR, "a/data/0": bytes(16), "b/data.pkl": FOUR}, "did not write"),
    "no_pickle": ({"a/data": b"x"}, "did not write"),
    "big_endian": ({"a/data.pkl": FOUR, "a/byteorder": b"big"}, "big-endian"),
    "script": ({"a/data.pkl": FOUR, "a/constants.pkl": two(b")")}, "TorchScript"),
    "storage_too_small": ({"a/data.pkl": FOUR, "a/data/0": bytes(15)}, "another size"),
    "storage_too_large": ({"a/data.pkl": FOUR, "a/data/0": bytes(17)}, "another size"),
    "storage_missing": ({"a/data.pkl": FOUR}, "is missing"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives(kind: str) -> None:
    records, reason = ARCHIVES[kind]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for record, data in records.items():
            archive.writestr(record, data)
    assert reason in refusal(file.getvalue())


def twice_doubled() -> bytes:
    """A list of two equal tuples, whose comparison would take for ever."""
    return two(list_of(laughing("tuple"), laughing("tuple")))


LITTLE = pickle.dumps({"little_endian": True}, 2)
# Machine, names of storages, and the storages of a legacy file, and the reason to refuse it.
LEGACY: dict[str, tuple[bytes, bytes, bytes, str]] = {
    "big_endian": (pickle.dumps({"little_endian": False}, 2), b"", b"", "little-endian"),
    "no_machine": (pickle.dumps([1], 2), b"", b"", "little-endian"),
    "no_names": (LITTLE, two(number(5)), b"", "list of storages is damaged"),
    "odd_names": (LITTLE, twice_doubled(), b"", "list of storages is damaged"),
    "other_names": (LITTLE, pickle.dumps(["1"], 2), b"", "not that of its tensors"),
    "name_twice": (LITTLE, pickle.dumps(["0", "0"], 2), b"", "not that of its tensors"),
    "other_size": (
        LITTLE,
        pickle.dumps(["0"], 2),
        struct.pack("<q", 3) + bytes(16),
        "another size",
    ),
    "cut_off": (LITTLE, pickle.dumps(["0"], 2), struct.pack("<q", 4) + bytes(15), "cut off"),
}


@pytest.mark.parametrize("kind", LEGACY)
def test_legacy_files(kind: str) -> None:
    machine, names, storages, reason = LEGACY[kind]
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001)]
    assert reason in refusal(b"".join([*head, machine, FOUR, names, storages]))


def test_a_storage_that_names_another_file(tmp_path: Path) -> None:
    """Keys are looked up in the archive and nowhere else, links there are bytes."""
    (tmp_path / "secret").write_bytes(bytes(16))
    key = f"../../../..{tmp_path}/secret"
    pickled = tensor(4, number(0), [number(4)], [number(1)]).replace(text("0"), text(key))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        link = zipfile.ZipInfo("a/data/0")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, str(tmp_path / "secret"))
    assert "is missing" in refusal(file.getvalue())


def test_archives_that_expand() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", two(b"N" + b"\x85" * 10**6))
    assert "is compressed" in refusal(file.getvalue())


def test_archives_with_a_name_twice() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("a/data.pkl", two(b"}"))
        archive.writestr("a/data.pkl", two(b"]"))
    assert "two records" in refusal(file.getvalue())


def test_tensors_that_share_a_storage_cannot_outgrow_the_file() -> None:
    one = view(4, number(0), [number(4)], [number(1)])
    few = dict_of(**{"upsample.weight": one, "b": one, "c": one})
    assert len(read(zipped(model_of(few)))) == 3
    again = {f"a{i}": b"h\x01" for i in range(1000)}
    many = dict_of(**{"upsample.weight": one + b"q\x01", **again})
    assert "more numbers than the file" in refusal(zipped(model_of(many)))


def test_numbers_that_lie_far_apart_count_with_the_gaps() -> None:
    """Else small tensors could make the reader go through a large storage over and over."""
    data = zipped(FOUR)
    found = json.loads(reader.describe(io.BytesIO(data)))
    ends = found["tensors"]["upsample.weight"] | {"shape": [2], "strides": [3]}
    found["tensors"] = {str(i): ends for i in range(len(data) // 12)}
    with pytest.raises(CheckpointError, match="more numbers than the file"):
        sandbox.load(json.dumps(found).encode(), io.BytesIO(data))


def test_tensors_without_elements() -> None:
    data = zipped(tensor(4, number(9), [number(2**40), number(0), number(2**40)], [number(1)] * 3))
    assert read(data)["upsample.weight"].numel() == 0


@pytest.mark.parametrize("container", CONTAINERS)
def test_large_pickles(monkeypatch: pytest.MonkeyPatch, container: str) -> None:
    payload = CONTAINERS[container](two(b"(" + b"N" * 1000 + b"t"))
    assert "no WaveGlow" in refusal(payload)
    monkeypatch.setenv(PICKLE_BYTES.name, "1000")
    assert "no WaveGlow" not in refusal(payload)


def test_numbers_that_are_damaged() -> None:
    good = zipped(tensor(4, number(0), [number(4)], [number(1)]))
    assert read(good)["upsample.weight"].tolist() == [0, 0, 0, 0]
    place = good.index(b"archive/data/0") + len("archive/data/0")
    damaged = good[:place] + b"\x01" + good[place + 1 :]
    assert "is cut off or damaged" in refusal(damaged)


DESCRIPTIONS: dict[str, dict[str, object]] = {
    "place": {"place": (10**9, None)},
    "negative_place": {"place": (-4, None)},
    "offset": {"offset": 2},
    "negative_offset": {"offset": -1},
    "strides": {"strides": (3,)},
    "negative_stride": {"strides": (-1,)},
    "no_strides": {"strides": ()},
    "size": {"n_items": 100, "shape": (100,)},
    "repeated": {"shape": (10**12,), "strides": (0,)},
    "kind": {"kind": "LongStorage"},
    "text": {"shape": "4"},
    "field": {"path": "/etc/passwd"},
}


@pytest.mark.parametrize("kind", [*DESCRIPTIONS, "nothing"])
def test_the_output_of_the_process_is_checked(kind: str) -> None:
    """Even if a file could make the process say what it wants."""
    file = io.BytesIO(zipped(tensor(4, number(0), [number(4)], [number(1)])))
    found = json.loads(reader.describe(file))
    found["tensors"]["upsample.weight"] |= DESCRIPTIONS.get(kind, {})
    with pytest.raises(CheckpointError):
        sandbox.load(b"" if kind == "nothing" else json.dumps(found).encode(), file)


@pytest.mark.parametrize("container", CONTAINERS)
def test_files_of_older_versions(container: str) -> None:
    """Python 2 wrote texts as bytes, and gave an OrderedDict its items as an argument."""

    def short(data: bytes) -> bytes:
        return b"U" + bytes([len(data)]) + data

    rebuild, one = name("torch._utils", "_rebuild_tensor"), number(1)
    weight = call(rebuild, storage(number(4)), number(0), tuple_of(number(4)), tuple_of(one))
    weights = call(ORDERED_DICT, list_of(list_of(short(b"upsample.weight"), weight)))
    data = two(b"}(" + short(b"state_dict") + weights + short(b"by") + short(b"M\xfcller") + b"u")
    assert list(read(CONTAINERS[container](data))) == ["upsample.weight"]


# --- as a process, and from the command line ---


@pytest.mark.parametrize("kind", ["os.system", "in_the_optimizer"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_the_whole_way(tmp_path: Path, canary: Path, kind: str, container: str) -> None:
    path = tmp_path / "hostile.pt"
    path.write_bytes(CONTAINERS[container](ARMED[kind](canary)))
    with pytest.raises(CheckpointError) as caught:
        convert(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["hostile.pt"]


def test_names_cannot_steer_a_terminal(tmp_path: Path) -> None:
    path, odd = tmp_path / "odd.pt", "\x1b[31mred\nlines\r\x07\u202eturned"
    one, lone = view(4, number(0), [number(4)], [number(1)]), b"X\x03\x00\x00\x00\xed\xa0\x80"
    files = [
        zipped(two(tuple_of(text("storage"), stack_name(odd, odd)) + b"Q")),
        zipped(four(call(stack_name(odd, odd)))),
        zipped(two(b"}" + lone + b"Ns")),
        zipped(model_of(dict_of(**{odd: one}))),
        zipped(model_of(dict_of(**{"upsample.weight": one, odd: one}))),
        safetensors.torch.save({odd: torch.zeros(1)}),
        safetensors.torch.save({"upsample.weight": torch.zeros(1), odd: torch.zeros(1)}),
    ]
    for data in files:
        path.write_bytes(data)
        with pytest.raises(CheckpointError) as caught:
            convert(path)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", ["modules_that_double", "doubled_key", "text_of_4_gb"])
def test_the_whole_way_of_bombs(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bomb.pt"
    path.write_bytes(legacy(INERT[kind]))
    with pytest.raises(CheckpointError):
        convert(path)


class Touch:
    """Pickles to a call of open()."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


def write_npy(path: Path, hostile: object) -> None:
    np.save(path.with_suffix(".npy"), np.array([[hostile]], dtype=object), allow_pickle=True)


def write_npz(path: Path, hostile: object) -> None:
    np.savez(path.with_suffix(".npz"), mel=np.array([[hostile]], dtype=object))


def write_bare(path: Path, hostile: object, suffix: str) -> None:
    path.with_suffix(suffix).write_bytes(pickle.dumps(hostile))


def write_torch(path: Path, hostile: object, new: bool) -> None:
    torch.save(hostile, path.with_suffix(".pt"), _use_new_zipfile_serialization=new)


MELS: dict[str, Callable[[Path, object], None]] = {
    "npy": write_npy,
    "npz": write_npz,
    "bare_npy": partial(write_bare, suffix=".npy"),
    "bare_pt": partial(write_bare, suffix=".pt"),
    "zip_pt": partial(write_torch, new=True),
    "legacy_pt": partial(write_torch, new=False),
}


@pytest.mark.parametrize("kind", MELS)
def test_mels(
    tmp_path: Path, tiny_model: Path, canary: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mels"
    folder.mkdir()
    MELS[kind](folder / "mel", Touch(canary))
    (path,) = folder.iterdir()
    with pytest.raises(MelMismatchError):
        read_mel(path)
    out = tmp_path / "out.wav"
    assert main(["vocode", str(path), "-o", str(out), "--model", str(tiny_model)]) == 2
    assert str(path) in capsys.readouterr().err
    assert not out.exists() and not canary.exists()


# --- damage ---


@pytest.mark.parametrize(
    ("file", "n_flips"),
    [
        ("zip/waveglow_4000", 20),
        ("legacy/waveglow_4000", 20),
        ("dle/checkpoint_WaveGlow_module1.pt", 60),
    ],
)
def test_damaged_files_are_read_or_refused(file: str, n_flips: int) -> None:
    """A flipped byte in the pickle or in the container gives no other error."""
    path = FIXTURES / f"nvidia-waveglow-{file}"
    good, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(n_flips):
        data = bytearray(good)
        # Half of the flips in the pickle, which lies at the start; the rest anywhere.
        end = rng.choice([20_000, len(data)])
        data[rng.randrange(end)] ^= rng.randrange(1, 256)
        try:
            read(bytes(data))
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 5
    for _ in range(10):
        refusal(good[: rng.randrange(len(good))])
