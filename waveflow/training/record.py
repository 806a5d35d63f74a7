"""run.json: what it takes to make a run again, written once when it begins."""

import json
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from waveflow.checkpoint import MANIFEST
from waveflow.data.cache import TrainingCache, file_sha256
from waveflow.training.config import Recipe

RUN_RECORD = "run.json"


def run_record(
    recipe: Recipe, cache: TrainingCache, device: torch.device, data: str, init: Path | None
) -> str:
    """The record of a run that begins now, JSON.

    It holds the recipe with all its defaults, the command line, the versions of every installed
    package, the machine, and the manifest of the data with its hashes. `waveflow train
    RUN/recipe.json` with a cache of the same hashes makes the run again: bit for bit with the
    same versions on the same CPU.

    Args:
        data: the data in words.
        init: folder of the weights that the run starts from.
    """
    record = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "recipe": recipe.model_dump(mode="json"),
        "init": None if init is None else _initial_weights(init),
        "data": {
            "description": data,
            "folder": str(cache.folder.resolve()),
            "manifest": cache.manifest.model_dump(mode="json"),
        },
        "platform": _platform(device),
        "packages": dict(sorted((d.name, d.version) for d in distributions() if d.name)),
    }
    return json.dumps(record, indent=1) + "\n"


def _initial_weights(folder: Path) -> dict[str, str]:
    """Where they are, and the hash of the manifest that holds the hashes of their files."""
    manifest = folder / MANIFEST
    return {
        "folder": str(folder.resolve()),
        "manifest_sha256": file_sha256(manifest) if manifest.is_file() else "",
    }


def _platform(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if cuda else str(device),
        "cuda": torch.version.cuda,
    }
