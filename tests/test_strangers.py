"""Files from strangers: sizes are not believed, only plain files are read, time is bounded."""

import bz2
import gzip
import hashlib
import io
import json
import os
import struct
import tarfile
import time
import tracemalloc
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch

from waveflow.audio.formats import decode_audio
from waveflow.audio.io import read_audio, read_channel, read_mel, read_mels
from waveflow.audio.mel_config import MEL_PRESETS, MelConfig
from waveflow.budget import Budget
from waveflow.checkpoint import CONFIG, MANIFEST, RUN_POINTER, WEIGHTS, load_checkpoint
from waveflow.cli.main import main
from waveflow.data import archives
from waveflow.data import clips as clips_module
from waveflow.data.archives import unpack
from waveflow.data.cache import TrainingCache
from waveflow.data.corpus import read_corpus
from waveflow.data.prepare import prepare
from waveflow.errors import (
    AudioError,
    CheckpointError,
    ConfigError,
    DataError,
    MelMismatchError,
    WaveflowError,
)
from waveflow.foreign import reader
from waveflow.foreign.convert import convert
from waveflow.limits import (
    DOCUMENT_BYTES,
    MEL_VALUES,
    MODEL_TENSORS,
    PARAMETERS,
    SAMPLES,
    SAMPLES_PER_BYTE,
    TENSORS,
    Limit,
)
from waveflow.model_files import count_weights, manifest_bytes, read_card, resolve_run
from waveflow.models.frameglow import FrameGlowConfig
from waveflow.models.registry import build_flow
from waveflow.models.waveglow import WaveGlowConfig
from waveflow.training.config import read_recipe

RATE = 22050
Write = Callable[[Path], object]


@contextmanager
def cheap(seconds: float = 5, megabytes: float = 100) -> Iterator[None]:
    """Fails if the block takes long, or much memory of Python's and numpy's."""
    start = time.process_time()
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < seconds
    assert peak < megabytes * 2**20


def refused(error: type[WaveflowError], words: str, work: Callable[[], object]) -> None:
    """Calls `work`, which must be refused soon, in one line that has these words.

    Nothing of torch's state may stay behind: builders switch the gradient off and on.
    """
    with cheap(), pytest.raises(error, match=words) as caught:
        work()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert torch.is_grad_enabled()


# --- limits ---


def test_a_limit_is_raised_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = Limit("WAVEFLOW_MAX_THINGS", 10, "things")
    limit.check("it has", 10, DataError)
    with pytest.raises(DataError, match=r"^it has 11 things, .* of 10: set WAVEFLOW_MAX_THINGS in"):
        limit.check("it has", 11, DataError)
    with pytest.raises(DataError, match="it has over 9e18 things"):
        limit.check("it has", 10**5000, DataError)
    monkeypatch.setenv(limit.name, "11")
    limit.check("it has", 11, DataError)
    for wrong in ("x", "-1", "1e3", "9" * 5000):
        monkeypatch.setenv(limit.name, wrong)
        with pytest.raises(ConfigError, match=r"WAVEFLOW_MAX_THINGS=.* is no whole number"):
            limit.check("it has", 1, DataError)


# --- models ---


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (CONFIG, WEIGHTS, MANIFEST):
        (folder / name).write_bytes((tiny_model / name).read_bytes())
    return folder


def rewrite(folder: Path, files: dict[str, bytes]) -> None:
    """Puts files into a checkpoint folder, with a manifest that fits them."""
    hashes = json.loads((folder / MANIFEST).read_bytes())["sha256"]
    for name, data in files.items():
        (folder / name).write_bytes(data)
        hashes[name] = hashlib.sha256(data).hexdigest()
    (folder / MANIFEST).write_bytes(manifest_bytes(hashes))


def with_sizes(folder: Path, **sizes: object) -> None:
    config = json.loads((folder / CONFIG).read_bytes())
    config["model"] |= sizes
    rewrite(folder, {CONFIG: json.dumps(config).encode()})


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_flows": 10**9},
        {"encoder_layers": 10**9},
        {"hidden_channels": 30_000},
        {"hidden_channels": 10**9},
        {"hidden_channels": 10**30},
        {"encoder_channels": 2**40},
        {"type": "waveglow", "n_flows": 10**9, "n_early_every": 10**9},
        {"type": "waveglow", "hidden_channels": 30_000},
        {"type": "waveglow", "kernel_size": 10**12 + 1},
        {"type": "waveglow", "upsample_kernel": 10**12},
        {"type": "waveglow", "conditioning": "repeated", "hidden_channels": 10**6},
    ],
    ids=str,
)
def test_the_weights_decide_how_large_a_config_may_be(
    model: Path, sizes: dict[str, object]
) -> None:
    if "type" in sizes:
        config = json.loads((model / CONFIG).read_bytes())
        config["model"] = sizes
        rewrite(model, {CONFIG: json.dumps(config).encode()})
    else:
        with_sizes(model, **sizes)
    refused(CheckpointError, "do not fit", lambda: load_checkpoint(model))


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (WaveGlowConfig(n_flows=10**9, n_early_every=10**9, hidden_channels=2), MODEL_TENSORS),
        (FrameGlowConfig(n_flows=10**9, hidden_channels=2), MODEL_TENSORS),
        (FrameGlowConfig(encoder_layers=10**9, encoder_channels=2), MODEL_TENSORS),
        (WaveGlowConfig(hidden_channels=30_000), PARAMETERS),
        (WaveGlowConfig(kernel_size=10**9 + 1), PARAMETERS),
        (FrameGlowConfig(hidden_channels=10**30), PARAMETERS),
    ],
)
def test_a_recipe_has_the_limits_of_the_table(
    monkeypatch: pytest.MonkeyPatch, config: FrameGlowConfig, limit: Limit
) -> None:
    monkeypatch.setenv(MODEL_TENSORS.name, "30")
    monkeypatch.setenv(PARAMETERS.name, "1000000")
    refused(ConfigError, limit.name, lambda: build_flow(config, MEL_PRESETS["hifigan"]))


@pytest.mark.parametrize("n", [0, 3, 7, 11])
def test_a_budget_leaves_nothing_behind(n: int) -> None:
    for config in (FrameGlowConfig(hidden_channels=4), WaveGlowConfig(hidden_channels=4)):
        budget = Budget(n, 10**9, "spent", ConfigError)
        refused(
            ConfigError, "spent", lambda c=config, b=budget: build_flow(c, MEL_PRESETS["nvidia"], b)
        )


def test_the_limits_let_the_largest_models_in() -> None:
    build_flow(FrameGlowConfig(), MEL_PRESETS["hifigan"])
    assert PARAMETERS.value > 2 * 88e6 and MODEL_TENSORS.value > 2 * 686


@pytest.mark.parametrize("field", ["sample_rate", "n_fft", "hop_length", "n_mels"])
@pytest.mark.parametrize("value", [2**21, 2**62, 10**30])
def test_sizes_of_a_mel(model: Path, field: str, value: int) -> None:
    sizes = {"sample_rate": RATE, "n_fft": 2 * value, "win_length": 2 * value, "hop_length": value}
    sizes = {"n_mels": {"n_mels": value}, "sample_rate": {"sample_rate": value}}.get(field, sizes)
    with pytest.raises(ValueError, match="WAVEFLOW_MAX_"):
        MelConfig.model_validate({"sample_rate": RATE} | sizes)
    config = json.loads((model / CONFIG).read_bytes())
    config["mel"] |= sizes
    rewrite(model, {CONFIG: json.dumps(config).encode()})
    refused(CheckpointError, "WAVEFLOW_MAX_", lambda: read_card(model))


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


HEADERS: dict[str, tuple[bytes, str]] = {
    "length": (header(b"{}", 2**63), "cut off"),
    "cut": (header(b'{"a":', 100), "cut off"),
    "names": (
        header(json.dumps({f"a{i}": {"dtype": "F32", "shape": [0]} for i in range(9)}).encode()),
        TENSORS.name,
    ),
    "long": (header(b'{"a": 1}' + b" " * 300), DOCUMENT_BYTES.name),
    "axes": (header(json.dumps({"a": {"dtype": "F32", "shape": [2] * 99}}).encode()), "odd shape"),
    "giant": (header(b'{"a": {"dtype": "F32", "shape": [%d]}}' % 10**200), "odd shape"),
    "negative": (header(b'{"a": {"dtype": "F32", "shape": [-1]}}'), "odd shape"),
    "text": (header(b'{"a": {"dtype": "F32", "shape": "x"}}'), "odd shape"),
    "fact": (header(b'{"a": "F32"}'), "no shape"),
    "list": (header(b"[1]"), "no JSON object"),
    "deep": (header(b"[" * 200), "not a safetensors"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_of_weights(model: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    data, words = HEADERS[kind]
    if kind == "names":
        monkeypatch.setenv(TENSORS.name, "8")
    rewrite(model, {WEIGHTS: data})
    if kind == "long":
        card = read_card(model, verify=False)
        assert card.model.type == "frameglow"
        monkeypatch.setenv(DOCUMENT_BYTES.name, "300")
    refused(CheckpointError, words, lambda: count_weights(model))
    if kind != "long":
        refused(CheckpointError, words, lambda: load_checkpoint(model))


def test_200000_names_of_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fact = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    path = tmp_path / "many.safetensors"
    path.write_bytes(header(json.dumps({f"WN.0.{i}": fact for i in range(20_000)}).encode()))
    refused(CheckpointError, TENSORS.name, lambda: convert(path))
    monkeypatch.setenv(TENSORS.name, "50")
    own, one = {f"upsample.{i}": torch.zeros(0) for i in range(60)}, torch.zeros(0)
    for weights in (own, dict.fromkeys(own, one)):
        file = io.BytesIO()
        torch.save(weights, file)
        file.seek(0)
        refused(CheckpointError, TENSORS.name, lambda file=file: reader.describe(file))


def test_a_config_is_not_built_from_a_few_large_tensors(tmp_path: Path) -> None:
    """A WaveGlow of 30,000 channels, of which only the tensors are there that tell its sizes."""
    weights = {
        "upsample.weight": torch.zeros(1, 1, 1024),
        "convinv.0.conv.weight": torch.eye(8)[..., None],
        "WN.0.in_layers.0.weight_v": torch.zeros(1, 30_000, 3),
        "WN.0.in_layers.0.weight_g": torch.ones(1, 1, 1),
    }
    torch.save(weights, tmp_path / "few.pt")
    refused(CheckpointError, "tensors are missing", lambda: convert(tmp_path / "few.pt"))


# --- mels ---


def torch_file(value: object, new: bool = True) -> Write:
    return lambda path: torch.save(value, path, _use_new_zipfile_serialization=new)


def npy_stating(shape: str, descr: str = "<f4", data: bytes = b"") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n" + data


def in_zip(data: bytes, names: tuple[str, ...] = ("mel.npy",)) -> Write:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.writestr(name, data)

    return write


def bytes_file(data: bytes) -> Write:
    return lambda path: path.write_bytes(data)


def huge_legacy(path: Path) -> None:
    """A legacy file whose storage has 2^40 numbers, it says."""
    torch.save(torch.zeros(4, 5), path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    # The count is a one-byte integer of the pickle, and eight bytes before the numbers.
    assert data.count(b"K\x14") == 1
    data = data.replace(b"K\x14", b"\x8a\x06" + (2**40).to_bytes(6, "little"))
    path.write_bytes(data.replace(struct.pack("<q", 20), struct.pack("<q", 2**40)))


def deep_key(path: Path) -> None:
    """A dict whose key is a tuple of twice a tuple of twice a tuple: hashing it never ends."""
    pickled = b"\x80\x02)q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled + b"}h\x3cNs.")
        archive.writestr("a/version", b"3\n")


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # they are old, or new, and all may lie in files
    _quantised = torch.quantize_per_tensor(torch.zeros(4, 5), 0.1, 0, torch.quint8)
    _sparse = torch.sparse_coo_tensor(size=(80, 10**9))
    _rows = torch.eye(4).to_sparse_csr()

MELS: dict[str, tuple[str, Write, str]] = {
    "expanded": (".pt", torch_file(torch.zeros(1).expand(80, 10**9)), r"\.contiguous\(\)|VALUES"),
    "expanded_legacy": (".pt", torch_file(torch.zeros(1).expand(80, 10**5), False), "contiguous"),
    "sparse": (".pt", torch_file(_sparse), "one plain tensor"),
    "sparse_rows": (".pt", torch_file(_rows), "one plain tensor"),
    "huge_legacy": (".pt", huge_legacy, MEL_VALUES.name),
    "quantised": (".pt", torch_file(_quantised), "one plain tensor"),
    "conjugate": (".pt", torch_file(torch.zeros(4, 5, dtype=torch.cfloat).conj()), "conjugated"),
    "negated": (".pt", torch_file(torch.zeros(4, 5, dtype=torch.cfloat).conj().imag), "negated"),
    "complex": (".pt", torch_file(torch.zeros(4, 5, dtype=torch.cfloat)), "not of real numbers"),
    "bools": (".pt", torch_file(torch.zeros(4, 5, dtype=torch.bool)), "not of real numbers"),
    "module": (".pt", torch_file(torch.nn.Linear(2, 2)), "expected one plain tensor"),
    "long_pickle": (".pt", torch_file({"mel": "x" * 10**6}), "WAVEFLOW_MAX_MEL_PICKLE_BYTES"),
    "deep_key": (".pt", deep_key, "holds the arrays|damaged"),
    "numbers": (".npy", bytes_file(npy_stating("(80, 10**12)")), "damaged"),
    "more": (".npy", bytes_file(npy_stating("(80, 1000000)")), "more than its file can hold"),
    "most": (".npy", bytes_file(npy_stating("(80, 1000000000000)")), MEL_VALUES.name),
    "beyond": (".npy", bytes_file(npy_stating("(80, 1" + "0" * 30 + ")")), MEL_VALUES.name),
    "negative": (".npy", bytes_file(npy_stating("(-80, -1000)")), "damaged|more than"),
    "wide_type": (".npy", bytes_file(npy_stating("(80, 100)", "|S2000000000")), "more than"),
    "long_header": (".npy", bytes_file(npy_stating("(" + "1," * 30000 + ")")), "damaged"),
    "zeros": (".npz", in_zip(npy_stating("(80, 100000)", data=bytes(32 * 10**6))), "can hold"),
    "stated": (".npz", in_zip(npy_stating("(80, 1000000000)")), MEL_VALUES.name),
    "many": (
        ".npz",
        in_zip(npy_stating("(1, 1)", data=bytes(4)), tuple(f"m{i}.npy" for i in range(300))),
        r"m0, m1, m2, m3, m4, \.\.\.;",
    ),
}


@pytest.mark.parametrize("kind", MELS)
def test_sizes_of_mel_files(tmp_path: Path, kind: str) -> None:
    suffix, write, words = MELS[kind]
    path = tmp_path / f"mel{suffix}"
    write(path)
    refused(MelMismatchError, words, lambda: read_mel(path))


def test_sizes_in_a_stream() -> None:
    for shape, words in (("(80, 1000000000000)", MEL_VALUES.name), ("(80, 1000)", "is cut off")):
        data = npy_stating(shape)
        refused(MelMismatchError, words, lambda data=data: list(read_mels(io.BytesIO(data))))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int16", "int64"])
@pytest.mark.parametrize("new", [True, False])
def test_plain_tensors_are_read(tmp_path: Path, dtype: str, new: bool) -> None:
    mel = torch.arange(60).reshape(3, 4, 5).to(getattr(torch, dtype))
    for name, tensor in {"rows": mel[1], "columns": mel[0].T, "strided": mel[2, ::2, 1::2]}.items():
        for value in (tensor, {"mel": tensor, "text": "words"}, {"any": tensor}):
            torch.save(value, tmp_path / f"{name}.pt", _use_new_zipfile_serialization=new)
            np.testing.assert_array_equal(read_mel(tmp_path / f"{name}.pt"), tensor.float())


# --- audio ---


def silence(seconds: float, path: Path) -> None:
    soundfile.write(path, np.zeros(round(seconds * RATE), np.int16), RATE, format="FLAC")


def stating(total: int) -> Write:
    """A FLAC of a second that states another number of samples."""

    def write(path: Path) -> None:
        soundfile.write(path, 0.1 * np.ones(RATE), RATE, format="FLAC")
        data = bytearray(path.read_bytes())
        field = int.from_bytes(data[18:26], "big") >> 36 << 36 | total
        data[18:26] = field.to_bytes(8, "big")
        path.write_bytes(data)

    return write


def ogg_of_huge_granule(path: Path) -> None:
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(RATE), RATE, format="OGG")
    data = bytearray(path.read_bytes())
    last = data.rindex(b"OggS")
    data[last + 6 : last + 14] = (2**62).to_bytes(8, "little")
    data[last + 22 : last + 26] = bytes(4)
    data[last + 22 : last + 26] = _ogg_checksum(data[last:]).to_bytes(4, "little")
    path.write_bytes(data)


def _ogg_checksum(page: bytes) -> int:
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc >> 31 else 0)) & 0xFFFFFFFF
    return crc


def wav_of_rate(rate: int) -> Write:
    def write(path: Path) -> None:
        soundfile.write(path, 0.1 * np.ones(RATE), RATE, format="WAV", subtype="PCM_16")
        data = bytearray(path.read_bytes())
        data[24:28] = struct.pack("<I", rate)
        path.write_bytes(data)

    return write


AUDIO: dict[str, tuple[str, Write, str]] = {
    "silence": (".flac", lambda path: silence(400, path), SAMPLES_PER_BYTE.name),
    "stated": (".flac", stating(2**36 - 1), SAMPLES.name),
    "unstated": (".flac", stating(0), SAMPLES.name),
    "granule": (".ogg", ogg_of_huge_granule, f"{SAMPLES.name}|cannot|not an audio file"),
    "8_hz": (".wav", wav_of_rate(8), "a rate of 8 Hz, and speech needs 1000"),
    "0_hz": (".wav", wav_of_rate(0), "is not an audio file|0 Hz"),
}


@pytest.mark.parametrize("kind", AUDIO)
def test_sizes_of_audio(tmp_path: Path, kind: str) -> None:
    suffix, write, words = AUDIO[kind]
    path = tmp_path / f"a{suffix}"
    write(path)
    refused(AudioError, words, lambda: read_audio(path, RATE))


def test_resampling_does_not_outgrow_the_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wav_of_rate(1000)(tmp_path / "a.wav")
    monkeypatch.setenv(SAMPLES.name, str(2 * RATE))
    refused(AudioError, "resampled to 22050 Hz, has", lambda: read_audio(tmp_path / "a.wav", RATE))


def test_common_recordings_are_within_the_limits(tmp_path: Path) -> None:
    quiet = 1e-3 * np.random.default_rng(0).standard_normal(RATE * 5)
    for suffix in (".wav", ".flac", ".ogg", ".mp3"):
        soundfile.write(tmp_path / f"a{suffix}", quiet, RATE)
        assert len(read_audio(tmp_path / f"a{suffix}")[0]) == pytest.approx(len(quiet), abs=3000)
    silence(60, tmp_path / "silent.flac")
    assert len(read_audio(tmp_path / "silent.flac")[0]) == 60 * RATE


@pytest.mark.parametrize("riff", [0, 36, 2**32 - 1])
@pytest.mark.parametrize("extra", [b"", b"LIST\x04\x00\x00\x00INFO"])
def test_a_wav_that_was_cut_has_samples_to_its_end(tmp_path: Path, riff: int, extra: bytes) -> None:
    path, whole = tmp_path / "a.wav", tmp_path / "whole.wav"
    tone = 0.1 * np.sin(np.arange(1001))
    soundfile.write(whole, tone, RATE, "PCM_16")
    data = whole.read_bytes()
    cut = data[:4] + struct.pack("<I", riff) + data[8:36] + extra + b"data" + bytes(4) + data[44:]
    path.write_bytes(cut)
    channels, rate, notes = decode_audio(path)
    np.testing.assert_array_equal(channels[:, 0], soundfile.read(whole, dtype="float32")[0])
    assert rate == RATE and notes == ["its header says 0 bytes: read to the end of the file"]


def test_a_wav_of_no_samples_stays_empty(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(0), RATE, "PCM_16")
    with open(tmp_path / "a.wav", "ab") as file:
        file.write(b"LIST\x04\x00\x00\x00INFO")
    with pytest.raises(AudioError, match="0 samples"):
        read_audio(tmp_path / "a.wav")


# --- what is no plain file ---


def pipe(path: Path, _: Path) -> None:
    os.mkfifo(path)


def device(path: Path, _: Path) -> None:
    path.symlink_to("/dev/zero")


def elsewhere(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def folder_instead(path: Path, _: Path) -> None:
    path.mkdir()


def itself(path: Path, _: Path) -> None:
    path.symlink_to(path.name)


NOT_PLAIN = [pipe, device, elsewhere, folder_instead, itself]


@pytest.fixture
def cache(tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(
        clips_module, "track_f0", lambda audio, rate, hop: np.zeros(len(audio) // hop, np.float32)
    )
    prepare([tiny_corpus], tmp_path / "cache", MEL_PRESETS["hifigan"], workers=1)
    return tmp_path / "cache"


def swap(path: Path, kind: Callable[[Path, Path], None]) -> None:
    """Puts something else in the place of a file, which is moved out of the folder."""
    outside = path.parent.parent / f"outside-{path.name}"
    path.rename(outside)
    kind(path, outside)


@pytest.mark.parametrize("kind", NOT_PLAIN)
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, MANIFEST])
def test_members_of_a_model(model: Path, name: str, kind: Callable[[Path, Path], None]) -> None:
    swap(model / name, kind)
    for work in (lambda: load_checkpoint(model), lambda: read_card(model, verify=False)):
        refused(CheckpointError, rf"{name}( |' )?.*(plain file|link|folder|levels)", work)
    if name == WEIGHTS:
        refused(CheckpointError, WEIGHTS, lambda: count_weights(model))
    assert main(["info", str(model)]) == 2


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_the_pointer_of_a_run(
    model: Path, tmp_path: Path, kind: Callable[[Path, Path], None]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    model.rename(run / "step-00000001")
    (run / RUN_POINTER).write_text('{"best": "step-00000001", "last": "step-00000001"}')
    load_checkpoint(run)
    swap(run / RUN_POINTER, kind)
    refused(CheckpointError, RUN_POINTER, lambda: load_checkpoint(run))


@pytest.mark.parametrize("kind", NOT_PLAIN)
@pytest.mark.parametrize("name", ["audio.npy", "f0.npy", "manifest.json"])
def test_members_of_a_cache(cache: Path, name: str, kind: Callable[[Path, Path], None]) -> None:
    swap(cache / name, kind)
    refused(DataError, name, lambda: TrainingCache(cache))


@pytest.mark.parametrize("kind", [k for k in NOT_PLAIN if k is not elsewhere])
@pytest.mark.parametrize("name", ["recipe.toml", "config.json", "a.wav", "a.npy", "a.pt"])
def test_files_that_are_named(
    tmp_path: Path, name: str, kind: Callable[[Path, Path], None]
) -> None:
    """A link is fine here: whoever named it meant it."""
    kind(tmp_path / name, tmp_path)
    path, weights = tmp_path / name, tmp_path / "weights.pt"
    torch.save({"upsample.weight": torch.zeros(1, 1, 1)}, weights)
    work: dict[str, Callable[[], object]] = {
        "recipe.toml": lambda: read_recipe(path),
        "config.json": lambda: convert(weights, path),
        "a.wav": lambda: read_audio(path),
        "a.npy": lambda: read_mel(path),
        "a.pt": lambda: read_mel(path),
    }
    refused(WaveflowError, name, work[name])
    if name == "a.pt":
        refused(CheckpointError, "is not a file", lambda: convert(path))


def test_a_link_within_the_folder_is_no_harm(model: Path) -> None:
    (model / CONFIG).rename(model / "other.json")
    (model / CONFIG).symlink_to("other.json")
    load_checkpoint(model)
    link = model.parent / "link"
    link.symlink_to(model)
    load_checkpoint(link)


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/etc", "a\\b", "a\0b", "x" * 300, 7, None])
def test_names_in_files_are_plain(model: Path, cache: Path, tmp_path: Path, name: object) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / RUN_POINTER).write_text(json.dumps({"best": name}))
    refused(CheckpointError, "names no best checkpoint", lambda: resolve_run(run, "best"))
    if isinstance(name, str):
        hashes = json.loads((model / MANIFEST).read_bytes())["sha256"] | {name: "0" * 64}
        (model / MANIFEST).write_bytes(manifest_bytes(hashes))
        refused(CheckpointError, "outside the folder", lambda: load_checkpoint(model))
        manifest = json.loads((cache / "manifest.json").read_bytes())
        manifest["sha256"][name] = "0" * 64
        (cache / "manifest.json").write_text(json.dumps(manifest))
        refused(DataError, "sha256", lambda: TrainingCache(cache))


def test_a_run_does_not_lead_elsewhere(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "step-00000001").symlink_to(model)
    (run / RUN_POINTER).write_text('{"best": "step-00000001"}')
    refused(CheckpointError, "is a link", lambda: load_checkpoint(run))


@pytest.mark.parametrize("damage", [b"PK\x05\x06" + bytes(18), b"\x93NUMPY\x01\x00\xff\xff{", b""])
def test_arrays_of_a_cache_that_are_none(cache: Path, damage: bytes) -> None:
    (cache / "audio.npy").write_bytes(damage)
    refused(DataError, "audio.npy", lambda: TrainingCache(cache))


# --- archives ---


def tar_of(*members: tuple[tarfile.TarInfo, bytes], tail: bytes = b"") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue() + tail


def announced(kind: bytes, size: int) -> bytes:
    """A header that announces so many bytes, and a few of them."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(2**20)


def long_names(n: int) -> bytes:
    """Headers that announce the longest name, one after another."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = b"L", 2**16
    return (info.tobuf(tarfile.GNU_FORMAT) + bytes(2**16)) * n


def sparse_map() -> bytes:
    """A sparse file of PAX whose map would have a million entries, and ends at once."""
    info = tarfile.TarInfo("a.wav")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a"}
    return info.tobuf(tarfile.PAX_FORMAT) + b"1000000\n"


def many_files(n: int, name: str = "v/{}.wav") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for i in range(n):
            archive.writestr(name.format(i), b"")
    return file.getvalue()


def rare(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("v/a.wav", b"samples")


EMPTY = tar_of((tarfile.TarInfo("v/a.wav"), b"x"))
ARCHIVES: dict[str, tuple[str, Write, str]] = {
    "long_name": (".tar.gz", bytes_file(gzip.compress(announced(b"L", 2**33))), "bytes"),
    "long_link": (".tar", bytes_file(announced(b"K", 2**34)), "bytes"),
    "pax": (".tar.bz2", bytes_file(bz2.compress(announced(b"x", 2**33))), "bytes"),
    "pax_for_all": (".tar", bytes_file(announced(b"g", 2**30)), "bytes"),
    "chain": (".tar.gz", bytes_file(gzip.compress(long_names(100) + EMPTY)), "more than"),
    "negative": (".tar", bytes_file(announced(b"L", -5)), "bytes|damaged"),
    "sparse": (".tar", bytes_file(announced(b"S", 10)), "sparse"),
    "sparse_map": (".tar", bytes_file(sparse_map()), "damaged"),
    "trailing": (".tar.gz", bytes_file(gzip.compress(EMPTY + bytes(2**25))), "more than|goes on"),
    "trailing_parts": (
        ".tar.bz2",
        bytes_file(bz2.compress(EMPTY) + bz2.compress(bytes(2**24)) * 3),
        "more than|goes on",
    ),
    "concatenated": (
        ".tar",
        bytes_file(EMPTY + tar_of((tarfile.TarInfo("v/b.wav"), os.urandom(2**21)))),
        "goes on behind the end",
    ),
    "empty_files": (".zip", bytes_file(many_files(200)), "holds more than .* files"),
    "empty_files_of_tar": (
        ".tar.gz",
        bytes_file(gzip.compress(tar_of(*[(tarfile.TarInfo(f"v/{i}"), b"") for i in range(200)]))),
        "holds more than .* files",
    ),
    "deep": (".zip", bytes_file(many_files(1, "d/" * 5000 + "{}.wav")), "too long a name"),
    "rare": (".zip", rare, "rare compression"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_sizes_of_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(archives, "FREE_MEMBERS", 50)
    suffix, write, words = ARCHIVES[kind]
    archive = tmp_path / f"voice{suffix}"
    write(archive)
    refused(DataError, words, lambda: unpack(archive, tmp_path / "out"))
    assert [path for path in (tmp_path / "out").iterdir() if not path.name.endswith("lock")] == []


def test_long_names_are_unpacked(tmp_path: Path) -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        archive = tmp_path / f"v{form}.tar.gz"
        with tarfile.open(archive, "w:gz", format=form) as tar:
            info = tarfile.TarInfo("v/" + "é" * 90 + "/" + "y" * 150 + ".wav")
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
        (found,) = unpack(archive, tmp_path / "out").rglob("*.wav")
        assert found.read_bytes() == b"abc"


# --- time ---


@pytest.mark.parametrize(
    "text",
    [
        "a." * 20_000 + "a = 1",
        "[" + "a." * 20_000 + "a]",
        "x = {" + " a ." * 10_000 + "a = 1}",
        '"a".' * 10_000 + "a = 1",
        "x = 1\n" * 40_000,
    ],
    ids=["key", "table", "inline", "quoted", "long"],
)
def test_keys_of_many_parts(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    refused(ConfigError, "WAVEFLOW_MAX_", lambda: read_recipe(tmp_path / "recipe.toml"))


def test_keys_of_few_parts_are_read(tmp_path: Path) -> None:
    lines = ["# " + "a sentence. " * 50, "x = [" + ", ".join(["1.5"] * 500) + "]", "a.b.c = 1"]
    (tmp_path / "recipe.toml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="model: Field required"):
        read_recipe(tmp_path / "recipe.toml")


# --- corpora in common forms ---


def noise_file(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    audio = 0.1 * np.random.default_rng(seed).standard_normal(3000)
    soundfile.write(path, audio, RATE, "PCM_16", format="WAV")


FORMS = [
    "{}|text",
    "{}.wav|text",
    "{}.WAV|text",
    "wavs/{}.wav|text",
    "./{}|text",
    "./wavs/{}|text",
    "wavs\\{}.wav|text",
    "/data/set/wavs/{}.wav|text|0",
    "DUMMY/{}.wav|text",
    "  {}  ",
    "{}",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("folder", ["wavs", "wav", "."])
def test_ways_to_name_a_clip(tmp_path: Path, form: str, folder: str) -> None:
    for i in range(4):
        noise_file(tmp_path / folder / f"v1.{i}{'.wav' if i else '.WAV'}")
    lines = [form.format(f"v1.{i}") for i in range(4)]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    (tmp_path / "val.txt").write_text(lines[2])
    corpus = read_corpus(tmp_path)
    assert [clip.id for clip in corpus.clips] == [f"v1.{i}" for i in range(4)]
    assert [clip.id for clip in corpus.clips if clip.split == "val"] == ["v1.2"]


def test_a_clip_of_another_folder_is_another_clip(tmp_path: Path) -> None:
    for name in ("a", "p1/a", "p2/b"):
        noise_file(tmp_path / "wavs" / f"{name}.wav")
    listed = ["a", "p1/a.wav", "/data/wavs/p2/b.wav"]
    (tmp_path / "metadata.csv").write_text("".join(f"{line}|x\n" for line in listed))
    assert [clip.id for clip in read_corpus(tmp_path).clips] == ["a", "p1/a", "p2/b"]
    for wrong in ("p3/a.wav", "/other/p2/a"):
        (tmp_path / "val.txt").write_text(wrong)
        with pytest.raises(DataError, match=r"names 1 ids"):
            read_corpus(tmp_path)


@pytest.mark.parametrize("odd", ["\u2028", "\x85", "\x0c", "\x0b", "\x1c", "\u2029", "\x1e"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_with_cr_and_lf_only(tmp_path: Path, odd: str, end: str) -> None:
    for i in range(3):
        noise_file(tmp_path / "wavs" / f"{i}.wav")
    text = "".join(f"{i}|one{odd}two{odd}|three{end}" for i in range(3))
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "metadata.csv").write_bytes(text.encode(encoding))
        assert [clip.id for clip in read_corpus(tmp_path).clips] == ["0", "1", "2"]


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("in_list", ["NFC", "NFD"])
def test_composed_and_decomposed_names(tmp_path: Path, on_disk: str, in_list: str) -> None:
    names = ["é1", "ü2", "각3"]
    for name in names:
        noise_file(tmp_path / "wavs" / f"{unicodedata.normalize(on_disk, name)}.wav")
    lines = [unicodedata.normalize(in_list, name) for name in names]
    (tmp_path / "metadata.csv").write_text("".join(f"{line}|text\n" for line in lines), "utf-8")
    (tmp_path / "val.txt").write_text(lines[1], "utf-8")
    corpus = read_corpus(tmp_path)
    assert [clip.id for clip in corpus.clips] == names and corpus.clips[1].split == "val"
    for clip in corpus.clips:
        assert clip.path.is_file()
        mel = tmp_path / f"{unicodedata.normalize(on_disk, clip.id)}.npy"
        mel.touch()
        assert clips_module.GivenMel(tmp_path / clip.id, 80, 0).path() == mel


# --- one file, one fault ---


def prepared(folder: Path, out: Path) -> dict[str, str]:
    """Reasons of what was left out, by name."""
    report = prepare([folder], out, MEL_PRESETS["hifigan"], workers=1)
    assert len(report.clips) == 2
    json.loads((out / "report.json").read_bytes())
    return {Path(clip.file).name: clip.reason for clip in report.left_out}


@pytest.fixture
def voice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(
        clips_module, "track_f0", lambda audio, rate, hop: np.zeros(len(audio) // hop, np.float32)
    )
    for i in range(2):
        noise_file(tmp_path / "voice" / f"good{i}.wav", i)
    return tmp_path / "voice"


def test_unforeseen_files_do_not_end_the_job(voice: Path, tmp_path: Path) -> None:
    for kind, (suffix, write, _) in AUDIO.items():
        write(voice / f"{kind}{suffix}")
    os.mkfifo(voice / "pipe.wav")
    (voice / "dangling.wav").symlink_to("nowhere.wav")
    (voice / "phone.m4a").write_bytes(b"x")
    (voice / "plain").write_bytes((voice / "good0.wav").read_bytes())
    noise_file(voice / "name.wav", 7)
    os.rename(voice / "name.wav", os.fsencode(voice) + b"/caf\xe9.wav")
    reasons = prepared(voice, tmp_path / "cache")
    ignored = {"pipe.wav", "dangling.wav", "phone.m4a", "plain", "caf\\udce9.wav"}
    assert {name for name, reason in reasons.items() if reason == "ignored"} == ignored
    assert {name for name, reason in reasons.items() if reason == "unreadable"} == {
        f"{kind}{suffix}" for kind, (suffix, _, _) in AUDIO.items()
    }


def test_a_folder_whose_name_is_not_utf_8(voice: Path, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xe9sum\xe9"))
    voice.rename(odd)
    (odd / "bad.wav").write_text("no audio")
    reasons = prepared(odd, tmp_path / "cache")
    assert reasons == {"bad.wav": "unreadable"}
    assert TrainingCache(tmp_path / "cache").manifest.clips[0].corpus == "r\\udce9sum\\udce9"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("first\nsecond"), "internal error"),
        (ZeroDivisionError(), "internal error"),
        (OSError(5, "Input/output error"), "internal error"),
        (MemoryError(), "unreadable"),
    ],
)
def test_a_fault_of_ours_is_called_one(
    voice: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    reason: str,
) -> None:
    noise_file(voice / "odd.wav", 5)

    def fail_at_odd(path: Path) -> object:
        if path.name == "odd.wav":
            raise error
        return read_channel(path)

    monkeypatch.setattr(clips_module, "read_channel", fail_at_odd)
    status = main(["prepare", str(voice), "-o", str(tmp_path / "cache"), "--workers", "1"])
    assert status == (1 if reason == "internal error" else 0)
    out = capsys.readouterr().out
    assert f"1 files left out (1 {reason})" in out and "second" not in out
    assert len(TrainingCache(tmp_path / "cache").manifest.clips) == 2


def test_a_missing_package_is_not_a_files_fault(
    voice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise ConfigError("pip install pyworld")

    monkeypatch.setattr(clips_module, "track_f0", missing)
    with pytest.raises(ConfigError):
        prepared(voice, tmp_path / "cache")


def test_safetensors_still_reads_what_the_header_check_lets_in(model: Path) -> None:
    weights = safetensors.torch.load((model / WEIGHTS).read_bytes())
    assert count_weights(model) == sum(t.numel() for t in weights.values() if t.is_floating_point())
