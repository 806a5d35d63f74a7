"""Files that want to be run: none of them is, and each gives one typed error.

A payload that works makes a canary, a file that must stay away. That the payloads do work where
Python's own unpickler reads them is checked too: else this file would test nothing.
"""

import copyreg
import io
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

from waveflow.audio.io import read_mel
from waveflow.cli.main import main
from waveflow.errors import CheckpointError, MelMismatchError
from waveflow.foreign import reader, unpickle
from waveflow.foreign.convert import convert

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

# Each of these makes the canary when pickle.loads reads it.
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

# --- data that would hurt a reader that believes it ---


def storage(n_items: bytes, kind: bytes = name("torch", "FloatStorage")) -> bytes:
    return tuple_of(text("storage"), kind, text("0"), text("cpu"), n_items) + b"Q"


def view(stored: int, offset: bytes, shape: list[bytes], strides: list[bytes]) -> bytes:
    axes = (tuple_of(*shape), tuple_of(*strides))
    return call(TENSOR, storage(number(stored)), offset, *axes, b"\x89", ORDERED_DICT + b")R")


def tensor(stored: int, offset: bytes, shape: list[bytes], strides: list[bytes]) -> bytes:
    return two(dict_of(model=dict_of(a=view(stored, offset, shape, strides))))


def laughing(kind: str, levels: int = 60) -> bytes:
    """A list or tuple that holds one twice that holds one twice: 2^60 items, 60 in memory."""
    data = (b"]" if kind == "list" else b")") + b"q\x00"
    for level in range(1, levels):
        twice = (b"h" + bytes([level - 1])) * 2
        held = b"](" + twice + b"e" if kind == "list" else twice + b"\x86"
        data += held + b"q" + bytes([level])
    # All of them in one tuple, whose last is the largest.
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
    "id_with_a_view": two(
        tuple_of(
            text("storage"),
            name("torch", "FloatStorage"),
            text("0"),
            text("cpu"),
            number(1),
            tuple_of(text("1"), number(0), number(1)),
        )
        + b"Q"
    ),
    "storage_of_two_sizes": two(tuple_of(storage(number(1)), storage(number(2)))),
    "storage_of_negative_size": two(storage(number(-1))),
    "storage_of_text_size": two(storage(text("1"))),
    # Tensors.
    "huge_tensor": tensor(10**15, number(0), [number(10**15)], [number(1)]),
    "huge_shape": tensor(4, number(0), [number(10**15)], [number(1)]),
    "expanded": tensor(4, number(0), [number(10**12)], [number(0)]),
    "overflowing": tensor(4, number(0), [number(2**40)] * 2, [number(2**40)] * 2),
    "negative_stride": tensor(4, number(3), [number(4)], [number(-1)]),
    "negative_offset": tensor(4, number(-4), [number(4)], [number(1)]),
    "negative_size": tensor(4, number(0), [number(-2), number(-2)], [number(1)] * 2),
    "offset_beyond": tensor(4, number(1), [number(4)], [number(1)]),
    "stride_beyond": tensor(4, number(0), [number(4)], [number(2)]),
    "strides_missing": tensor(4, number(0), [number(2), number(2)], [number(1)]),
    "many_axes": tensor(1, number(0), [number(1)] * 500, [number(1)] * 500),
    "bool_as_size": tensor(4, number(0), [b"\x88"], [number(1)]),
    "float_as_size": tensor(4, number(0), [b"G" + struct.pack(">d", 2.0)], [number(1)]),
    # Bombs.
    "lists_that_double": model_of(laughing("list")),
    "tuples_that_double": model_of(laughing("tuple")),
    "doubled_key": two(b"}" + laughing("tuple") + b"Ns"),
    "doubled_shape": tensor(4, number(0), [laughing("tuple")], [number(1)]),
    "doubled_id": two(laughing("tuple") + b"Q"),
    "doubled_function": two(laughing("tuple") + b")R"),
    "modules_that_double": nested_modules(60, twice=True),
    "module_in_itself": two(MODULE + b"q\x00" + dict_of(_modules=dict_of(a=b"h\x00")) + b"b"),
    "modules_a_thousand_deep": nested_modules(1000, twice=False),
    "tuples_deep": two(b")" + b"\x85" * 100_000),
    "lists_deep": two(b"]" * 100_000 + b"a" * 99_999),
    "memo_far_out": two(b"Nr" + b"\xff" * 4 + b"j" + b"\xff" * 4),
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


# --- containers ---


def zipped(payload: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/data/0", bytes(16))
        archive.writestr("archive/version", b"3\n")
    return file.getvalue()


def legacy(payload: bytes, keys: tuple[str, ...] = ("0",)) -> bytes:
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, machine)]
    return b"".join([*head, payload, pickle.dumps(list(keys), 2), struct.pack("<q", 4), bytes(16)])


CONTAINERS = {"zip": zipped, "legacy": legacy}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture(autouse=True)
def _extension():
    """The registry that the opcode EXT1 looks names up in, as some library may have filled it."""
    copyreg.add_extension("os", "system", EXTENSION)
    yield
    copyreg.remove_extension("os", "system", EXTENSION)


def refusal(data: bytes) -> str:
    """The one line for a file, read in this process."""
    with pytest.raises(CheckpointError) as caught:
        reader.write(io.BytesIO(data), io.BytesIO())
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize("kind", ARMED)
def test_the_payloads_work_elsewhere(canary: Path, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(Exception):  # some fail, too late
            pickle.loads(ARMED[kind](canary))
    assert canary.exists()


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", ARMED)
def test_nothing_is_run(canary: Path, kind: str, container: str) -> None:
    message = refusal(CONTAINERS[container](ARMED[kind](canary)))
    assert not canary.exists()
    assert "refused" in message


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", INERT)
def test_nothing_is_believed(kind: str, container: str) -> None:
    refusal(CONTAINERS[container](INERT[kind]))


@pytest.mark.parametrize("place", range(5))
def test_every_pickle_of_the_legacy_container_is_read_so(canary: Path, place: int) -> None:
    machine = {"little_endian": True}
    good = [pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, machine, {}, [])]
    parts = [*good[:place], system(canary), *good[place + 1 :]]
    assert "os.system" in refusal(b"".join(parts))
    assert not canary.exists()


def test_source_code_beside_a_class_is_ignored(canary: Path) -> None:
    source = f"open({str(canary)!r}, 'w')"
    identity = tuple_of(text("module"), name("glow", "WaveGlow"), text("glow.py"), text(source))
    payload = two(dict_of(model=identity + b"Q)\x81" + dict_of(training=b"\x88") + b"b"))
    assert "no tensors" in refusal(legacy(payload, ()))
    assert not canary.exists()


ARCHIVES: dict[str, dict[str, bytes]] = {
    "upwards": {"../../canary/data.pkl": two(b"}"), "../../canary/data/0": b"x"},
    "absolute": {"/data.pkl": two(b"}")},
    "two_roots": {"a/data.pkl": two(b"}"), "b/data.pkl": two(b"}")},
    "no_pickle": {"a/data": b"x"},
    "big_endian": {"a/data.pkl": two(b"}"), "a/byteorder": b"big"},
    "script": {"a/data.pkl": two(b"}"), "a/constants.pkl": two(b")")},
    "storage_too_small": {
        "a/data.pkl": tensor(4, number(0), [number(4)], [number(1)]),
        "a/data/0": bytes(15),
    },
    "storage_too_large": {
        "a/data.pkl": tensor(4, number(0), [number(4)], [number(1)]),
        "a/data/0": bytes(17),
    },
    "storage_missing": {"a/data.pkl": tensor(4, number(0), [number(4)], [number(1)])},
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives(kind: str) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for record, data in ARCHIVES[kind].items():
            archive.writestr(record, data)
    refusal(file.getvalue())


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
    few = dict_of(a=one, b=one, c=one)
    assert reader.write(io.BytesIO(zipped(model_of(few))), io.BytesIO()) is None
    again = {f"a{i}": b"h\x01" for i in range(1000)}
    many = dict_of(a=one + b"q\x01", **again)
    assert "share storages" in refusal(zipped(model_of(many)))


def test_too_many_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickle, "MAX_OPERATIONS", 1000)
    assert "more than 1,000 operations" in refusal(zipped(two(b"(" + b"N" * 1000 + b"t")))


# --- as a process, and from the command line ---


@pytest.mark.parametrize("kind", ["os.system", "stack_global", "in_the_optimizer", "nested"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_the_whole_way(tmp_path: Path, canary: Path, kind: str, container: str) -> None:
    path = tmp_path / "hostile.pt"
    path.write_bytes(CONTAINERS[container](ARMED[kind](canary)))
    with pytest.raises(CheckpointError, match="refused") as caught:
        convert(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["hostile.pt"]


@pytest.mark.parametrize("odd", ["\x1b[31mred", "two\nlines", "\u202eturned"])
def test_names_cannot_steer_a_terminal(tmp_path: Path, odd: str) -> None:
    path = tmp_path / "odd.pt"
    tensors = {odd: view(4, number(0), [number(4)], [number(1)])}
    for payload in (
        two(tuple_of(text(odd), name("glow", "WN")) + b"Q"),
        model_of(dict_of(**tensors)),
    ):
        path.write_bytes(zipped(payload))
        with pytest.raises(CheckpointError) as caught:
            convert(path)
        assert str(caught.value).isprintable()
    lone = b"X\x03\x00\x00\x00\xed\xa0\x80"
    path.write_bytes(zipped(two(tuple_of(lone, name("glow", "WN")) + b"Q")))
    with pytest.raises(CheckpointError):
        convert(path)


@pytest.mark.parametrize("kind", ["modules_that_double", "huge_tensor", "text_of_4_gb"])
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
    import torch

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


@pytest.mark.parametrize("file", ["zip/waveglow_4000", "legacy/waveglow_4000", "dle/"])
def test_damaged_files_are_read_or_refused(file: str) -> None:
    """Whatever a flipped byte makes of the pickle or of the container: no other error."""
    path = FIXTURES / f"nvidia-waveglow-{file}"
    path = next(path.glob("checkpoint*")) if path.is_dir() else path
    good, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(40):
        data = bytearray(good)
        # Half of the flips in the pickle, which lies at the start; the rest anywhere.
        end = rng.choice([20_000, len(data)])
        data[rng.randrange(end)] ^= rng.randrange(1, 256)
        try:
            reader.write(io.BytesIO(data), io.BytesIO())
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 5
    for _ in range(10):
        refusal(good[: rng.randrange(len(good))])
