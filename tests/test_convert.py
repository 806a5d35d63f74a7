"""`waveflow convert`: every published form of a checkpoint gives the published numbers.

The published code computed the fixtures. Tolerances are those of test_waveglow.py: the measured
rounding of the references, with room for another order of summation.
"""

import argparse
import collections
import datetime
import io
import json
import pathlib
import random
import shutil
import struct
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import encode_with_terms, latent, published_loss, upsample_weight
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import waveflow
from waveflow.audio.mel import MEL_PRESETS
from waveflow.checkpoint import load_checkpoint
from waveflow.cli.convert import Lineage as CliLineage
from waveflow.cli.main import main
from waveflow.errors import CheckpointError
from waveflow.foreign import reader, sandbox
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


def saved(data: object, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(data, file, **options)
    return file


def read(file: io.BytesIO) -> tuple[sandbox.Header, dict[str, Tensor]]:
    """What the two halves of the reader give, both in this process."""
    file.seek(0)
    return sandbox.load(reader.describe(file).encode(), file)


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


Save = Callable[[object], Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def to_file(data: object) -> Path:
        torch.save(data, tmp_path / "data.pt")
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


CONTAINERS = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


@pytest.mark.parametrize(
    "key", ["model", "state_dict", "model_state_dict", "waveglow", "generator", "net", "other"]
)
def test_keys_of_checkpoints(small: dict[str, Tensor], key: str) -> None:
    for weights in (small, {f"module.{name}": tensor for name, tensor in small.items()}):
        header, found = read(saved({"epoch": 3, key: weights, "iteration": 5}))
        assert same(found, small) and header.iteration == 5


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "module.1.", "_orig_mod.", "model.", "waveglow.", "generator.", "vocoder."),
        *("module._orig_mod.", "_orig_mod.module.", "model.generator.module.", "tts.vocoder.net."),
    ],
)
def test_prefixes_of_state_dicts(tmp_path: Path, small: dict[str, Tensor], prefix: str) -> None:
    wrapped = {f"{prefix}{name}": tensor for name, tensor in small.items()}
    others = {"tts.encoder.weight": torch.ones(3)} if prefix.startswith("tts.") else {}
    assert same(read(saved(wrapped | others))[1], small)
    assert same(read(saved({"state_dict": collections.OrderedDict(wrapped)}))[1], small)
    save_file(wrapped | others, tmp_path / "wrapped.safetensors")
    assert same_weights(convert(tmp_path / "wrapped.safetensors"), small)


def test_compiled_parts(small: dict[str, Tensor]) -> None:
    compiled = {name.replace("WN.0.", "WN.0._orig_mod."): small[name] for name in small}
    assert same(read(saved(compiled))[1], small)


def test_several_models(small: dict[str, Tensor]) -> None:
    other = {name: -tensor for name, tensor in small.items()}
    assert same(read(saved({"ema": other, "model": small}))[1], small)
    assert same(read(saved({"generator": small, "waveglow": other}))[1], other)
    assert same(read(saved({"last": small, "best": small}))[1], small)
    assert same(read(saved({"last": small, "x": {"preupsample.weight": torch.ones(1)}}))[1], small)
    with pytest.raises(CheckpointError, match=r"it holds 2 models, under 'best\.' and 'last\.'"):
        read(saved({"last": small, "best": other}))


def test_one_tensor_under_two_names(tmp_path: Path, save: Save, small: dict[str, Tensor]) -> None:
    bias = {"_orig_mod.upsample.bias": small["upsample.bias"] + 1}
    assert "'upsample.bias' twice" in refusal(save({"state_dict": small | bias}))
    save_file(small | bias, tmp_path / "twice.safetensors")
    assert "'upsample.bias' twice" in refusal(tmp_path / "twice.safetensors")
    newer = "WN.0.start.parametrizations.weight.original0"
    doubled = small | {newer: small["WN.0.start.weight_g"] + 1}
    assert "'WN.0.start.weight_g' twice" in refusal(save(doubled))


class Options(argparse.Namespace):
    """A class of the training script, in a file that nobody has."""

    __slots__ = ("extra",)


def beside(small: dict[str, Tensor]) -> dict[str, object]:
    """What training scripts keep beside their model."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    tagged, plain = nn.Parameter(torch.ones(2)), torch.ones(2)
    tagged.tag, plain.tag = "a", "b"  # type: ignore[attr-defined]
    options = Options(path=pathlib.Path("runs"), sizes=torch.Size([3, 4]))
    options.extra = 1
    itself: list[object] = []
    itself.append((itself, {"a": itself}))
    return {
        "args": argparse.Namespace(rate=1e-4, path=pathlib.PurePosixPath("runs/1")),
        "options": options,
        "history": collections.defaultdict(list, {"loss": [np.float64(0.5)], 3: []}),
        "last": collections.deque([1, 2], 5),
        "counts": collections.Counter("abc"),
        "numpy": (np.float32(1.5), np.int64(4), np.arange(6).reshape(2, 3), np.dtype("f2")),
        "torch": (torch.Size([1, 2]), torch.float16, torch.device("cpu"), torch.ones(2, 2).T),
        "numbers": (2**70, -5, 1e300, 1 + 2j, True, None, b"bytes", "\u00fc", bytes(300)),
        "sets": ({1, 2}, frozenset([("a", 1)]), set()),
        "keys": {("a", 1): 2, 5: 6, None: 7, 1.5: 8, b"b": 9},
        "types": (torch.complex(torch.ones(1), torch.ones(1)), torch.ones(2, dtype=torch.int8)),
        "date": datetime.datetime(2018, 11, 8),
        "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
        "parameters": (tagged, plain, nn.Parameter(torch.ones(1), requires_grad=False)),
        "optimizer": optimizer.state_dict(),
        "whole_optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1),
        "itself": itself,
    }


def test_tensors_with_attributes(small: dict[str, Tensor]) -> None:
    for make in (nn.Parameter, torch.clone):
        tagged = {name: make(tensor) for name, tensor in small.items()}
        for tensor in tagged.values():
            tensor.tag = "mine"
        assert same(read(saved(tagged))[1], small)


@CONTAINERS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_other_things_in_checkpoints(small: dict[str, Tensor], protocol: int, new: bool) -> None:
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": new}
    data = {**beside(small), "model": small, "iteration": 7}
    header, found = read(saved(data, **options))
    assert same(found, small) and header.iteration == 7


# --- pickled modules ---


def published_classes(monkeypatch: pytest.MonkeyPatch, file: str) -> dict[str, type[nn.Module]]:
    """Classes of the published names in a Python file that exists only during the test."""
    names = ("WaveGlow", "WN", "Invertible1x1Conv")
    classes = {name: type(name, (nn.Module,), {"__module__": file}) for name in names}
    parts = file.split(".")
    for n in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:n]))
        vars(module).update(classes, __path__=[])
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return classes


def as_module(
    weights: Mapping[str, Tensor], classes: Mapping[str, type[nn.Module]], stride: int = 256
) -> nn.Module:
    """A module of these classes with these weights, as the published code would hold it."""
    root = classes["WaveGlow"]()
    root.upsample = nn.ConvTranspose1d(1, 1, 1, stride, bias=False)
    del root.upsample.bias
    root.convinv, root.WN = nn.ModuleList(), nn.ModuleList()
    for name, tensor in weights.items():
        *path, own = name.split(".")
        place = root
        for part in path:
            if not hasattr(place, part):
                kinds = {id(root.WN): "WN", id(root.convinv): "Invertible1x1Conv"}
                kind = kinds.get(id(place))
                place.add_module(part, classes[kind]() if kind else nn.Module())
            place = getattr(place, part)
        if name == "upsample.bias":
            place.register_buffer(own, tensor)  # as some who freeze weights do
        else:
            setattr(place, own, nn.Parameter(tensor))
        if own == "weight_v":
            place.weight = torch.zeros_like(tensor)  # as old weight norm leaves it
    return root


@CONTAINERS
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize(
    ("file", "lineage"),
    [("glow", "glow"), ("nvidia.waveglow.glow", "glow"), ("waveglow.model", "dle"), ("my", None)],
)
def test_pickled_modules(
    monkeypatch: pytest.MonkeyPatch,
    small: dict[str, Tensor],
    file: str,
    lineage: str | None,
    new: bool,
) -> None:
    options = {"pickle_protocol": 2 if new else 4, "_use_new_zipfile_serialization": new}
    module = as_module(small, published_classes(monkeypatch, file), stride=200)
    compiled = nn.Module()
    compiled._orig_mod = module
    wrapped = [{"generator": nn.DataParallel(module)}, {"net": compiled}]
    for data in (module, {"model": module}, *wrapped):
        header, found = read(saved(data, **options))
        assert same(found, small)
        assert (header.lineage, header.hop_length) == (lineage, 200)


@pytest.mark.parametrize("stride", [0, "1", True, None, (256, 1), ()], ids=repr)
def test_strides_that_are_none(
    monkeypatch: pytest.MonkeyPatch, small: dict[str, Tensor], stride: object
) -> None:
    module = as_module(small, published_classes(monkeypatch, "glow"))
    module.upsample.stride = stride if isinstance(stride, tuple) else (stride,)
    header, _ = read(saved(module))
    assert header.hop_length is None


def test_pickled_modules_of_dle(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small: dict[str, Tensor]
) -> None:
    """Their layout alone does not tell them from glow_old, but their class does."""
    name = "nvidia-waveglow-dle/nvidia_waveglowpyt_fp32_module.pt"
    weights = bare(FIXTURES / name)
    module = as_module(weights, published_classes(monkeypatch, "waveglow.model"))
    torch.save({"state_dict": nn.DataParallel(module)}, tmp_path / "dle.pt")
    one = convert(tmp_path / "dle.pt")
    assert one.lineage == "dle" and same_weights(one, small)
    module = as_module(weights, published_classes(monkeypatch, "someones_model"))
    torch.save(module, tmp_path / "unknown.pt")
    assert "say --lineage" in refusal(tmp_path / "unknown.pt")


# --- tensors ---


def test_weight_norm_of_newer_torch(save: Save, small: dict[str, Tensor]) -> None:
    newer = {
        key.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): value
        for key, value in small.items()
    }
    assert same_weights(convert(save({"model": collections.OrderedDict(newer)})), small)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_become_float32(
    save: Save, small: dict[str, Tensor], dtype: torch.dtype
) -> None:
    narrow = {key: value.to(dtype) for key, value in small.items()}
    one = convert(save(narrow))
    assert same_weights(one, {key: value.float() for key, value in narrow.items()})
    assert {v.dtype for v in one.flow.state_dict().values()} == {torch.float32}


@CONTAINERS
def test_views_of_one_storage(small: dict[str, Tensor], new: bool) -> None:
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
    assert same(read(saved(views, _use_new_zipfile_serialization=new))[1], small)


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
    """The state dict of a file, without anything that tells its lineage."""
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
    other_config = {"train_config": {"epochs": 3}}
    assert "--lineage" in refusal(
        save({"state_dict": bare(FIXTURES / name), "config": other_config})
    )


def test_the_oldest_layout_needs_no_classes(save: Save, small: dict[str, Tensor]) -> None:
    path = save(bare(FIXTURES / "nvidia-waveglow-old-layout/waveglow_old.pt"))
    assert same_weights(convert(path), small)


@pytest.mark.parametrize("lineage", ["glow", "dle"])
def test_a_flag_that_the_class_contradicts(lineage: Lineage) -> None:
    assert f"it is of glow_old: leave out --lineage {lineage}" in refusal(GLOW_OLD, lineage=lineage)
    other = FIXTURES / "nvidia-waveglow-zip/waveglow_4000"
    assert "it is of glow: leave out --lineage glow_old" in refusal(other, lineage="glow_old")


def test_a_row_without_direction(save: Save, small: dict[str, Tensor]) -> None:
    weights = {k: v.clone() for k, v in small.items()}
    weights["WN.0.start.weight_v"][1] = 0
    assert "layer start has a row of zeros" in refusal(save({"state_dict": weights}))


def test_glow_old_has_early_outputs_every_four_flows(save: Save) -> None:
    path = save(bare(FIXTURES / "nvidia-waveglow-zip/waveglow_4000"))
    assert "n_early_every is 2, but glow_old always synthesises with 4" in refusal(
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
    "empty": (lambda w: w.clear(), "no tensor 'upsample.weight'"),
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
    "integers": (lambda w: w.update({"upsample.bias": torch.zeros(4, dtype=torch.int64)}), "int64"),
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
    path = tmp_path / "strange.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in small.items()}, path)
    found = refusal(path, lineage="glow")
    assert found.startswith(f"{path}: ") and message in found


@pytest.mark.parametrize(
    "data",
    [torch.zeros(3), [1, 2], {"model": 3}, {"state_dict": {"a": "b"}}, "text", None, {"a": {}}],
    ids=repr,
)
def test_files_of_something_else(data: object) -> None:
    with pytest.raises(CheckpointError, match="it holds no WaveGlow"):
        read(saved(data))


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
    """A legacy file with many empty dicts: seconds of time, gigabytes of memory."""
    start = (FIXTURES / "nvidia-waveglow-legacy/waveglow_4000").read_bytes()
    head = start[: start.index(b".\x80", start.index(b"little_endian")) + 1]
    path = tmp_path_factory.mktemp("large") / "large.pt"
    path.write_bytes(head + b"\x80\x02](" + b"}" * 20_000_000 + b"e.")
    return path


@linux
def test_memory_is_limited(laborious: Path) -> None:
    with pytest.raises(CheckpointError, match="64 MiB of memory"):
        sandbox.read_torch_file(laborious, max_memory=64 * 2**20)


@linux
def test_time_is_limited(laborious: Path) -> None:
    with pytest.raises(CheckpointError, match="takes more than 1 s"):
        sandbox.read_torch_file(laborious, max_cpu_seconds=1, max_memory=2**33)


@linux
def test_a_session_may_have_tighter_limits() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (50, 50));"
        "from waveflow.foreign.reader import main; main(60, 2**30)"
    )
    with open(FIXTURES / "nvidia-waveglow-zip/waveglow_4000", "rb") as file:
        done = subprocess.run(
            [sys.executable, "-c", code], stdin=file, capture_output=True, env=ENVIRONMENT
        )
    assert json.loads(done.stdout)["header"]["container"] == "zip", done.stderr


@linux
def test_all_limits_are_set() -> None:
    """Those too that do not bind a test that runs as root."""
    names = ("CPU", "AS", "FSIZE", "NOFILE", "NPROC", "CORE")
    code = (
        "import resource; from waveflow.foreign.reader import _limit; _limit(50, 2**31);"
        f"print([resource.getrlimit(getattr(resource, 'RLIMIT_' + name)) for name in {names}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, env=ENVIRONMENT
    )
    limits = [50, 2**31, reader.MAX_OUTPUT, 3, 0, 0]
    assert done.stdout.decode().strip() == str([(limit, limit) for limit in limits]), done.stderr


@linux
@pytest.mark.parametrize("deed", ["open('/etc/hostname')", "__import__('socket').socket()"])
def test_the_reader_opens_nothing(deed: str) -> None:
    """Even if a file could make it run something, that would have no files and no network."""
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
    for out in (folder, tmp_path / "link", source):
        status, _, err = run("convert", source, "-o", out)
        assert status == 2 and str(out) in err
    assert sorted(tmp_path.rglob("*")) == before


def test_parents_are_made(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "models" / "small"
    assert run("convert", SMALL / "state_dict.safetensors", "-o", out)[0] == 0
    assert (out / "model.safetensors").is_file()
    (tmp_path / "file").touch()
    status, _, err = run("convert", SMALL / "state_dict.safetensors", "-o", tmp_path / "file" / "x")
    assert status == 2 and str(tmp_path / "file") in err


def test_a_refused_file_leaves_no_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.pt").write_bytes(b"\x80\x02cos\nsystem\n.")
    status, _, err = run("convert", tmp_path / "bad.pt", "-o", tmp_path / "model")
    assert status == 2 and "bad.pt: it is a pickle, but" in err and err.count("\n") == 1
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
