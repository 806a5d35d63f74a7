"""Checkpoint folders: what is written comes back, and what is damaged is refused by name."""

import hashlib
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from waveflow import checkpoint
from waveflow.audio.mel import MelConfig
from waveflow.checkpoint import (
    CONFIG,
    MANIFEST,
    RUN_POINTER,
    WEIGHTS,
    ModelConfig,
    Provenance,
    SynthesisConfig,
    load_checkpoint,
    load_weights,
    manifest_bytes,
    save_checkpoint,
)
from waveflow.errors import CheckpointError, WaveflowError
from waveflow.flow import Flow
from waveflow.models.frameglow import FrameGlowConfig
from waveflow.models.registry import build_flow

MEL = MelConfig(sample_rate=8000, n_fft=64, hop_length=16, win_length=64, n_mels=8, f_max=4000.0)
CONFIGURED = ModelConfig(
    model=FrameGlowConfig(
        n_levels=1,
        n_flows=1,
        hidden_channels=4,
        dilations=(1,),
        encoder_channels=4,
        encoder_layers=1,
    ),
    mel=MEL,
    synthesis=SynthesisConfig(sigma=0.9, refine_steps=3),
    provenance=Provenance(
        data="made up", licence="CC0-1.0", steps=7, mel_range=((-3.0,) * 8, (1.5,) * 8)
    ),
)


@pytest.fixture(scope="module")
def flow() -> Flow:
    torch.manual_seed(0)
    flow = build_flow(CONFIGURED.model, MEL)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return flow


@pytest.fixture
def folder(tmp_path: Path, flow: Flow) -> Path:
    folder = tmp_path / "model"
    save_checkpoint(folder, CONFIGURED, flow.state_dict(), {"extra.bin": b"more"})
    return folder


def refusal(folder: Path, verify: bool = True) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, verify)
    message = str(caught.value)
    assert "\n" not in message
    return message


def replace(folder: Path, name: str, data: bytes) -> None:
    """Changes a file and its hash, as who wants to be believed would."""
    (folder / name).write_bytes(data)
    hashes = json.loads((folder / MANIFEST).read_text())["sha256"]
    hashes[name] = hashlib.sha256(data).hexdigest()
    (folder / MANIFEST).write_bytes(manifest_bytes(hashes))


# --- round trip ---


def test_round_trip(folder: Path, flow: Flow) -> None:
    config, loaded = load_checkpoint(folder)
    assert config == CONFIGURED
    assert not loaded.training
    assert loaded.state_dict().keys() == flow.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in flow.state_dict().items())
    assert sorted(os.listdir(folder)) == sorted([CONFIG, WEIGHTS, MANIFEST, "extra.bin"])
    assert os.listdir(folder.parent) == ["model"]


def test_half_precision_weights_are_loaded_as_float32(tmp_path: Path, flow: Flow) -> None:
    halves = {k: v.half() for k, v in flow.state_dict().items()}
    save_checkpoint(tmp_path / "half", CONFIGURED, halves)
    _, loaded = load_checkpoint(tmp_path / "half")
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, halves[name].float())


def test_a_range_of_other_bands_than_the_mels_is_refused(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config["provenance"]["mel_range"][1].append(0.0)
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="mel_range has 9 values for 8 mel bands"):
        load_checkpoint(folder, verify=False)


def test_config_holds_no_code_and_refuses_unknown_fields(folder: Path) -> None:
    fields = json.loads((folder / CONFIG).read_text())
    fields["model"]["network"] = "os.system"
    replace(folder, CONFIG, json.dumps(fields).encode())
    assert "network" in refusal(folder)
    fields["model"]["network"] = "wavenet"
    fields["target"] = "os.system"
    replace(folder, CONFIG, json.dumps(fields).encode())
    assert f"{folder / CONFIG}: target: Extra inputs" in refusal(folder)


# --- damage ---


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "extra.bin"])
@pytest.mark.parametrize("place", [0, 0.5, -1])
def test_one_flipped_byte_is_found_and_named(folder: Path, name: str, place: float) -> None:
    data = bytearray((folder / name).read_bytes())
    data[int(place * len(data)) if place > 0 else int(place)] ^= 1
    (folder / name).write_bytes(data)
    assert refusal(folder).startswith(f"{folder / name} is damaged")


def test_a_flipped_byte_in_the_manifest_is_found(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    digest = json.loads(text)["sha256"][WEIGHTS]
    other = ("0" if digest[0] != "0" else "1") + digest[1:]
    (folder / MANIFEST).write_text(text.replace(digest, other))
    assert f"{folder / WEIGHTS} is damaged" in refusal(folder)


def test_without_verifying_only_what_cannot_be_read_is_refused(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    load_checkpoint(folder, verify=False)
    (folder / WEIGHTS).write_bytes(data[:-1])
    assert "is not a safetensors file" in refusal(folder, verify=False)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, MANIFEST, "extra.bin"])
def test_missing_files_are_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert name in refusal(folder)


def test_missing_folders_are_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere") == f"no checkpoint folder {tmp_path / 'nowhere'}"
    assert "not a checkpoint" in refusal(tmp_path)
    (tmp_path / "file").touch()
    assert "no checkpoint folder" in refusal(tmp_path / "file")


MANIFESTS: dict[str, tuple[bytes, str]] = {
    "not_json": (b"{", "is not JSON"),
    "not_text": (b"\xff\xfe\x00", "is not JSON"),
    "deep": (b"[" * 100_000, "is not JSON"),
    "no_object": (b"[1]", "holds no JSON object"),
    "other_format": (b'{"format": 99, "sha256": {}}', "format 99; this waveflow reads 1"),
    "no_format": (b'{"sha256": {}}', "format None"),
    "no_hashes": (b'{"format": 1}', "does not list config.json"),
    "list_of_hashes": (b'{"format": 1, "sha256": ["config.json"]}', "does not list config.json"),
    "no_weights": (b'{"format": 1, "sha256": {"config.json": ""}}', "does not list config.json"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_wrong_manifests(folder: Path, name: str) -> None:
    data, message = MANIFESTS[name]
    (folder / MANIFEST).write_bytes(data)
    assert message in refusal(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/file", "..", "", "a\0b"])
@pytest.mark.parametrize("verify", [True, False])
def test_only_files_of_the_folder_are_read(folder: Path, name: str, verify: bool) -> None:
    (folder.parent / "secret").write_bytes(b"secret")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["sha256"][name] = hashlib.sha256(b"secret").hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert "outside the folder" in (message := refusal(folder, verify)) or "readable" in message


@pytest.mark.parametrize("data", [b"{", b"", b"\xff", b"[" * 100_000, b"null", b'{"format": 1}'])
def test_configs_that_are_none(folder: Path, data: bytes) -> None:
    replace(folder, CONFIG, data)
    assert refusal(folder).startswith(f"{folder / CONFIG}: ")


def f8(data: bytes) -> bytes:
    """A safetensors file with a type that torch lacks or that has no arithmetic."""
    tensors = {"a": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}
    header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header + bytes(8)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:7],
        lambda data: data[:200],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"\xff" * 8 + data[8:],
        f8,
    ],
)
def test_weights_that_are_no_safetensors(folder: Path, change: Callable[[bytes], bytes]) -> None:
    replace(folder, WEIGHTS, change((folder / WEIGHTS).read_bytes()))
    message = refusal(folder)
    assert message.startswith(f"{folder / WEIGHTS} is not a safetensors file")


WRONG_WEIGHTS: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "missing": (lambda w: w.pop("conditioner.enter.weight"), "lacks tensor 'conditioner.enter"),
    "unknown": (lambda w: w.update(spare=torch.zeros(1)), "has the unknown tensor 'spare'"),
    "shape": (
        lambda w: w.update({"conditioner.enter.bias": torch.zeros(5)}),
        "conditioner.enter.bias is torch.float32 (5,), the config makes it torch.float32 (4,)",
    ),
    "kind": (
        lambda w: w.update({"conditioner.enter.bias": torch.zeros(4, dtype=torch.int64)}),
        "conditioner.enter.bias is torch.int64 (4,)",
    ),
    "nan": (
        lambda w: w["conditioner.enter.bias"].__setitem__(2, torch.nan),
        "conditioner.enter.bias holds values that are not finite",
    ),
    "too_large": (
        lambda w: w.update(
            {"conditioner.enter.bias": torch.full((4,), 1e300, dtype=torch.float64)}
        ),
        "conditioner.enter.bias holds values that are not finite",
    ),
    "quarters": (
        lambda w: w.update(
            {"conditioner.enter.bias": torch.full((4,), torch.nan).to(torch.float8_e5m2)}
        ),
        "conditioner.enter.bias holds values that are not finite",
    ),
}


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_weights_that_do_not_fit(folder: Path, flow: Flow, name: str) -> None:
    change, message = WRONG_WEIGHTS[name]
    weights = {k: v.clone() for k, v in flow.state_dict().items()}
    change(weights)
    replace(folder, WEIGHTS, save(weights))
    assert message in refusal(folder)


def test_refused_weights_leave_the_flow_as_it_was(flow: Flow) -> None:
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    weights = {k: v + 1 for k, v in before.items()}
    weights["conditioner.enter.bias"][0] = torch.inf
    with pytest.raises(CheckpointError):
        load_weights(flow, weights, Path("weights"))
    assert all(torch.equal(before[k], v) for k, v in flow.state_dict().items())


@settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_random_damage_is_one_error(folder: Path, data: st.DataObject) -> None:
    """Anywhere, with hashes that believe it: loads or says what is wrong, and nothing else."""
    name = data.draw(st.sampled_from([CONFIG, WEIGHTS, MANIFEST]))
    good = (folder / name).read_bytes()
    manifest = (folder / MANIFEST).read_bytes()
    changed = bytearray(good)
    # The header of safetensors and all of the JSON; flips in the weights' values are above.
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(len(changed), 4000) - 1))
        changed[place] = data.draw(st.integers(0, 255))
    try:
        if name == MANIFEST:
            (folder / name).write_bytes(changed)
        else:
            replace(folder, name, bytes(changed))
        load_checkpoint(folder)
    except WaveflowError as error:
        assert "\n" not in str(error)
    finally:
        (folder / name).write_bytes(good)
        (folder / MANIFEST).write_bytes(manifest)


# --- writing ---


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", range(1, 4))
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Killed()])
def test_a_failure_in_the_middle_leaves_the_old_one(
    folder: Path, flow: Flow, monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException
) -> None:
    """At the third file's fsync, or at either rename, where folders cannot change names at once."""
    monkeypatch.setattr(checkpoint, "_swapped", lambda one, other: False)
    n_calls = 0
    real = {"fsync": os.fsync, "rename": os.rename}

    def failing(name: str) -> Callable[..., None]:
        def call(*args: object) -> None:
            nonlocal n_calls
            if name == "rename" or os.fstat(args[0]).st_size == (folder / CONFIG).stat().st_size:
                n_calls += 1
            if n_calls == at:
                n_calls += 1
                raise error
            real[name](*args)

        return call

    for name in real:
        monkeypatch.setattr(os, name, failing(name))
    with pytest.raises(CheckpointError if isinstance(error, OSError) else Killed):
        save_checkpoint(folder, CONFIGURED, {k: v * 0 for k, v in flow.state_dict().items()})
    monkeypatch.undo()
    assert n_calls > at
    assert os.listdir(folder.parent) == ["model"]
    _, loaded = load_checkpoint(folder)
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in flow.state_dict().items())


def test_at_no_moment_is_there_none(
    folder: Path, flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after every change to the folder's parent, a whole checkpoint lies in it."""
    monkeypatch.setattr(checkpoint, "_swapped", lambda one, other: False)
    checked = []

    def watched(real: Callable[..., None]) -> Callable[..., None]:
        def call(*args: object, **kwargs: object) -> None:
            for _ in range(2):
                whole = []
                for path in folder.parent.iterdir():
                    try:
                        load_checkpoint(path)
                        whole.append(path)
                    except CheckpointError:
                        pass
                checked.append(len(whole))
                if len(checked) % 2:
                    real(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "rename", watched(os.rename))
    monkeypatch.setattr(shutil, "rmtree", watched(shutil.rmtree))
    save_checkpoint(folder, CONFIGURED, flow.state_dict())
    assert len(checked) >= 6
    assert min(checked) >= 1
    assert os.listdir(folder.parent) == ["model"]


@pytest.mark.skipif(sys.platform != "linux", reason="two steps elsewhere")
def test_a_checkpoint_that_is_saved_again_is_there_all_the_time(
    folder: Path, flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rename takes it away, between which and the next one a kill would hide it."""
    monkeypatch.setattr(os, "rename", lambda *paths: pytest.fail("renamed"))
    save_checkpoint(folder, CONFIGURED, {k: v * 0 for k, v in flow.state_dict().items()})
    assert os.listdir(folder.parent) == ["model"]
    _, loaded = load_checkpoint(folder)
    assert not any(tensor.any() for tensor in loaded.state_dict().values())


def test_what_a_killed_save_left_does_not_disturb_the_next(folder: Path, flow: Flow) -> None:
    old = folder.with_name(".model.old")
    shutil.copytree(folder, old)
    save_checkpoint(folder, CONFIGURED, flow.state_dict())
    assert not old.exists()
    load_checkpoint(folder)


def test_an_unwritable_place_is_one_error(tmp_path: Path, flow: Flow) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*below"):
        save_checkpoint(tmp_path / "file" / "below", CONFIGURED, flow.state_dict())


# --- run folders ---


@pytest.fixture
def run(tmp_path: Path, flow: Flow) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    for steps in (1, 2):
        config = CONFIGURED.model_copy(update={"provenance": Provenance(steps=steps)})
        save_checkpoint(run / f"step-{steps}", config, flow.state_dict())
    (run / RUN_POINTER).write_text('{"best": "step-1", "last": "step-2"}')
    return run


def test_a_run_gives_its_best(run: Path) -> None:
    assert load_checkpoint(run)[0].provenance.steps == 1
    assert load_checkpoint(run / "step-2")[0].provenance.steps == 2


@pytest.mark.parametrize(
    "pointer", ["{", "[]", "{}", '{"best": 3}', '{"best": "../run/step-1"}', '{"best": "step-9"}']
)
def test_wrong_pointers(run: Path, pointer: str) -> None:
    (run / RUN_POINTER).write_text(pointer)
    refusal(run)
