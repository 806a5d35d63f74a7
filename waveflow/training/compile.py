"""torch.compile for training: the couplings' networks, each by itself."""

import os
import shutil

import torch

from waveflow.bijections import Coupling
from waveflow.errors import ConfigError
from waveflow.flow import Flow


def compile_networks(flow: Flow, device: torch.device, backend: str = "inductor") -> None:
    """Compiles the network of every coupling in place, at its first call; names stay.

    Networks alone, because they are nearly all of a step, while the path between them records
    volumes for calibration. Networks of one shape share their code.

    Args:
        device: that the flow is trained on.
        backend: of torch.compile.

    Raises:
        ConfigError: the CPU's code needs a C++ compiler and there is none.
    """
    compilers = (os.environ.get("CXX", "g++"), "clang++", "cl")
    if backend == "inductor" and device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise ConfigError(
            "compile = true needs a C++ compiler (g++, clang++ or $CXX) and finds none: install "
            "one, or leave compile out of the recipe"
        )
    for module in flow.bijection.modules():
        if isinstance(module, Coupling):
            module.network.compile(backend=backend)
