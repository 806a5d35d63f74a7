"""Puts a checkpoint on the Hugging Face Hub, with a model card."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from waveflow import __version__
from waveflow.checkpoint import ModelConfig, load_checkpoint
from waveflow.door import read_plain
from waveflow.errors import CheckpointError
from waveflow.hub import import_hub, reason
from waveflow.limits import DOCUMENT_BYTES
from waveflow.model_files import (
    CARD,
    CONFIG,
    EXAMPLE,
    MANIFEST,
    WEIGHTS,
    manifest_bytes,
    read_files,
)
from waveflow.pretrained import model_folder

# The Hub's tasks know no vocoders; a model that took text would be a text-to-speech.
TASK = "audio-to-audio"
TAGS = ("vocoder", "mel-spectrogram", "normalizing-flow")


def push_to_hub(
    model: str | Path, repository: str, private: bool = False, licence: str = ""
) -> str:
    """Puts a checkpoint on the Hub in one commit, from where `waveflow.load` takes it.

    Its files go as they are, without the training state of a run. The card is the folder's
    README.md, or a short one of the config's facts, under a header with licence, tags and library.
    huggingface_hub has the login: `hf auth login`, or HF_TOKEN in the environment.

    Args:
        model: as `waveflow.load` takes it: a name, a checkpoint folder, or a run's best checkpoint.
        repository: ORG/NAME, made if it is not there; ORG/NAME@BRANCH for another branch than main.
        private: whether a repository that is made is private.
        licence: of the weights, by the Hub's short name such as "cc0-1.0", where the checkpoint
            states none or another.

    Returns:
        ORG/NAME@COMMIT, a name for `waveflow.load`.

    Raises:
        CheckpointError: a damaged checkpoint, weights that are not finite, no licence, or a Hub
            that refuses or cannot be reached. Then nothing of the checkpoint was uploaded.

    Example:
        >>> waveflow.push_to_hub("runs/x", "org/name", licence="cc0-1.0")  # doctest: +SKIP
        'org/name@5f2b9cd...'
    """
    folder = model_folder(model)
    # The network is built too, so that what goes up can be loaded.
    config, _ = load_checkpoint(folder)
    files = read_files(folder)
    if licence:
        provenance = config.provenance.model_copy(update={"licence": licence})
        config = config.model_copy(update={"provenance": provenance})
        files[CONFIG] = (config.model_dump_json(indent=1) + "\n").encode()
    if not config.provenance.licence:
        raise CheckpointError(f"{folder} states no licence: give push_to_hub a licence='cc0-1.0'")
    files = {name: files[name] for name in (CONFIG, WEIGHTS, EXAMPLE) if name in files}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files[MANIFEST] = manifest_bytes(hashes)
    hub, text = import_hub(repository), _card_text(folder, config)
    try:
        return _commit(hub, repository, private, files, _card(hub, text, config))
    except Exception as error:  # of the network, of any of its layers, and of odd answers
        raise CheckpointError(f"cannot push to {repository} on the Hub: {reason(error)}") from error


def _commit(
    hub: ModuleType, repository: str, private: bool, files: Mapping[str, bytes], card: Any
) -> str:
    api = hub.HfApi()
    repository, _, branch = repository.partition("@")
    operations = [
        hub.CommitOperationAdd(name, data)
        for name, data in {**files, CARD: str(card).encode()}.items()
    ]
    if EXAMPLE not in files and api.file_exists(repository, EXAMPLE, revision=branch or None):
        # It was the example of another model.
        operations.append(hub.CommitOperationDelete(EXAMPLE))
    settings = {
        "commit_message": f"Upload a model with waveflow {__version__}",
        "revision": branch or None,
    }
    try:
        commit = api.create_commit(repository, operations, **settings)
    except hub.errors.RepositoryNotFoundError:
        # Only now, because a card that the Hub refuses, as for its licence, fails above.
        repository = api.create_repo(repository, private=private).repo_id
        commit = api.create_commit(repository, operations, **settings)
    return f"{repository}@{commit.oid}"


def _card_text(folder: Path, config: ModelConfig) -> str:
    path = folder / CARD
    if os.path.lexists(path):
        try:
            return read_plain(path, DOCUMENT_BYTES, CheckpointError, folder).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    mel, source = config.mel, config.provenance
    return (
        f"# A {config.model.type} vocoder\n\nMels of {mel.n_mels} bands at {mel.sample_rate} Hz, "
        f"hop {mel.hop_length}, become speech with waveflow.\n\n"
        f"- **Data**: {source.data or 'not stated'}\n- **Licence**: {source.licence}\n"
        f"- **Training**: {source.steps:,} steps, {source.minutes:.0f} minutes\n"
    )


def _card(hub: ModuleType, text: str, config: ModelConfig) -> Any:
    """The card with its header; what a header has already, such as languages, stays."""
    card = hub.ModelCard(text if text.startswith("---\n") else f"---\n{{}}\n---\n{text}")
    card.data.license = config.provenance.licence.lower()
    card.data.library_name, card.data.pipeline_tag = "waveflow", TASK
    tags = (*(card.data.tags or ()), *TAGS, config.model.type)
    card.data.tags = list(dict.fromkeys(tags))
    return card
