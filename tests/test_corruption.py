"""Our own checkpoint folders: a cut or a flipped byte anywhere, in any file, is one typed error."""

import random
from pathlib import Path

import pytest
import torch

from waveflow.audio.mel import MelConfig
from waveflow.checkpoint import (
    CONFIG,
    MANIFEST,
    WEIGHTS,
    ModelConfig,
    load_checkpoint,
    save_checkpoint,
)
from waveflow.errors import CheckpointError, ConfigError
from waveflow.models.registry import build_flow
from waveflow.models.waveglow import WaveGlowConfig

CONFIGURED = ModelConfig(
    model=WaveGlowConfig(
        n_mels=2, hop_length=8, n_flows=2, n_layers=1, hidden_channels=2, upsample_kernel=16
    ),
    mel=MelConfig(sample_rate=8000, n_fft=32, hop_length=8, win_length=32, n_mels=2, f_max=4000.0),
)
NAMES = (CONFIG, WEIGHTS, MANIFEST, "extra.bin")
WHITESPACE = b" \t\n\r"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    flow = build_flow(CONFIGURED.model, CONFIGURED.mel)
    save_checkpoint(folder, CONFIGURED, flow.state_dict(), {"extra.bin": b"a run's own"})
    load_checkpoint(folder)
    return folder


@pytest.fixture
def files(folder: Path):
    """The whole files by name; written back afterwards."""
    whole = {name: (folder / name).read_bytes() for name in NAMES}
    yield whole
    for name, data in whole.items():
        (folder / name).write_bytes(data)


def refused(folder: Path, name: str, damaged: list[bytes]) -> None:
    """Each of the damaged contents of one file is an error; the whole one is put back."""
    good = (folder / name).read_bytes()
    for data in damaged:
        assert data != good
        (folder / name).write_bytes(data)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(folder)
        assert "\n" not in str(caught.value)
    (folder / name).write_bytes(good)


def flipped(data: bytes, at: int, other: int) -> bytes:
    return data[:at] + bytes([other]) + data[at + 1 :]


def test_200_truncations(folder: Path, files: dict[str, bytes]) -> None:
    """Each file at its start, at its last byte, and between, as often as it is long."""
    offsets = {(name, end) for name, data in files.items() for end in (0, len(data) - 1)}
    places = [(name, end) for name, data in files.items() for end in range(len(data))]
    random.Random(0).shuffle(places)
    while len(offsets) < 200:
        offsets.add(places.pop())
    for name, data in files.items():
        refused(folder, name, [data[:end] for of, end in offsets if of == name])


def test_1000_flipped_bytes(folder: Path, files: dict[str, bytes]) -> None:
    """All bytes of the manifest, which no hash covers, and others by chance."""
    rng = random.Random(0)
    places = [(name, at) for name, data in files.items() for at in range(len(data))]
    rng.shuffle(places)
    places.sort(key=lambda place: place[0] != MANIFEST)
    assert len(places) > 1000
    for name, data in files.items():
        chosen = [at for of, at in places[:1000] if of == name]
        flips = [flipped(data, at, data[at] ^ rng.randrange(1, 256)) for at in chosen]
        refused(folder, name, flips)


def test_whitespace_of_the_manifest(folder: Path, files: dict[str, bytes]) -> None:
    """One sort for another means nothing to JSON, and is damage all the same."""
    good = files[MANIFEST]
    places = [at for at, byte in enumerate(good) if byte in WHITESPACE]
    others = [flipped(good, at, byte) for at in places for byte in WHITESPACE if byte != good[at]]
    refused(folder, MANIFEST, others)


def test_without_verifying_damage_loads_or_is_an_error(
    folder: Path, files: dict[str, bytes]
) -> None:
    rng, loaded = random.Random(0), 0
    places = [(name, at) for name in (CONFIG, WEIGHTS) for at in range(len(files[name]))]
    for name, at in rng.sample(places, 100):
        data = files[name]
        (folder / name).write_bytes(flipped(data, at, data[at] ^ rng.randrange(1, 256)))
        try:
            load_checkpoint(folder, verify=False)
            loaded += 1
        except (CheckpointError, ConfigError) as error:
            assert "\n" not in str(error)
        (folder / name).write_bytes(files[name])
    assert 20 < loaded < 100
