"""What depends on the machine: its name, whether activations fit, and compiled networks."""

import logging
import math
import os
import platform
import shutil
from pathlib import Path

import torch
from torch import Tensor

from waveflow.bijections import Coupling
from waveflow.errors import ConfigError
from waveflow.flow import Flow
from waveflow.training.config import Recipe

logger = logging.getLogger(__name__)

# Part of the device's memory for activations. The rest is for gradients on their way back, weights
# and moments, and other programs.
MOST_OF_MEMORY = 0.5
# Lengths of an item. The difference between the two leaves out what is kept once for any length.
COUNTED_FRAMES = (8, 24)


def cpu_info() -> dict[str, str]:
    """What Linux says of the first processor; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    text = path.read_text().partition("\n\n")[0] if path.exists() else ""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def machine(threads: int, device: str) -> str:
    """The hardware that a figure of speed depends on, in words."""
    name = cpu_info().get("model name", platform.machine())
    if torch.device(device).type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, {name}"
    return f"{name}, {threads} CPU thread{'s' if threads > 1 else ''}, torch {torch.__version__}"


def choose_recompute(flow: Flow, recipe: Recipe, n_items: int, device: torch.device) -> bool:
    """Whether to compute activations again in the backward pass, as the recipe asks.

    Args:
        n_items: items of a batch that are in memory at once.
    """
    config = recipe.train
    if config.recompute != "auto":
        return config.recompute
    # The count below runs the flow, and some densities are made sample by sample.
    if not any(hasattr(module, "recompute") for module in flow.bijection.modules()):
        return False
    if config.energy_weight or config.calibration_weight:
        n_items *= 3  # two draws for each item
    short, long = (kept_bytes(flow, recipe.mel.n_mels, n, device) for n in COUNTED_FRAMES)
    per_frame = (long - short) / (COUNTED_FRAMES[1] - COUNTED_FRAMES[0])
    kept, memory = n_items * config.segment_frames * per_frame, _memory_bytes(device)
    if kept <= MOST_OF_MEMORY * memory:
        return False
    logger.info(
        "activations are computed again, not kept: they would fill %.1f of %.1f GB",
        kept / 1e9,
        memory / 1e9,
    )
    return True


def kept_bytes(flow: Flow, n_mels: int, n_frames: int, device: torch.device) -> int:
    """Bytes that autograd keeps for the likelihood of one item, without those of weights."""
    weights = {p.untyped_storage().data_ptr() for p in flow.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    audio = torch.zeros(1, n_frames * flow.hop_length, device=device)
    mel = torch.zeros(1, n_mels, n_frames, device=device)
    training = flow.training
    # In training mode data would start some layers, and others would draw random numbers.
    flow.eval()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # The result lives until all is counted, because a freed address may be used again.
        result = flow(audio, mel)
    flow.train(training)
    del result
    return sum(kept.values())


def compile_networks(flow: Flow, device: torch.device, backend: str = "inductor") -> None:
    """Compiles the network of every coupling in place, at its first call. Names stay.

    Networks are nearly all of a step. Networks of one shape share their code.

    Args:
        device: of the flow.
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


def _memory_bytes(device: torch.device) -> float:
    """All memory of an accelerator or of the machine; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
