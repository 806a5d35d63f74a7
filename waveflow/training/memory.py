"""Whether a run has the memory to keep its activations."""

import logging
import math
import os

import torch
from torch import Tensor

from waveflow.flow import Flow
from waveflow.training.config import Recipe

logger = logging.getLogger(__name__)

# Of the device's memory: the rest is for gradients on their way back, weights and their moments,
# and what other programs hold.
MOST_OF_MEMORY = 0.5
# Two lengths of an item: what the longer one keeps more is free of what is kept once.
COUNTED_FRAMES = (8, 24)


def choose_recompute(flow: Flow, recipe: Recipe, n_items: int, device: torch.device) -> bool:
    """What the recipe's `recompute` means for this flow on this device.

    Args:
        n_items: of a batch that are in memory at once.
    """
    config = recipe.train
    if config.recompute != "auto":
        return bool(config.recompute)
    if config.energy_weight or config.calibration_weight:
        n_items *= 3  # the draws: two for each item
    short, long = (kept_bytes(flow, recipe.mel.n_mels, n, device) for n in COUNTED_FRAMES)
    each = (long - short) / (COUNTED_FRAMES[1] - COUNTED_FRAMES[0])
    kept, memory = n_items * config.segment_frames * each, _memory_bytes(device)
    if kept <= MOST_OF_MEMORY * memory:
        return False
    logger.info(
        "activations are computed twice, not kept: they would fill %.1f of %.1f GB",
        kept / 1e9,
        memory / 1e9,
    )
    return True


def kept_bytes(flow: Flow, n_mels: int, n_frames: int, device: torch.device) -> int:
    """Bytes that autograd keeps of the likelihood of one item, those of weights left out."""
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
    # Not in training mode, in which data starts some layers and others draw random numbers.
    flow.eval()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # Kept until all is counted: an address that was freed would come again.
        result = flow(audio, mel)
    flow.train(training)
    del result
    return sum(kept.values())


def _memory_bytes(device: torch.device) -> float:
    """All memory of an accelerator, or of the machine; infinite where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
