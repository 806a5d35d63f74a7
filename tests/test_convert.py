"""`waveflow convert`: every published form of a checkpoint gives the published numbers.

The fixtures were computed with the published code. Tolerances are those of test_waveglow.py: the
measured rounding of the references with room for another order of summation.
"""

import json
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import encode_with_terms, latent, published_loss, upsample_weight
from safetensors.torch import load_file, save_file
from torch import Tensor

import waveflow
from waveflow.audio.mel import MEL_PRESETS
from waveflow.checkpoint import load_checkpoint
from waveflow.cli.convert import Lineage as CliLineage
from waveflow.cli.main import main
from waveflow.errors import CheckpointError
from waveflow.foreign import sandbox
from waveflow.foreign.convert import Converted, Lineage, convert
from waveflow.foreign.nvidia import nvidia_names
from waveflow.models.waveglow import WaveGlowConfig

FIXTURES = Path(__file__).parent / "fixtures"
ENVIRONMENT = {"PYTHONPATH": str(Path(waveflow.__file__).parent.parent)}
SMALL = FIXTURES / "nvidia-waveglow-small"
REMOVED = "nvidia-waveglow-removed"
# File: its lineage, its container, its iteration.
CHECKPOINTS: dict[str, tuple[Lineage, str, int]] = {
    "nvidia-waveglow-zip/waveglow_4000": ("glow", "zip", 4000),
    "nvidia-waveglow-legacy/waveglow_4000": ("glow", "legacy", 4000),
    f"{REMOVED}/waveglow_removed.pt": ("glow", "zip", 0),
    f"{REMOVED}/waveglow_removed_state_dict.pt": ("glow", "zip", 0),
    f"{REMOVED}/waveglow_256channels_mixed.pt": ("glow", "zip", 0),
    f"{REMOVED}/waveglow_256channels_mixed_state_dict.pt": ("glow", "zip", 4000),
    "nvidia-waveglow-old-layout/waveglow_old.pt": ("glow", "legacy", 580_000),
    "nvidia-waveglow-glow-old/waveglow_glow_old.pt": ("glow_old", "legacy", 580_000),
    "nvidia-waveglow-dle/nvidia_waveglowpyt_fp32_module.pt": ("dle", "legacy", 0),
    "nvidia-waveglow-dle/checkpoint_WaveGlow_module1.pt": ("dle", "zip", 0),
}
GLOW_OLD = FIXTURES / "nvidia-waveglow-glow-old/waveglow_glow_old.pt"
SIZES = WaveGlowConfig(
    n_mels=4, n_flows=6, n_early_every=2, n_early_size=2, n_layers=3, hidden_channels=10
)


@cache
def converted(name: str) -> Converted:
    return convert(FIXTURES / name)


def arrays_of(name: str) -> dict[str, Tensor]:
    with np.load((FIXTURES / name).parent / "reference.npz", allow_pickle=False) as arrays:
        return {k: torch.from_numpy(v) for k, v in arrays.items() if v.dtype.kind in "fi"}


@pytest.fixture(params=CHECKPOINTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def small() -> dict[str, Tensor]:
    return load_file(SMALL / "state_dict.safetensors")


Save = Callable[[object], Path]


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def save(request: pytest.FixtureRequest, tmp_path: Path) -> Save:
    def to_file(data: object) -> Path:
        torch.save(data, tmp_path / "data.pt", _use_new_zipfile_serialization=request.param)
        return tmp_path / "data.pt"

    return to_file


def refusal(path: Path, config: Path | None = None, lineage: Lineage = "auto") -> str:
    with pytest.raises(CheckpointError) as caught:
        convert(path, config, lineage)
    message = str(caught.value)
    assert "\n" not in message
    return message


def same_weights(one: Converted, state_dict: dict[str, Tensor]) -> bool:
    own = one.flow.state_dict()
    return all(
        torch.equal(own[own_name], state_dict[name].reshape(own[own_name].shape))
        for name, own_name in nvidia_names(one.flow).items()
    )


def effective(one: Converted) -> dict[str, Tensor]:
    """Weights as they enter: g v / |v| instead of g and v."""
    flow = one.flow.to(torch.float64)
    found = {n: m.weight for n, m in flow.named_modules() if hasattr(m, "weight")}
    return {n: w.detach().clone() for n, w in found.items() if isinstance(w, Tensor)}


# --- parity ---


@pytest.mark.parametrize(("sigma", "array"), [(0.666, "0666"), (1.0, "1")])
def test_synthesis_from_stored_noise(name: str, sigma: float, array: str) -> None:
    reference = arrays_of(name)
    with torch.no_grad():
        audio = converted(name).flow.decode(sigma * latent(reference), reference["infer_mel"])
    torch.testing.assert_close(audio, reference[f"infer_audio_sigma_{array}"], rtol=0, atol=3e-5)


def test_forward(name: str) -> None:
    reference = arrays_of(name)
    derived = "derived_" if "derived_z" in reference else ""
    flow, audio, mel = converted(name).flow, reference["audio"], reference["mel"]
    z, log_s, log_det = encode_with_terms(flow, audio, mel)
    sums = {"log_s_sum": log_s.sum(1), "log_det_W": log_det.sum(1)}
    torch.testing.assert_close(z, reference[f"{derived}z"], rtol=0, atol=1e-5)
    for key, value in sums.items():
        torch.testing.assert_close(value, reference[f"{derived}{key}"], rtol=1e-6, atol=3e-3)
    for key, sigma in (("1", 1.0), ("07071", 0.7071)):
        loss = published_loss(flow, audio, mel, sigma)
        expected = reference[f"{derived}loss_sigma_{key}"]
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)


def test_the_other_role_of_the_halves_would_not_pass(save: Save) -> None:
    name = "nvidia-waveglow-glow-old/waveglow_glow_old.pt"
    reference = arrays_of(name)
    other = convert(save(bare(GLOW_OLD)), lineage="glow")
    with torch.no_grad():
        audio = other.flow.decode(latent(reference), reference["infer_mel"])
    assert (audio - reference["infer_audio_sigma_1"]).abs().max() > 0.1


def test_what_was_read(name: str) -> None:
    one, (lineage, container, iteration) = converted(name), CHECKPOINTS[name]
    assert (one.lineage, one.header.container, one.header.iteration) == (
        lineage,
        container,
        iteration,
    )
    update = {"n_early_every": 4, "alternate": True} if lineage == "glow_old" else {}
    assert one.config.model == SIZES.model_copy(update=update)
    assert one.config.mel == MEL_PRESETS["nvidia"].model_copy(update={"n_mels": 4})
    assert one.config.provenance.steps == iteration
    assert one.config.provenance.data.startswith("unknown")
    assert one.config.provenance.licence == ""
    assert not one.flow.training


@pytest.mark.parametrize("name", [n for n in CHECKPOINTS if "glow-old" not in n], ids=str)
def test_the_weights_are_those_of_the_plain_fixture(name: str, small: dict[str, Tensor]) -> None:
    one = converted(name)
    if "removed" not in name:
        assert same_weights(one, small)
        return
    expected = effective(convert(SMALL / "state_dict.safetensors"))
    # Folding rounds once: an ulp of weights below 4.
    for key, value in effective(convert(FIXTURES / name)).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=5e-7, msg=key)


def test_80_bands_as_safetensors(tmp_path: Path) -> None:
    folder = FIXTURES / "nvidia-waveglow-80mel"
    weights = load_file(folder / "state_dict.safetensors")
    with np.load(folder / "reference.npz", allow_pickle=False) as arrays:
        weights["upsample.weight"] = upsample_weight(arrays)
    save_file(weights, tmp_path / "all.safetensors")
    reference = arrays_of("nvidia-waveglow-80mel/state_dict.safetensors")
    one = convert(tmp_path / "all.safetensors", folder / "config.json")
    assert one.config.mel == MEL_PRESETS["nvidia"]
    with torch.no_grad():
        audio = one.flow.decode(latent(reference), reference["infer_mel"])
    torch.testing.assert_close(audio, reference["infer_audio_sigma_1"], rtol=0, atol=3e-5)


# --- layouts ---


@pytest.mark.parametrize("prefix", ["module.", "module.1."])
def test_prefixes_of_wrapped_models(save: Save, small: dict[str, Tensor], prefix: str) -> None:
    path = save({"state_dict": {prefix + k: v for k, v in small.items()}})
    assert same_weights(convert(path), small)


def test_one_tensor_under_two_names(save: Save, small: dict[str, Tensor]) -> None:
    doubled = small | {"module.upsample.bias": small["upsample.bias"]}
    assert "upsample.bias twice" in refusal(save({"state_dict": doubled}))


def test_weight_norm_of_newer_torch(save: Save, small: dict[str, Tensor]) -> None:
    newer = {
        key.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): value
        for key, value in small.items()
    }
    assert same_weights(convert(save({"model": OrderedDict(newer)})), small)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_become_float32(
    save: Save, small: dict[str, Tensor], dtype: torch.dtype
) -> None:
    narrow = {key: value.to(dtype) for key, value in small.items()}
    one = convert(save(narrow))
    assert same_weights(one, {key: value.float() for key, value in narrow.items()})
    assert {v.dtype for v in one.flow.state_dict().values()} == {torch.float32}


def test_views_of_one_storage(save: Save, small: dict[str, Tensor]) -> None:
    """Offsets and strides are honoured: all tensors in one storage, the last axis slowest."""
    one = torch.cat(
        [value.permute(*range(value.dim())[::-1]).flatten() for value in small.values()]
    )
    views, start = {}, 0
    for key, value in small.items():
        shape = tuple(value.shape)[::-1]
        part = one[start : start + value.numel()].view(shape)
        views[key] = part.permute(*range(value.dim())[::-1])
        start += value.numel()
    assert same_weights(convert(save(views)), small)


def test_a_folded_row_of_zeros_stays_zero(save: Save) -> None:
    path = FIXTURES / REMOVED / "waveglow_removed_state_dict.pt"
    weights = torch.load(path, weights_only=True)
    weights["WN.0.start.weight"][3] = 0
    one = convert(save(weights))
    network = next(m for m in one.flow.modules() if hasattr(m, "start"))
    folded = weights["WN.0.start.weight"]
    torch.testing.assert_close(network.start.weight.detach(), folded, rtol=1e-6, atol=0)


# --- lineages ---


def bare(path: Path) -> dict[str, Tensor]:
    """The state dict of a file without what tells its lineage."""
    _, weights = sandbox.read_torch_file(path)
    return weights


def test_weights_without_their_classes_need_the_flag(save: Save) -> None:
    reference = arrays_of("nvidia-waveglow-glow-old/waveglow_glow_old.pt")
    path = save({"model": bare(GLOW_OLD), "iteration": 7})
    assert "say --lineage glow_old, dle or glow" in refusal(path)
    one = convert(path, lineage="glow_old")
    with torch.no_grad():
        audio = one.flow.decode(latent(reference), reference["infer_mel"])
    torch.testing.assert_close(audio, reference["infer_audio_sigma_1"], rtol=0, atol=3e-5)


def test_dle_weights_without_their_config_need_the_flag(
    save: Save, small: dict[str, Tensor]
) -> None:
    name = "nvidia-waveglow-dle/nvidia_waveglowpyt_fp32_module.pt"
    path = save(bare(FIXTURES / name))
    assert "--lineage" in refusal(path)
    assert same_weights(convert(path, lineage="dle"), small)


def test_the_oldest_layout_needs_no_classes(save: Save, small: dict[str, Tensor]) -> None:
    path = save(bare(FIXTURES / "nvidia-waveglow-old-layout/waveglow_old.pt"))
    assert same_weights(convert(path), small)


@pytest.mark.parametrize("lineage", ["glow", "dle"])
def test_a_flag_that_the_class_contradicts(lineage: Lineage) -> None:
    assert f"its class is of glow_old: leave --lineage {lineage}" in refusal(
        GLOW_OLD, lineage=lineage
    )
    other = FIXTURES / "nvidia-waveglow-zip/waveglow_4000"
    assert "its class is of glow: leave --lineage glow_old" in refusal(other, lineage="glow_old")


def test_a_row_without_direction(save: Save, small: dict[str, Tensor]) -> None:
    weights = {k: v.clone() for k, v in small.items()}
    weights["WN.0.start.weight_v"][1] = 0
    assert "layer start has a row of zeros" in refusal(save({"state_dict": weights}))


def test_glow_old_has_early_outputs_every_four_flows(save: Save) -> None:
    path = save(bare(FIXTURES / "nvidia-waveglow-zip/waveglow_4000"))
    assert "n_early_every is 2, but glow_old synthesises with 4" in refusal(
        path, lineage="glow_old"
    )


# --- sizes and settings ---


@pytest.fixture
def config_with(tmp_path: Path) -> Callable[..., Path]:
    def write(section: str, **values: object) -> Path:
        config = json.loads((SMALL / "config.json").read_text())
        config[section].update(values)
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path / "config.json"

    return write


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_flows": 12},
        {"n_mel_channels": 80},
        {"n_early_every": 4},
        {"n_early_size": 4},
        {"n_group": 16},
        {"WN_config": {"n_layers": 8}},
        {"WN_config": {"n_channels": 256}},
        {"WN_config": {"kernel_size": 5}},
    ],
    ids=str,
)
def test_sizes_of_the_config_are_checked(
    config_with: Callable[..., Path], wrong: dict[str, object]
) -> None:
    config = config_with("waveglow_config", **wrong)
    message = refusal(SMALL / "state_dict.safetensors", config)
    assert "is stated as" in message and "make it" in message
    # A file that says its sizes itself needs no config, right or wrong.
    file_states = FIXTURES / "nvidia-waveglow-dle/checkpoint_WaveGlow_module1.pt"
    assert convert(file_states, config).config.model == SIZES


def test_the_mel_follows_the_config(config_with: Callable[..., Path]) -> None:
    settings = {"sampling_rate": 16000, "filter_length": 2048, "win_length": 800, "mel_fmin": 20.0}
    path = SMALL / "state_dict.safetensors"
    one = convert(path, config_with("data_config", **settings, mel_fmax=None))
    fields = ("sample_rate", "n_fft", "win_length", "f_min", "f_max", "n_mels", "padding")
    assert [getattr(one.config.mel, field) for field in fields] == [
        16000,
        2048,
        800,
        20.0,
        None,
        4,
        "center",
    ]


def test_hop_length(config_with: Callable[..., Path], small: dict[str, Tensor], save: Save) -> None:
    """The upsampler's stride is in modules, not in state dicts; 256 where it has 1024 taps."""
    other = config_with("data_config", hop_length=200)
    plain = SMALL / "state_dict.safetensors"
    assert convert(plain, other).config.model.hop_length == 200
    assert "hop_length is 200, the upsampler's 256" in refusal(
        FIXTURES / "nvidia-waveglow-zip/waveglow_4000", other
    )
    small["upsample.weight"] = small["upsample.weight"][..., :800].contiguous()
    path = save(small)
    assert "800 taps, not 1024: give --config with the hop_length" in refusal(path)
    assert convert(path, other).config.mel.hop_length == 200


def test_no_early_outputs(small: dict[str, Tensor], save: Save) -> None:
    two = {k: v for k, v in small.items() if not any(f".{i}." in k[:10] for i in range(2, 6))}
    one = convert(save(two))
    assert (one.config.model.n_flows, one.config.model.n_early_every) == (2, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "config: "),
        ('{"waveglow_config": {"n_flows": "many"}}', "waveglow_config.n_flows: "),
        ('{"data_config": {"sampling_rate": -1}}', "data_config.sampling_rate: "),
        ('{"data_config": {"mel_fmax": 20000}}', "above half the sample rate"),
    ],
)
def test_configs_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert message in refusal(SMALL / "state_dict.safetensors", tmp_path / "config.json")


def test_a_missing_config(tmp_path: Path) -> None:
    assert "nowhere.json cannot be read" in refusal(
        SMALL / "state_dict.safetensors", tmp_path / "nowhere.json"
    )


# --- what is no WaveGlow ---


Change = Callable[[dict[str, Tensor]], object]
STRANGE: dict[str, tuple[Change, str]] = {
    "empty": (lambda w: w.clear(), "no tensors"),
    "no_upsampler": (lambda w: w.pop("upsample.weight"), "no tensor 'upsample.weight'"),
    "no_bias": (lambda w: w.pop("upsample.bias"), "'upsample.bias' the first"),
    "no_matrices": (lambda w: [w.pop(f"convinv.{k}.conv.weight") for k in range(6)], "convinv.0"),
    "one_network_less": (
        lambda w: [w.pop(k) for k in list(w) if k.startswith("WN.5.")],
        "tensors are missing, 'WN.5.",
    ),
    "no_direction": (lambda w: w.pop("WN.1.start.weight_v"), "'WN.1.start.weight_v'"),
    "stray": (lambda w: w.update(stray=torch.zeros(3)), "belong to no layer"),
    "stray_layer": (lambda w: w.update({"a.weight": torch.zeros(3)}), "belong to no layer"),
    "flat": (lambda w: w.update({"upsample.weight": torch.zeros(4)}), "has the shape (4,)"),
    "scalar": (
        lambda w: w.update({"convinv.3.conv.weight": torch.tensor(1.0)}),
        "has the shape ()",
    ),
    "no_bands": (lambda w: w.update({"upsample.weight": torch.zeros(0, 0, 1024)}), "the shape (0"),
    "odd_matrix": (
        lambda w: w.update({"convinv.3.conv.weight": torch.eye(7)[..., None]}),
        "not a WaveGlow's",
    ),
    "flat_matrix": (
        lambda w: w.update({"convinv.3.conv.weight": torch.ones(6, 5, 1)}),
        "has shape (6, 5, 1)",
    ),
    "no_inverse": (
        lambda w: w.update({"convinv.0.conv.weight": torch.ones(8, 8, 1)}),
        "1x1 convolution 0 has no inverse",
    ),
    "nan": (lambda w: w["upsample.bias"].fill_(torch.nan), "not finite"),
    "integers": (lambda w: w.update({"upsample.bias": torch.zeros(4, dtype=torch.int64)}), "Long"),
    "even_kernel": (
        lambda w: w.update(
            {k: v[..., :2].clone() for k, v in w.items() if "in_layers" in k and k[-1] == "v"}
        ),
        "kernel_size must be odd",
    ),
    "odd_rows": (
        lambda w: w.update(
            {
                "WN.0.cond_layers.0.weight": torch.ones(20, 32, 1),
                "WN.0.cond_layers.1.weight": torch.ones(20, 31, 1),
                "WN.0.res_layers.0.weight": torch.ones(20, 31, 1),
                "WN.0.skip_layers.0.weight": torch.ones(20, 31, 1),
            }
        ),
        "differ in size",
    ),
    "no_skip": (
        lambda w: w.update({"WN.0.res_layers.0.weight": torch.ones(20, 31, 1)}),
        "has no weight (out, in, taps)",
    ),
    "some_bias": (
        lambda w: w.update(
            {
                "WN.0.cond_layers.0.weight": torch.ones(20, 32, 1),
                "WN.0.cond_layers.1.weight": torch.ones(20, 32, 1),
                "WN.0.cond_layers.1.bias": torch.ones(20),
            }
        ),
        "are incomplete",
    ),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_weights_that_are_no_waveglow(tmp_path: Path, small: dict[str, Tensor], kind: str) -> None:
    change, message = STRANGE[kind]
    change(small)
    torch.save(small, tmp_path / "strange.pt")
    found = refusal(tmp_path / "strange.pt", lineage="glow")
    assert found.startswith(f"{tmp_path / 'strange.pt'}: ") and message in found


@pytest.mark.parametrize(
    "data",
    [torch.zeros(3), [1, 2], {"model": 3}, {"state_dict": {"a": "b"}}, "text", None, {"a": {}}],
    ids=repr,
)
def test_files_of_something_else(save: Save, data: object) -> None:
    assert "it holds no" in refusal(save(data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"PK\x03\x04",
        b"text\n",
        b"\x00" * 64,
        struct.pack("<Q", 2) + b"{}",
        b"\x80\x02.",
    ],
    ids=repr,
)
def test_files_that_are_no_checkpoints(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file.pt").write_bytes(data)
    assert str(tmp_path / "file.pt") in refusal(tmp_path / "file.pt")


def test_torchscript_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"script/{name}", b"")
    assert "TorchScript" in refusal(tmp_path / "script.pt")


def test_not_a_file(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path} is not a file"
    assert "is not a file" in refusal(Path("/dev/zero"))


# --- the process that reads ---


linux = pytest.mark.skipif(sys.platform != "linux", reason="limits of the kernel")


@pytest.fixture(scope="module")
def laborious(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A legacy file whose data are many empty dicts: seconds of time, hundreds of MB."""
    start = (FIXTURES / "nvidia-waveglow-legacy/waveglow_4000").read_bytes()
    head = start[: start.index(b".\x80", start.index(b"little_endian")) + 1]
    path = tmp_path_factory.mktemp("large") / "large.pt"
    path.write_bytes(head + b"\x80\x02](" + b"}" * 2_900_000 + b"e.")
    return path


@linux
def test_memory_is_limited(laborious: Path) -> None:
    with pytest.raises(CheckpointError, match="more memory"):
        sandbox.read_torch_file(laborious, memory_margin=150 * 2**20)


@linux
def test_time_is_limited(laborious: Path) -> None:
    with pytest.raises(CheckpointError, match="takes more than 1 s"):
        sandbox.read_torch_file(laborious, max_cpu_seconds=1)


@linux
def test_a_session_may_have_tighter_limits() -> None:
    code = (
        "import resource; from pathlib import Path; from waveflow.foreign import sandbox;"
        "resource.setrlimit(resource.RLIMIT_CPU, (50, 50));"
        "print(sandbox.read_torch_file(Path('nvidia-waveglow-zip/waveglow_4000'))[0].container)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=FIXTURES, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert (done.stdout.strip(), done.returncode) == ("zip", 0), done.stderr


@linux
@pytest.mark.parametrize("deed", ["open('/etc/hostname')", "__import__('socket').socket()"])
def test_the_reader_opens_nothing(deed: str) -> None:
    """Should a file ever make it run something, then without files and without network."""
    code = (
        "import resource, socket, sys; from waveflow.foreign.reader import _limit; "
        f"_limit(60, 2**31); {deed}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    assert b"Too many open files" in done.stderr


# --- the command ---


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str, str]]]:
    def call(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(arg) for arg in args])
        return (status, *capsys.readouterr())

    yield call


Run = Callable[..., tuple[int, str, str]]


def test_the_command(run: Run, tmp_path: Path) -> None:
    name = "nvidia-waveglow-legacy/waveglow_4000"
    status, out, err = run("convert", FIXTURES / name, "-o", tmp_path / "model")
    assert (status, err) == (0, "")
    assert "glow (legacy), 6 flows of 3 layers of 10 channels" in out
    assert "iteration 4,000" in out and f"--model {tmp_path / 'model'}" in out
    config, flow = load_checkpoint(tmp_path / "model")
    assert config == converted(name).config
    assert all(
        torch.equal(value, flow.state_dict()[key])
        for key, value in converted(name).flow.state_dict().items()
    )
    vocoder = waveflow.load(tmp_path / "model")
    assert vocoder.log_prob(torch.zeros(5 * 256), torch.zeros(4, 5)).isfinite().all()


def test_nothing_is_replaced(run: Run, tmp_path: Path) -> None:
    source, folder = SMALL / "state_dict.safetensors", tmp_path / "model"
    folder.mkdir()
    assert run("convert", source, "-o", folder)[0] == 0
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(folder)
    before = sorted(tmp_path.rglob("*"))
    for out in (folder, tmp_path / "link", source, tmp_path / "no" / "where"):
        status, _, err = run("convert", source, "-o", out)
        assert status == 2 and str(out) in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_refused_file_leaves_no_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.pt").write_bytes(b"\x80\x02cos\nsystem\n.")
    status, _, err = run("convert", tmp_path / "bad.pt", "-o", tmp_path / "model")
    assert status == 2 and "os.system" in err and err.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_the_flag_has_the_librarys_lineages() -> None:
    assert [value.value for value in CliLineage] == list(Lineage.__args__)  # type: ignore[attr-defined]


def test_info_without_verifying(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert run("convert", SMALL / "state_dict.safetensors", "-o", folder)[0] == 0
    shutil.copy(folder / "config.json", tmp_path)
    (folder / "config.json").write_text((tmp_path / "config.json").read_text() + "\n")
    assert run("info", folder)[0] == 2
    status, out, _ = run("info", folder, "--no-verify")
    assert status == 0 and "unknown; converted from a published glow checkpoint" in out
