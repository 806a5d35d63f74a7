"""Models of the Hugging Face Hub, through its own library and a stand-in for its server."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors.torch
import torch
from hub_server import Files, HubServer
from pages import ROOT, code_blocks

import waveflow
from waveflow.checkpoint import load_checkpoint, save_checkpoint
from waveflow.cli.main import main
from waveflow.errors import CheckpointError
from waveflow.model_files import CARD, CONFIG, EXAMPLE, MANIFEST, WEIGHTS, manifest_bytes, read_card
from waveflow.pretrained import model_folder

pytest.importorskip("huggingface_hub", reason="models of the Hub need the package huggingface_hub")

MEL = torch.full((80, 6), -5.0)
FILES = {CONFIG, WEIGHTS, MANIFEST}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, dict]]:
    """The library reads its settings as it is imported, so it is imported anew for this module."""
    server = HubServer()
    home = tmp_path_factory.mktemp("hub")
    settings = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("HF_")]:
            patch.delenv(name)
        for name, value in settings.items():
            patch.setenv(name, value)
        for name in library():
            patch.delitem(sys.modules, name)
        yield server, settings
        for name in library():
            del sys.modules[name]
    server.close()


@pytest.fixture
def hub(environment: tuple[HubServer, dict], tmp_path: Path) -> HubServer:
    server, _ = environment
    server.asked.clear()
    return server


@pytest.fixture
def tiny(tiny_model: Path) -> Files:
    return contents(tiny_model)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No name of a repository is a folder here."""
    monkeypatch.chdir(tmp_path)


def library() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]


def constants() -> ModuleType:
    import huggingface_hub.constants

    return huggingface_hub.constants


def contents(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(folder: Path, files: Files) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def with_config(files: Files, **changes: object) -> Files:
    """The files with fields of config.json changed and a manifest that says so."""
    import hashlib

    files = files | {CONFIG: json.dumps(json.loads(files[CONFIG]) | changes).encode()}
    hashes = {n: hashlib.sha256(files[n]).hexdigest() for n in files if n not in (MANIFEST, CARD)}
    return files | {MANIFEST: manifest_bytes(hashes)}


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        action()
    line = str(caught.value)
    assert len(line.splitlines()) == 1 and len(line) < 600
    return line


def refused_load(name: str) -> str:
    return refusal(lambda: waveflow.load(name))


def fetched(hub: HubServer) -> set[str]:
    return {line.rpartition("/")[2] for line in hub.asked if line.startswith("GET /org/")}


# --- load ---


def test_load(
    hub: HubServer, tiny: Files, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.add("org/load", tiny | {"pytorch_model.bin": b"\x80\x02.", "code.py": b"", CARD: b"# Card"})
    for thread in threading.enumerate():
        if thread.name == "tqdm_monitor":  # of another test's progress bars
            thread.exit()  # type: ignore[attr-defined]
    vocoder = waveflow.load("org/load")
    assert torch.equal(vocoder(MEL), waveflow.load(tiny_model)(MEL))
    assert fetched(hub) == FILES | {CARD}
    assert vocoder.folder is not None and set(contents(vocoder.folder)) == FILES | {CARD}
    assert capfd.readouterr() == ("", "")
    assert "tqdm_monitor" not in {thread.name for thread in threading.enumerate()}
    hub.asked.clear()
    waveflow.load("org/load")
    assert fetched(hub) == set()


def test_a_revision_is_pinned(hub: HubServer, tiny: Files) -> None:
    first = hub.add("org/pinned", with_config(tiny, synthesis={"sigma": 0.25}))
    hub.add("org/pinned", with_config(tiny, synthesis={"sigma": 0.5}))
    for name, sigma in (
        (f"org/pinned@{first}", 0.25),
        ("org/pinned", 0.5),
        ("org/pinned@main", 0.5),
    ):
        assert waveflow.load(name).config.synthesis.sigma == sigma
    assert "org/pinned on the Hub has no revision 'v9'" in refused_load("org/pinned@v9")


def test_the_python_of_the_page(hub: HubServer, tiny: Files, tiny_model: Path) -> None:
    page = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")
    [block] = [block for block in code_blocks(page) if "org/name" in block]
    commit = hub.add("org/name", tiny)
    write(Path("runs"), {})
    write(Path("runs/x"), contents(tiny_model))
    exec(block.replace("@revision", f"@{commit}"), {"waveflow": waveflow})
    assert len(hub.commits["org/name"]) == 2


def test_verbs_take_the_name(
    hub: HubServer, tiny: Files, tiny_model: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    commit = hub.add("org/verbs", tiny)
    np.save("mel.npy", MEL.numpy())
    outputs = []
    for model in (f"org/verbs@{commit}", str(tiny_model)):
        assert main(["vocode", "mel.npy", "-o", "-", "--model", model]) == 0
        outputs.append(capfdbinary.readouterr().out)
    assert outputs[0] == outputs[1] and len(outputs[0]) >= 2 * 6 * 256
    assert main(["info", f"org/verbs@{commit}"]) == 0
    assert commit.encode() in capfdbinary.readouterr().out
    assert main(["vocode", "mel.npy", "-o", "x.wav", "--model", "org/none"]) == 2
    answer = capfdbinary.readouterr()
    assert answer.out == b"" and answer.err.count(b"\n") == 1
    assert not Path("x.wav").exists()


def test_without_the_hub_the_cached_copy_is_used(
    hub: HubServer, tiny: Files, tiny_model: Path, environment: tuple[HubServer, dict],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    commit = hub.add("org/cached", tiny)
    expected = waveflow.load("org/cached")(MEL)
    nowhere = "http://127.0.0.1:9"
    with monkeypatch.context() as patch:
        patch.setattr(constants(), "ENDPOINT", nowhere)
        assert torch.equal(waveflow.load("org/cached")(MEL), expected)
        assert "the cached copy of org/cached is used" in caplog.text
        assert "no folder 'org/new' here, and the Hub's copy cannot be fetched" in refused_load(
            "org/new"
        )
    hub.refuses["org/cached"] = 503
    waveflow.load("org/cached")
    del hub.refuses["org/cached"]

    # As a user has it: a setting before Python starts, and a stderr that is closed.
    np.save("mel.npy", MEL.numpy())
    command = f"{sys.executable} -m waveflow vocode mel.npy -o - --float --model"
    offline = os.environ | environment[1] | {"HF_HUB_OFFLINE": "1"}
    hub.asked.clear()
    code = f"{command} org/cached@{commit} 2>&-; {command} org/new >&2"
    ran = subprocess.run(code, shell=True, env=offline, capture_output=True, check=False)
    # Another process may take another library of products.
    assert np.allclose(np.frombuffer(ran.stdout, np.float32), expected.numpy(), atol=1e-5)
    assert ran.returncode == 2 and ran.stderr.count(b"\n") == 1 and b"HF_HUB_OFFLINE" in ran.stderr
    assert hub.asked == []


def test_a_folder_of_that_name_wins(hub: HubServer, tiny: Files, tmp_path: Path) -> None:
    hub.add("org/local", tiny)
    (tmp_path / "org").mkdir()
    assert model_folder("org/local@main").name in hub.commits["org/local"]
    hub.asked.clear()
    assert "no model 'org/local'" in refused_load("org/local")
    write(tmp_path / "org" / "local", tiny)
    assert model_folder("org/local") == Path("org/local")
    assert hub.asked == []


@pytest.mark.parametrize("name", ["./a/b", "a/b/c", "/a/b", "../a", "a/b@", "-a/b", "a", "a/.b"])
def test_other_names_are_not_asked_for(hub: HubServer, name: str) -> None:
    assert "no model" in refused_load(name)
    assert hub.asked == []


# --- what is refused ---


def test_a_wrong_hash(hub: HubServer, tiny: Files) -> None:
    hub.add("org/hash", tiny | {WEIGHTS: tiny[WEIGHTS][:-1] + b"\x01"})
    assert f"{WEIGHTS} is damaged" in refused_load("org/hash")


def test_a_type_that_nobody_registered(hub: HubServer, tiny: Files) -> None:
    hub.add("org/type", with_config(tiny, model={"type": "os.system"}) | {"os.py": b"1 / 0"})
    assert "'os.system' is registered by no model here" in refused_load("org/type")


@pytest.mark.parametrize("lacks", sorted(FILES))
def test_a_repository_of_something_else(hub: HubServer, tiny: Files, lacks: str) -> None:
    hub.add(
        "org/other", {n: tiny[n] for n in FILES - {lacks}} | {"pytorch_model.bin": b"\x80\x02."}
    )
    assert f"org/other on the Hub has no {lacks!r}" in refused_load("org/other")
    assert fetched(hub) == set()


@pytest.mark.parametrize(("name", "limit"), [(WEIGHTS, "WEIGHTS"), (CARD, "DOCUMENT")])
def test_stated_sizes_are_checked_first(
    hub: HubServer, tiny: Files, monkeypatch: pytest.MonkeyPatch, name: str, limit: str
) -> None:
    hub.add("org/large", tiny | {CARD: b""})
    monkeypatch.setitem(hub.stated_sizes, name, 50 * 10**9)
    line = refused_load("org/large")
    assert f"{name} of org/large on the Hub has 50,000,000,000 bytes" in line
    assert f"WAVEFLOW_MAX_{limit}_BYTES" in line and fetched(hub) == set()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_no_access(hub: HubServer, tiny: Files, status: int) -> None:
    hub.add("org/closed", tiny)
    hub.refuses["org/closed"] = status
    line = refused_load("org/closed")
    assert "no model 'org/closed', neither a folder here nor on the Hub" in line
    assert f"HTTP status {status}: " in line and "HF_TOKEN" in line


def test_a_name_that_the_library_refuses(hub: HubServer) -> None:
    assert "a--b/c" in refused_load("a--b/c")


def test_a_download_that_breaks_off(hub: HubServer, tiny: Files) -> None:
    hub.add("org/broken", tiny)
    hub.cut_off.add(WEIGHTS)
    assert "cannot fetch org/broken from the Hub" in refused_load("org/broken")
    hub.cut_off.clear()
    waveflow.load("org/broken")


def test_a_cache_that_cannot_be_written(
    hub: HubServer, tiny: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/full", tiny)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(constants(), "HF_HUB_CACHE", str(tmp_path / "file"))
    line = refused_load("org/full")
    assert "cannot fetch org/full" in line and str(tmp_path / "file") in line
    assert "HF_HUB_CACHE" in line


def test_without_the_package(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in library():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    waveflow.load(tiny_model)
    assert main(["vocode", "--help"]) == 0
    for action in (
        lambda: waveflow.load("org/name"),
        lambda: waveflow.push_to_hub(tiny_model, "org/name"),
    ):
        assert "pip install 'waveflow[hub]'" in refusal(action)


def test_links_of_the_cache_lead_to_its_files_only(tiny: Files, tmp_path: Path) -> None:
    model = tmp_path / "models--org--name"
    snapshot, blobs = model / "snapshots" / "1", model / "blobs"
    snapshot.mkdir(parents=True)
    write(blobs, tiny)
    for name in tiny:
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    read_card(snapshot)
    # The cache shares a file among models.
    (tmp_path / "blobs").mkdir()
    blobs.joinpath(WEIGHTS).rename(write(tmp_path / "blobs" / "aa", {}) / WEIGHTS)
    (blobs / WEIGHTS).symlink_to(f"../../blobs/aa/{WEIGHTS}")
    read_card(snapshot)
    blobs.rename(tmp_path / "outside")
    blobs.symlink_to(tmp_path / "outside")
    assert "link out of its folder" in refusal(lambda: read_card(snapshot))
    blobs.unlink()
    (tmp_path / "outside").rename(blobs)
    model.rename(tmp_path / "name")
    assert "link out of its folder" in refusal(lambda: read_card(tmp_path / "name/snapshots/1"))


# --- push ---


def test_push_then_load(
    hub: HubServer, tiny: Files, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = with_config(tiny | {"state.json": b"{}"})
    run[CARD] = b"---\nlanguage: en\ntags:\n- mine\n---\n# Made up\n"
    folder = write(tmp_path / "run", run)
    hub.add("org/push", {EXAMPLE: b"of another model", "mine.txt": b"stays"})
    name = waveflow.push_to_hub(folder, "org/push")
    commits = hub.commits["org/push"]
    assert len(commits) == 2 and name == f"org/push@{list(commits)[-1]}"
    pushed = commits[list(commits)[-1]]
    assert set(pushed) == FILES | {CARD, "mine.txt"}
    assert (pushed[CONFIG], pushed[WEIGHTS]) == (run[CONFIG], run[WEIGHTS])
    head, _, text = pushed[CARD].decode().removeprefix("---\n").partition("---\n")
    assert text == "# Made up\n"
    assert set(head.splitlines()) == {
        "language: en", "license: cc0-1.0", "library_name: waveflow",
        "pipeline_tag: audio-to-audio", "tags:", "- mine", "- vocoder", "- mel-spectrogram",
        "- normalizing-flow", "- frameglow",
    }  # fmt: skip
    assert torch.equal(waveflow.load(name)(MEL), waveflow.load(folder)(MEL))
    assert capfd.readouterr().out == "" and hub.private == set()


def test_push_of_a_model_that_ships(hub: HubServer) -> None:
    name = waveflow.push_to_hub("frameglow-cc0", "org/cc0", private=True)
    files = contents(model_folder("frameglow-cc0"))
    pushed = hub.commits["org/cc0"][name.partition("@")[2]]
    assert pushed.pop(CARD).endswith(b"\n---\n" + files.pop(CARD))
    assert pushed == files and EXAMPLE in files and hub.private == {"org/cc0"}


def test_push_without_card_or_licence(hub: HubServer, tiny: Files, tmp_path: Path) -> None:
    folder = write(tmp_path / "new", with_config(tiny, provenance={"data": "my voice"}))
    assert "states no licence" in refusal(lambda: waveflow.push_to_hub(folder, "org/new"))
    line = refusal(lambda: waveflow.push_to_hub(folder, "org/new", licence="secret"))
    assert "cannot push to org/new" in line and "license" in line
    assert "org/new" not in hub.commits
    name = waveflow.push_to_hub(folder, "org/new", licence="MIT")
    assert waveflow.load(name).config.provenance.licence == "MIT"
    pushed = hub.commits["org/new"][name.partition("@")[2]]
    assert b"my voice" in pushed[CARD] and b"license: mit\n" in pushed[CARD]


def test_push_of_weights_that_are_not_finite(
    hub: HubServer, tiny: Files, tiny_model: Path, tmp_path: Path
) -> None:
    config, _ = load_checkpoint(tiny_model)
    weights = safetensors.torch.load(tiny[WEIGHTS])
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_checkpoint(tmp_path / "nan", config, weights)
    assert "not finite" in refusal(lambda: waveflow.push_to_hub(tmp_path / "nan", "org/nan"))
    assert hub.asked == []


def test_push_that_the_hub_refuses(hub: HubServer, tiny_model: Path) -> None:
    hub.refuses["org/theirs"] = 403
    line = refusal(lambda: waveflow.push_to_hub(tiny_model, "org/theirs"))
    assert "cannot push to org/theirs on the Hub: HTTP status 403" in line and "HF_TOKEN" in line
    assert not hub.commits.get("org/theirs")
