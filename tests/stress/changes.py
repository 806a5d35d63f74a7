"""Random changes of files, for fuzz.py."""

import hashlib
import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np

from waveflow.model_files import manifest_bytes

ODD = [-1, 0, 1, 7, 2**31, 2**63, 10**9, 1e308, 1e-320, float("nan"), float("inf"), True, None,
       "", "../x", "/dev/zero", "\x1b[31m", "x" * 5000, [], {}, [[]],
       [1] * 3000, {"type": "x"}]  # fmt: skip


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flips, overwrites, removes, repeats or appends."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 30))):
        # Headers are where the decisions are.
        at = rng.randrange(min(len(out), rng.choice((16, 64, 512, len(out)))) or 1) if out else 0
        kind, size = rng.randrange(6), rng.choice((1, 2, 4, 8, 64, 1000))
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            value = rng.choice(
                (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**36, 2**63 - 1, 2**64 - 1)
            )
            out[at : at + 8] = struct.pack(rng.choice("<>") + "Q", value)
        elif kind == 2:
            del out[at : at + size]
        elif kind == 3:
            out[at:at] = out[at : at + size] * rng.choice((1, 2, 50))
        elif kind == 4:
            out[at:at] = rng.randbytes(size)
        else:
            del out[rng.randrange(len(out) + 1) :]
    return bytes(out)


def change_tree(value: Any, rng: random.Random) -> Any:
    """Replaces, removes, doubles or renames something inside JSON."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        act = rng.random()
        if act < 0.08:
            return {k: v for k, v in value.items() if k != key}
        if act < 0.14:
            return {**value, rng.choice(("x", key + "\x00", "a." * 2000)): value[key]}
        return {**value, key: change_tree(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return [*value[:i], change_tree(value[i], rng), *value[i + rng.randrange(2) :]]
    if isinstance(value, int | float) and rng.random() < 0.4:
        return value * rng.choice((-1, 2, 10, 1000, 0.5)) + rng.choice((0, 1))
    return rng.choice(ODD)


def change_toml(text: str, rng: random.Random) -> str:
    """Replaces one value, removes a line, or adds one."""
    lines = text.splitlines()
    i = rng.choice([n for n, line in enumerate(lines) if line])
    key = lines[i].split(" = ")[0]
    act = rng.random()
    if act < 0.1:
        del lines[i]
    elif act < 0.2:
        name = rng.choice(
            ("learning_rate", "seed", "clip_norm", "threads", "f_max", "sigma", "mel")
        )
        lines.insert(i, f"{name} = {json.dumps(rng.choice(ODD))}")
    else:
        lines[i] = f"{key} = " + json.dumps(rng.choice(ODD)).replace("NaN", "nan").replace(
            "Inf", "inf"
        )
    return "\n".join(lines)


def change_header(data: bytes, rng: random.Random) -> bytes:
    """The JSON at the beginning of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(change_tree(json.loads(data[8 : 8 + size]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def make_array(path: Path, rng: random.Random) -> None:
    """A mel of another shape, type, scale or order, or with odd values in it."""
    mel = np.load("mel.npy")
    for _ in range(rng.choice((1, 1, 2))):
        act = rng.randrange(7)
        if act == 0 and mel.dtype.kind not in "SU":  # no number is made of a cut string
            kinds = ("f2", ">f4", "f8", "i1", "i2", "u1", "i8", "c8", "?", "S3", "U3", "M8[s]")
            with np.errstate(all="ignore"):
                mel = mel.astype(rng.choice(kinds))
        elif act == 1:
            shapes = ((mel.size,), (1, *mel.shape), (*mel.shape, 1), mel.shape[::-1], (0, 80), ())
            shape = rng.choice(shapes)
            mel = np.resize(mel, shape)
        elif act == 2 and mel.dtype.kind == "f":
            mel = mel * rng.choice((0, -1, 1e3, 1e-3, 1e30, 8.7)) + rng.choice((0, 5, -1e4))
        elif act == 3 and mel.size and mel.dtype.kind == "f":
            mel.flat[rng.randrange(mel.size)] = rng.choice((np.nan, np.inf, -np.inf, 1e38, 88.0))
        elif act == 4 and mel.ndim:
            mel = np.repeat(mel, rng.choice((0, 1, 2, 40)), axis=rng.randrange(mel.ndim))[
                ..., :5000
            ]
        elif act == 5 and mel.ndim:
            mel = np.asfortranarray(mel[::-1] if rng.random() < 0.5 else mel[..., ::-1])
        else:
            mel = np.full(
                (80, rng.choice((1, 2, 3, 200))), rng.choice((-11.5, 0.0, 88.0, -1e9)), "f4"
            )
    np.save(path, mel)


def irregular(path: Path, rng: random.Random) -> None:
    """Something that is no plain file in the place of one."""
    path.unlink()
    kind = rng.randrange(5)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    else:
        path.symlink_to(("/dev/zero", path.with_name("missing"), "/dev/null")[kind - 2])


def change(kind: str, path: Path, rng: random.Random) -> None:
    """Changes one file, and most often makes its hash right again."""
    if kind == "array" or (kind == "doctor" and path.suffix == ".npy"):
        return make_array(path, rng)
    if rng.random() < 0.03:
        return irregular(path, rng)
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.8:
        tree = json.loads(data)
        for _ in range(rng.choice((1, 1, 2, 4))):
            tree = change_tree(tree, rng)
        data = json.dumps(tree).encode()
    elif path.suffix == ".toml" and rng.random() < 0.8:
        data = change_toml(data.decode(), rng).encode()
    elif path.suffix == ".safetensors" and rng.random() < 0.7:
        data = change_header(data, rng)
    else:
        data = change_bytes(data, rng)
    path.write_bytes(data)
    manifest = path.with_name("manifest.json")
    if kind in ("checkpoint", "run", "cache") and manifest.is_file() and manifest != path:
        content = json.loads(manifest.read_bytes())
        content["sha256"][path.name] = hashlib.sha256(data).hexdigest()
        cache = kind == "cache"
        new = json.dumps(content).encode() if cache else manifest_bytes(content["sha256"])
        manifest.write_bytes(new)
