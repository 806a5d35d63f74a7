"""Models of the Hugging Face Hub: fetches a repository's checkpoint into the Hub's own cache.

A name is ORG/NAME, or ORG/NAME@REVISION for a branch, a tag or a commit. Only the files of a
checkpoint are fetched, and they are then read like those of any folder: by hash, by size, no code.
"""

import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from waveflow.errors import CheckpointError
from waveflow.limits import DOCUMENT_BYTES, WEIGHTS_BYTES
from waveflow.model_files import CARD, CONFIG, EXAMPLE, MANIFEST, WEIGHTS

logger = logging.getLogger(__name__)

REPOSITORY = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(.+))?", re.ASCII)
NEEDED = (CONFIG, WEIGHTS, MANIFEST)
# Seconds to wait for the Hub's answer before the cache is asked.
TIMEOUT = 10


def means_repository(name: str) -> bool:
    """Whether a name that is no folder here asks for a model of the Hub.

    A mistyped `runs/x` does not, where there is a folder `runs`: a stranger could own that name
    on the Hub.
    """
    match = REPOSITORY.fullmatch(name)
    return match is not None and (match[2] is not None or not Path(name).parent.is_dir())


def fetch_model(name: str) -> Path:
    """Returns the folder of a repository's checkpoint in the Hub's cache, after fetching it.

    Where the Hub cannot be reached, or HF_HUB_OFFLINE is set, the cached copy is taken.

    Raises:
        CheckpointError: huggingface_hub is missing, there is no such model or revision, no access
            or no network, the repository holds no checkpoint, or the cache cannot be written.
    """
    hub = import_hub(name)
    repository, _, revision = name.partition("@")
    try:
        listing = hub.HfApi().model_info(
            repository, revision=revision or None, timeout=TIMEOUT, files_metadata=True
        )
    except Exception as error:  # of the network, of any of its layers, and of odd answers
        return _cached(hub, name, error)
    _check_listing(name, {file.rfilename: file.size for file in listing.siblings or ()})
    try:
        return _snapshot(hub, name)
    except Exception as error:
        raise CheckpointError(f"cannot fetch {name} from the Hub: {reason(error)}") from error


def import_hub(name: str) -> ModuleType:
    """Returns the package huggingface_hub.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"{name!r} is no folder here, and as a model of the Hugging Face Hub it needs "
            "huggingface_hub: pip install 'waveflow[hub]'"
        ) from error
    return huggingface_hub


def reason(error: Exception) -> str:
    """Returns an error of the Hub's library as one line, with the remedy where it is known."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror} (HF_HUB_CACHE=FOLDER puts the cache elsewhere)"
    words = str(error) or type(error).__name__
    if status := _status(error):
        # Its text is an address and a link to a page about the status.
        words = f"HTTP status {status} {getattr(error, 'server_message', None) or ''}"
    return f"{' '.join(words.split()):.300}{_LOG_IN if status in _REFUSALS else ''}"


_REFUSALS = (401, 403, 404)
_LOG_IN = ": check the name; a private or gated model needs a login (hf auth login, or HF_TOKEN)"


def _status(error: Exception) -> int:
    """The status of the HTTP answer that an error tells of, or 0."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def _cached(hub: ModuleType, name: str, error: Exception) -> Path:
    """The copy in the cache, unless the Hub's answer was a refusal."""
    if isinstance(error, hub.errors.RevisionNotFoundError):
        repository, _, revision = name.partition("@")
        raise CheckpointError(
            f"{repository} on the Hub has no revision {revision!r}: give a branch, tag or commit"
        ) from error
    if _status(error) in _REFUSALS:
        raise CheckpointError(
            f"no model {name!r}, neither a folder here nor on the Hub: {reason(error)}"
        ) from error
    try:
        folder = _snapshot(hub, name, local_files_only=True)
    except Exception:  # its own words say less than the first error's
        raise CheckpointError(
            f"no folder {name!r} here, and the Hub's copy cannot be fetched: {reason(error)}"
        ) from error
    if not isinstance(error, hub.errors.OfflineModeIsEnabled):
        logger.warning("the cached copy of %s is used: %s", name, reason(error))
    return folder


def _snapshot(hub: ModuleType, name: str, local_files_only: bool = False) -> Path:
    repository, _, revision = name.partition("@")
    folder = hub.snapshot_download(
        repository,
        revision=revision or None,
        allow_patterns=[*NEEDED, EXAMPLE, CARD],
        local_files_only=local_files_only,
        tqdm_class=_bar(hub),
    )
    return Path(folder)


def _bar(hub: ModuleType) -> type:
    """A progress bar that vanishes at its end, and is silent where stderr is no terminal."""
    bar: Any = hub.utils.tqdm
    # A thread that watches for slow bars would stay, and servers fork after they have loaded.
    bar.monitor_interval = 0

    class Bar(bar):
        def __init__(self, *args: Any, **settings: Any) -> None:
            is_seen = sys.stderr is not None and sys.stderr.isatty()
            super().__init__(*args, **settings | {"leave": False, "disable": not is_seen})

    return Bar


def _check_listing(name: str, sizes: Mapping[str, int | None]) -> None:
    """Raises CheckpointError unless a repository holds a checkpoint of an allowed size."""
    for file in NEEDED:
        if file not in sizes:
            raise CheckpointError(
                f"{name} on the Hub has no {file!r}: it is not a model of waveflow's (waveflow "
                "convert makes one from a published WaveGlow)"
            )
    for file in (*NEEDED, EXAMPLE, CARD):
        most = WEIGHTS_BYTES if file in (WEIGHTS, EXAMPLE) else DOCUMENT_BYTES
        most.check(f"{file} of {name} on the Hub has", sizes.get(file) or 0, CheckpointError)
