"""Shared by the benchmarks: models, ways to run them, options.

A model is the name of one that ships, the folder of a checkpoint or run, a size of `SIZES`
(random weights), "vocos" or "griffin-lim". A path is a way to run it. The paths of a model
compute the same and differ in speed and rounding:

    plain         eager float32, weight norm folded; all others are compared with it
    published     as the published code: eager float32, weight norm on
    engine P      `waveflow.load(model, precision=P)`
    compiled P    `waveflow.load(model, precision=P, compile=True)`
"""

import argparse
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

import waveflow
from peers import GriffinLim, Vocos
from sizes import SIZES, SPEECH, write_untrained
from waveflow.audio.mel import MelConfig
from waveflow.cli.console import one_line_errors
from waveflow.cli.options import check_device
from waveflow.engine.cost import PLAIN_LEVEL, plain_path
from waveflow.engine.decoder import Precision
from waveflow.engine.fast.packed import with_packed_linears
from waveflow.engine.vocoder import Vocoder, VocoderWarning
from waveflow.errors import ConfigError
from waveflow.training.machine import cpu_info

PUBLISHED, PLAIN = "published", "plain"
VOCOS, GRIFFIN_LIM = PEERS = ("vocos", "griffin-lim")
# The instructions that decide how fast the precisions are beside each other.
CPU_FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm",
)  # fmt: skip


def _device(name: str) -> str:
    check_device(name)
    return name


OPTIONS: dict[str, dict[str, Any]] = {
    "precision": {
        "nargs": "+",
        "choices": get_args(Precision),
        "default": ["float32"],
        "help": "of the engine",
    },
    "seconds": {"nargs": "+", "type": float, "default": [1.0], "help": "lengths of the audio"},
    "runs": {"type": int, "default": 5, "help": "rounds, after one to warm up"},
    "threads": {"type": int, "default": 1, "help": "CPU threads"},
    "device": {"type": _device, "default": "cpu", "help": "such as cuda"},
    "compile": {"action": "store_true", "help": "also torch.compile"},
    "no-peers": {"action": "store_true", "help": "leave out Vocos and Griffin-Lim"},
}


class System(Protocol):
    """A model on one path: a Vocoder or a peer."""

    mel_config: MelConfig

    def __call__(self, mel: Tensor, /) -> Tensor:
        """Audio (B, T) of a mel (B, M, F), with every stage that a user gets."""
        ...


def parser(description: str | None, *options: str) -> argparse.ArgumentParser:
    """Of a script that takes models and some of `OPTIONS`."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("models", nargs="+", help=f"shipped, a folder, or {', '.join(SIZES)}")
    for option in options:
        made.add_argument(f"--{option}", **OPTIONS[option])
    return made


def run(main: Callable[[], None]) -> None:
    """Runs a script on one CPU thread; a user's mistake is one line and exit status 2."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's log is noise
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", VocoderWarning)
    with one_line_errors():
        main()


@contextmanager
def folders(models: Iterable[str]) -> Iterator[dict[str, str]]:
    """By model, the name that `load` takes: a random size is written to a temporary folder."""
    with tempfile.TemporaryDirectory() as temporary:
        found = {}
        for model in models:
            found[model] = model
            if model in SIZES:
                found[model] = str(Path(temporary) / model)
                write_untrained(model, Path(found[model]))
        yield found


def paths(model: str, precisions: Sequence[str], compile: bool = False) -> list[str]:
    """The paths of a model or peer, the plain one first."""
    if model == GRIFFIN_LIM:
        return [PLAIN]
    if model == VOCOS:
        return [PLAIN, "engine float32"]
    flow = waveflow.load(model, verify=False).flow
    has_weight_norm = any(is_parametrized(module) for module in flow.modules())
    return [
        PLAIN,
        *([PUBLISHED] if has_weight_norm else []),
        *(f"engine {precision}" for precision in precisions),
        *(f"compiled {precision}" for precision in precisions if compile and precision != "int8"),
    ]


def load(model: str, path: str, device: str = "cpu") -> System:
    """A model on a path.

    Raises:
        ConfigError: this device or installation cannot run the path.
    """
    if model == GRIFFIN_LIM:
        return GriffinLim()
    if model == VOCOS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = Vocos().eval().to(device)
        packed: Any = with_packed_linears(network)
        return network if path == PLAIN else packed
    if path in (PLAIN, PUBLISHED):
        vocoder = waveflow.load(model, verify=False, device=device)
        if path == PLAIN:
            return plain_path(vocoder)
        return Vocoder(vocoder.config, vocoder.flow, lambda flow: flow.decode)
    kind, precision = path.split()
    options: Any = {"precision": precision, "compile": kind == "compiled"}
    vocoder = waveflow.load(model, verify=False, device=device, **options)
    _ = vocoder.decoder  # made now, so that a path that cannot run is found now
    return vocoder


def load_all(
    found: dict[str, str], precisions: Sequence[str], compile: bool = False, device: str = "cpu"
) -> dict[tuple[str, str], Any]:
    """Systems by model and path; those that cannot run here are named on stderr."""
    systems = {}
    for model, source in found.items():
        for path in paths(source, precisions, compile):
            try:
                systems[model, path] = load(source, path, device)
            except ConfigError as error:
                print(f"left out: {model}, {path}: {error}", file=sys.stderr)
    return systems


def speech(config: MelConfig, seconds: float, device: str = "cpu") -> Tensor:
    """A mel (1, M, F) of speech, repeated to the length; a constant for other than 80 bands."""
    mel = np.load(SPEECH)
    if len(mel) != config.n_mels:
        mel = np.full((config.n_mels, 1), PLAIN_LEVEL, np.float32)
    n_frames = max(1, round(seconds * config.sample_rate / config.hop_length))
    tiled = np.tile(mel, -(-n_frames // mel.shape[1]))[:, :n_frames]
    return torch.from_numpy(tiled)[None].to(device)


def machine() -> str:
    """The processor and its instructions, on which every figure depends."""
    cpu = cpu_info()
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    name = cpu.get("model name", platform.machine())
    return f"{name}, {' '.join(f for f in CPU_FLAGS if f in flags)}, torch {torch.__version__}"
