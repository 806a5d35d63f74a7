"""Synthesis by the package in PYTHONPATH, as a process that `against.py` sends requests to.

A request is a line of JSON, [name of a function below, arguments]; so is its answer. The package
may be of another commit: only names that both have are used here.
"""

import json
import sys
import time
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

import waveflow
from sizes import write_untrained
from waveflow.engine.vocoder import Vocoder


@cache
def load(model: str, path: str) -> Vocoder:
    """A model's plain path, or its engine in a precision; see lab.py."""
    precision: Any = "float32" if path == "plain" else path
    vocoder = waveflow.load(model, verify=False, precision=precision)
    if path != "plain":
        return vocoder
    for layer in list(vocoder.flow.modules()):
        if is_parametrized(layer, "weight"):
            remove_parametrizations(layer, "weight")
        # Older commits keep the inverses of 1x1 convolutions; others get them once here.
        if not hasattr(vocoder.flow, "prepare_for_inference"):
            for name in ("inverted", "log_abs_det"):
                if hasattr(layer, name):
                    value = getattr(layer, name)().detach()
                    setattr(layer, name, lambda value=value: value)
    return Vocoder(vocoder.config, vocoder.flow, lambda flow: flow.decode)


def where() -> str:
    """The folder of the package."""
    return str(Path(waveflow.__file__).parent)


def write(size: str, folder: str) -> None:
    """Writes a checkpoint of random weights."""
    write_untrained(size, Path(folder))


def synthesise(model: str, path: str, mel: str) -> float:
    """CPU seconds of a synthesis of a mel file."""
    batch, vocoder = torch.from_numpy(np.load(mel)), load(model, path)
    begin = time.process_time()
    vocoder(batch)
    return time.process_time() - begin


def draw(model: str, path: str, mel: str, audio: str) -> None:
    """Writes a draw for a mel file as a file."""
    np.save(audio, load(model, path).draw(torch.from_numpy(np.load(mel))).numpy())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    functions = {f.__name__: f for f in (where, write, synthesise, draw)}
    with torch.inference_mode():
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            print(json.dumps(functions[name](*arguments)), file=answers, flush=True)
