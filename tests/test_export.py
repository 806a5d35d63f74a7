"""Graphs for other runtimes: equal to the model, and spoken without torch."""

import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from pages import code_blocks
from small_models import SMALL
from test_cli import Run, assert_one_line, run, samples  # noqa: F401  (run is a fixture)
from torch import Tensor

import waveflow
from waveflow.audio.mel import MEL_PRESETS, MelConfig
from waveflow.audio.mel_names import convention_named
from waveflow.checkpoint import ModelConfig, Provenance, SynthesisConfig
from waveflow.engine.options import SynthesisOptions
from waveflow.engine.vocoder import Vocoder, load
from waveflow.errors import CheckpointError, ConfigError, MelMismatchError
from waveflow.export.runtime import OnnxVocoder
from waveflow.models.glow import GlowConfig
from waveflow.models.registry import FlowConfig, build_flow
from waveflow.models.waveglow import WaveGlowConfig

onnx = pytest.importorskip("onnx", reason="graphs are made with the packages onnx and onnxscript")
ort = pytest.importorskip("onnxruntime", reason="graphs are run by the package onnxruntime")
pytest.importorskip("onnxscript", reason="graphs are made with the packages onnx and onnxscript")

from waveflow.export import onnx as exporting  # noqa: E402
from waveflow.export.onnx import Export, export, export_listener  # noqa: E402

ROOT = Path(__file__).parent.parent
MEL = MEL_PRESETS["hifigan"]
EXAMPLE = ROOT / "pretrained" / "frameglow-cc0" / "example.npy"
# Single precision in another order of operations; draws of these models stay below 1.
CLOSE = 1e-4


def vocoder_of(model: FlowConfig, mel: MelConfig = MEL, refine: int = 1) -> Vocoder:
    """A vocoder whose weights are random everywhere, also where a new flow has zeros."""
    config = ModelConfig(
        model=model,
        mel=mel,
        synthesis=SynthesisConfig(sigma=0.5, refine_steps=refine),
        provenance=Provenance(mel_range=((-11.5,) * mel.n_mels, (2.0,) * mel.n_mels)),
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        flow = build_flow(model, mel)
        for parameter in flow.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return Vocoder(config, flow)


@pytest.fixture(scope="module")
def vocoder() -> Vocoder:
    return vocoder_of(
        GlowConfig(squeeze_factor=16, n_levels=1, n_flows=1, hidden_channels=32, n_features=32)
    )


@pytest.fixture(scope="module")
def mel() -> Tensor:
    return torch.from_numpy(np.load(EXAMPLE))[:, :120].float()


@pytest.fixture(scope="module")
def make(
    vocoder: Vocoder, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Export]]:
    """Exports the vocoder, which is traced only once: tracing takes seconds."""
    kept: dict[str, Any] = {}

    def once(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if name not in kept:
                kept[name] = work(*args)
            return deepcopy(kept[name]) if name == "graph" else kept[name]

        return call

    def call(name: str = "model.onnx", **settings: Any) -> tuple[Path, Export]:
        path = tmp_path_factory.mktemp("graph") / name
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exporting, "traced", once("program", exporting.traced))
            patch.setattr(exporting, "_graph_of", once("graph", exporting._graph_of))
            return path, export(vocoder, path, **settings)

    return call


def session(path: Path) -> Callable[..., Tensor]:
    loaded = ort.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])

    def call(**inputs: Tensor) -> Tensor:
        [audio] = loaded.run(None, {name: value.numpy() for name, value in inputs.items()})
        return torch.from_numpy(audio)

    return call


def expected_of(vocoder: Vocoder, mel: Tensor, noise: Tensor, sigma: float) -> Tensor:
    audio = vocoder.decode(sigma * noise, mel)
    return vocoder.refinement(audio, mel, vocoder.refine_steps).clamp(-1, 1)


# --- graphs ---


@pytest.mark.parametrize(("n_items", "n_frames"), [(1, 3), (1, 4), (3, 50), (2, 119)])
def test_a_graph_equals_the_model(
    make: Callable[..., tuple[Path, Export]],
    vocoder: Vocoder,
    mel: Tensor,
    n_items: int,
    n_frames: int,
) -> None:
    path, made = make(inputs=["sigma", "noise"])
    assert made.error < CLOSE and made.n_bytes == path.stat().st_size
    batch = torch.stack([mel[:, i : i + n_frames] for i in range(n_items)])
    noise = vocoder.flow.noise(n_frames, range(n_items))
    audio = session(path)(mel=batch, sigma=torch.tensor(0.7), noise=noise)
    expected = expected_of(vocoder, batch, noise, 0.7)
    assert expected.std() > 0.01
    torch.testing.assert_close(audio, expected, rtol=0, atol=CLOSE)


def test_noise_that_is_drawn_inside(
    make: Callable[..., tuple[Path, Export]], vocoder: Vocoder, mel: Tensor
) -> None:
    """It has the deviation asked for, and is another one in each call and for each item."""
    path, _ = make()
    batch = mel[None].repeat(2, 1, 1)
    graph = session(path)
    first, second = graph(mel=batch), graph(mel=batch)
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    own = vocoder(batch, seed=[1, 2])
    assert first.std() == pytest.approx(float(own.std()), rel=0.05)
    still, _ = make(sigma=0.0)
    silent = session(still)(mel=batch)
    torch.testing.assert_close(silent, vocoder(batch, sigma=0.0), rtol=0, atol=CLOSE)


def test_what_a_graph_takes_and_says(make: Callable[..., tuple[Path, Export]]) -> None:
    for inputs in ((), ("sigma",), ("noise",), ("sigma", "noise")):
        path, _ = make(inputs=inputs)
        model = onnx.load(path)
        assert [value.name for value in model.graph.input] == ["mel", *inputs]
        facts = {entry.key: entry.value for entry in model.metadata_props}
        assert facts["model_type"] == "hifigan" and facts["sample_rate"] == "22050"
        assert OnnxVocoder(path).card.mel == MEL
        assert str(ROOT).encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("weights", "share", "decibels"), [("float16", 0.6, -50), ("int8", 0.5, -25)]
)
def test_smaller_weights(
    make: Callable[..., tuple[Path, Export]], weights: str, share: float, decibels: float
) -> None:
    _, whole = make()
    path, small = make(weights=weights)
    assert small.n_bytes < share * whole.n_bytes
    # Not as close as float32: the matrices are really rounded.
    assert whole.decibels + 20 < small.decibels < decibels
    kinds = {tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert (onnx.TensorProto.INT8 in kinds) == (weights == "int8")


def test_the_other_way(vocoder: Vocoder, mel: Tensor, tmp_path: Path) -> None:
    """Audio to its mel, noise and likelihood; the noise gives the audio back."""
    made = export_listener(vocoder, tmp_path / "listen.onnx")
    assert made.error < 1e-3
    audio = vocoder.draw(mel[:, :70])
    graph = ort.InferenceSession(tmp_path / "listen.onnx", providers=["CPUExecutionProvider"])
    names = ["mel", "noise", "log_prob"]
    own, noise, log_prob = map(torch.from_numpy, graph.run(names, {"audio": audio[None].numpy()}))
    torch.testing.assert_close(own[0], vocoder.mel(audio), rtol=0, atol=2e-3)
    torch.testing.assert_close(vocoder.decode(noise, own)[0], audio, rtol=0, atol=1e-3)
    expected = vocoder.log_prob_by_frame(audio, own)
    torch.testing.assert_close(log_prob, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match=r"ends in \.onnx"):
        export_listener(vocoder, tmp_path / "listen.pt2")


def test_the_python_of_the_page(
    make: Callable[..., tuple[Path, Export]],
    vocoder: Vocoder,
    mel: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("sherpa_onnx", reason="the page has a line for the package sherpa-onnx")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(waveflow, "load", lambda: vocoder)
    make()[0].rename("frameglow.onnx")
    np.save("mel.npy", mel.numpy())
    names: dict[str, Any] = {}
    for block in code_blocks((ROOT / "docs" / "onnx.md").read_text(encoding="utf-8")):
        exec(block, names)
    assert names["audio"].shape == (1, 120 * 256) and Path("listen.onnx").is_file()


def test_a_program_of_torch_export(
    make: Callable[..., tuple[Path, Export]], vocoder: Vocoder, mel: Tensor
) -> None:
    path, made = make("model.pt2")
    assert made.error < CLOSE
    program = torch.export.load(path).module()
    noise = vocoder.flow.noise(60, [3])
    audio = program(mel=mel[None, :, :60], sigma=torch.tensor(0.4), noise=noise)
    expected = expected_of(vocoder, mel[None, :, :60], noise, 0.4)
    torch.testing.assert_close(audio, expected, rtol=0, atol=CLOSE)


SMALL_MEL = MelConfig(sample_rate=8000, n_fft=64, win_length=64, hop_length=16, n_mels=8, f_max=4e3)
OTHERS = {name: SMALL[name][0] for name in ("nice", "iaf", "squeezewave", "vae", "waveflow")} | {
    "waveglow": WaveGlowConfig(
        n_mels=8, n_flows=2, hidden_channels=8, n_layers=2, upsample_kernel=64, hop_length=16
    )
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "nice" else pytest.mark.slow) for name in OTHERS],
)
def test_other_models(tmp_path: Path, name: str) -> None:
    made = export(vocoder_of(OTHERS[name], SMALL_MEL), tmp_path / "m.onnx", ["noise"])
    assert made.decibels < -90  # some of them are loud


@pytest.mark.slow
@pytest.mark.parametrize("refine", [0, 4])
def test_the_model_that_ships(tmp_path: Path, refine: int) -> None:
    path = tmp_path / "m.onnx"
    made = export(load(), path, ["sigma", "noise"], refine=refine)
    assert made.error < CLOSE
    half = export(load(), path, refine=refine, weights="float16")
    assert half.n_bytes < 8e6 and half.decibels < -60
    small = export(load(), path, refine=refine, weights="int8")
    assert small.n_bytes < 6e6 and small.decibels < -25


@pytest.mark.slow
def test_sherpa_onnx_speaks_the_model_that_ships(tmp_path: Path, mel: Tensor) -> None:
    pytest.importorskip("sherpa_onnx", reason="the test needs the package sherpa-onnx")
    export(load(), tmp_path / "m.onnx", sigma=0.0)
    audio = spoken_by_sherpa(tmp_path / "m.onnx", mel, tmp_path)
    np.testing.assert_allclose(audio, load()(mel, sigma=0.0).numpy(), atol=CLOSE)


# --- sherpa-onnx ---

SHERPA_FACTS = {
    "model_type": "matcha-tts",
    "sample_rate": "22050",
    "n_speakers": "1",
    "use_eos_bos": "0",
    "pad_id": "0",
    "jieba": "1",
    "has_espeak": "0",
    "voice": "zh",
    "language": "Chinese",
}


def acoustic_graph(mel: np.ndarray, path: Path) -> None:
    """A stand-in for a Matcha: whatever the text, this mel."""
    make_node, make_value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    integer, real = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [
            make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
            make_node("Cast", ["sum"], ["real"], to=real),
            make_node("Mul", ["real", "zero"], ["nothing"]),
            make_node("Add", ["given", "nothing"], ["mel"]),
        ],
        "acoustic",
        [
            make_value("x", integer, [1, "L"]),
            make_value("x_length", integer, [1]),
            make_value("noise_scale", real, [1]),
            make_value("length_scale", real, [1]),
        ],
        [make_value("mel", real, [1, 80, "T"])],
        [
            onnx.numpy_helper.from_array(mel[None], "given"),
            onnx.numpy_helper.from_array(np.float32(0), "zero"),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.helper.set_model_props(model, SHERPA_FACTS)
    onnx.save(model, path)


def spoken_by_sherpa(vocoder: Path, mel: Tensor, folder: Path) -> np.ndarray:
    import sherpa_onnx as sherpa

    acoustic_graph(mel.numpy(), folder / "acoustic.onnx")
    (folder / "tokens.txt").write_text("_ 0\na 1\nb 2\n")
    (folder / "lexicon.txt").write_text("你 a\n好 b\n", encoding="utf-8")
    matcha = sherpa.OfflineTtsMatchaModelConfig(
        acoustic_model=str(folder / "acoustic.onnx"),
        vocoder=str(vocoder),
        lexicon=str(folder / "lexicon.txt"),
        tokens=str(folder / "tokens.txt"),
    )
    config = sherpa.OfflineTtsConfig(model=sherpa.OfflineTtsModelConfig(matcha=matcha))
    config.silence_scale = 1.0  # pauses as they are
    made = sherpa.OfflineTts(config).generate("你好", sid=0, speed=1.0)
    assert made.sample_rate == 22050
    return np.array(made.samples, np.float32)


def test_sherpa_onnx_speaks(
    make: Callable[..., tuple[Path, Export]], vocoder: Vocoder, mel: Tensor, tmp_path: Path
) -> None:
    pytest.importorskip("sherpa_onnx", reason="the test needs the package sherpa-onnx")
    path, _ = make(sigma=0.0)
    audio = spoken_by_sherpa(path, mel, tmp_path)
    np.testing.assert_allclose(audio, vocoder(mel, sigma=0.0).numpy(), atol=CLOSE)


# --- spoken by the command line ---


def test_vocode_by_a_graph(
    run: Run,  # noqa: F811
    make: Callable[..., tuple[Path, Export]],
    vocoder: Vocoder,
    tmp_path: Path,
    mel: Tensor,
) -> None:
    np.save(tmp_path / "a.npy", mel.numpy())
    np.save(tmp_path / "short.npy", mel[:, :2].numpy())
    path, _ = make(inputs=["sigma", "noise"])
    onnx_options = ("--backend", "onnx", "--model", path)
    result = run(
        "vocode", tmp_path / "a.npy", "-o", tmp_path / "a.wav", *onnx_options, "--sigma", 0
    )
    assert result.status == 0 and "1.4 s" in result.err
    expected = vocoder(mel, sigma=0.0).numpy()
    np.testing.assert_allclose(samples(tmp_path / "a.wav"), expected, atol=2**-15 + CLOSE)
    sources = [tmp_path / "a.npy", tmp_path / "short.npy"]
    assert run("vocode", *sources, "-o", tmp_path / "out", *onnx_options).status == 0
    assert len(samples(tmp_path / "out" / "short.wav")) == 2 * 256


def test_seeds_of_a_graph(make: Callable[..., tuple[Path, Export]], mel: Tensor) -> None:
    graph = OnnxVocoder(make(inputs=["noise"])[0])
    one, same, other = (graph.synthesise(mel, SynthesisOptions(seed=s)).audio for s in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    batch = graph.synthesise(torch.stack([mel, mel]), SynthesisOptions(seed=[1, 2])).audio
    np.testing.assert_allclose(batch, np.stack([one, other]), atol=1e-5)


def test_conventions_by_a_graph(
    make: Callable[..., tuple[Path, Export]], vocoder: Vocoder, mel: Tensor
) -> None:
    graph = OnnxVocoder(make(inputs=["sigma"])[0])
    still = SynthesisOptions(sigma=0.0)
    with pytest.raises(MelMismatchError, match="--convention log10"):
        graph.synthesise(mel / np.log(10), still)
    for name in ("log10", "nvidia"):
        given = mel * float(np.log10(np.e)) if name == "log10" else mel
        audio = graph.synthesise(given, still.changed({"convention": name})).audio
        expected = vocoder(given, sigma=0.0, convention=name).numpy()
        np.testing.assert_allclose(audio, expected, atol=CLOSE)
    assert convention_named("nvidia", MEL).padding == "center"  # moved by half a hop
    turned = graph.synthesise(mel.T, still.changed({"time_major": True})).audio
    np.testing.assert_allclose(turned, vocoder(mel, sigma=0.0).numpy(), atol=CLOSE)


def test_without_torch(
    make: Callable[..., tuple[Path, Export]], tmp_path: Path, mel: Tensor
) -> None:
    """Every import of torch fails in a process that speaks."""
    path, _ = make(inputs=["noise"])
    np.save(tmp_path / "a.npy", mel.numpy())
    torch.save(mel, tmp_path / "b.pt")
    words = ["vocode", str(tmp_path / "a.npy"), str(tmp_path / "b.pt"), "-o", str(tmp_path / "out")]
    words += ["--backend", "onnx", "--model", str(path), "--convention", "auto"]
    code = f"""
import sys
sys.modules["torch"] = None
from waveflow.cli.main import main
raise SystemExit(main({words!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.wav", "b.wav"}
    audio, rate = soundfile.read(tmp_path / "out" / "a.wav")
    assert rate == 22050 and len(audio) == 120 * 256 and audio.std() > 0.01


# --- refusals ---


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("m.txt", {}, r"m.txt: name a file that ends in .onnx or .pt2"),
        ("m.onnx", {"inputs": ["mels"]}, "input 'mels': give sigma, noise or both"),
        ("m.onnx", {"weights": "int4"}, "weights 'int4': give float32, float16, int8"),
        ("m.onnx", {"refine": 65}, "refine 65 is out of range"),
        ("m.pt2", {"weights": "int8"}, "for .onnx files only"),
        ("m.pt2", {"inputs": ["noise"]}, "for .onnx files only"),
    ],
)
def test_refused_options(
    vocoder: Vocoder, tmp_path: Path, name: str, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        export(vocoder, tmp_path / name, **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["wavenet", "pixelcnn"])
def test_models_that_draw_sample_by_sample(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"a {name} draws sample by sample"):
        export(vocoder_of(SMALL[name][0], SMALL_MEL), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_missing_extra(vocoder: Vocoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"onnxscript: pip install 'waveflow\[onnx\]'"):
        export(vocoder, tmp_path / "m.onnx")


def test_what_a_graph_has_fixed(make: Callable[..., tuple[Path, Export]], mel: Tensor) -> None:
    graph = OnnxVocoder(make()[0])
    for options, words in (
        (SynthesisOptions(sigma=0.3), "sigma 0.3: this graph has 0.5 inside"),
        (SynthesisOptions(refine=3), "refine 3: this graph has 1 inside"),
        (SynthesisOptions(seed=3), "seed 3: this graph draws its noise itself"),
    ):
        with pytest.raises(ConfigError, match=words):
            graph.synthesise(mel, options)
    assert graph.synthesise(mel, SynthesisOptions(sigma=0.5, refine=1)).audio.shape == (120 * 256,)


def test_refusals_of_the_command_line(
    run: Run,  # noqa: F811
    make: Callable[..., tuple[Path, Export]],
    tmp_path: Path,
    mel: Tensor,
    tiny_model: Path,
) -> None:
    np.save(tmp_path / "a.npy", mel.numpy())
    path, _ = make()
    vocode = ("vocode", tmp_path / "a.npy", "-o", tmp_path / "a.wav", "--backend", "onnx")
    assert_one_line(run(*vocode), "waveflow export")
    assert_one_line(run(*vocode, "--model", tiny_model), "waveflow export")
    for option in (
        ("--device", "cuda"),
        ("--denoise", 0.1),
        ("--compile",),
        ("--precision", "int8"),
    ):
        assert_one_line(run(*vocode, "--model", path, *option), f"{option[0]} is not for")
    piped = ("vocode", tmp_path / "a.npy", "-o", "-", "--backend", "onnx", "--model", path)
    assert_one_line(run(*piped), "no pipe")
    assert_one_line(run("export", tiny_model, "-o", tmp_path), "it is a folder")
    assert_one_line(
        run("export", tiny_model, "-o", tmp_path / "x" / "m.onnx"), "there is no folder"
    )
    assert_one_line(run("export", tmp_path / "none", "-o", tmp_path / "m.onnx"), "none")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy"]


def stripped(model: Any) -> None:
    del model.metadata_props[:]


def odd_card(model: Any) -> None:
    for entry in model.metadata_props:
        entry.value = '{"model": "\x1b[31m", "mel": {"sample_rate": 1e999}}'


def other_output(model: Any) -> None:
    model.graph.node[-1].output[0] = model.graph.output[0].name = "sound"


def endless_noise(model: Any) -> None:
    for entry in model.metadata_props:
        entry.value = entry.value.replace('"noise_per_frame":16', '"noise_per_frame":1000000000')


@pytest.mark.parametrize("change", [stripped, odd_card, other_output, endless_noise, None])
def test_strangers_graphs(
    make: Callable[..., tuple[Path, Export]], tmp_path: Path, change: Callable[[Any], None] | None
) -> None:
    path = tmp_path / "m.onnx"
    if change is None:
        path.write_bytes(b"\x08\x01" + bytes(range(256)) * 40)
    else:
        model = onnx.load(make()[0])
        change(model)
        path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match="onnx") as caught:
        OnnxVocoder(path)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def flat(model: Any) -> None:
    """Audio of one axis."""
    model.graph.node[-1].output[0] = "two_axes"
    shape = onnx.numpy_helper.from_array(np.array([-1], np.int64), "one_axis")
    model.graph.initializer.append(shape)
    node = onnx.helper.make_node("Reshape", ["two_axes", "one_axis"], ["audio"])
    model.graph.node.append(node)
    model.graph.output[0].type.tensor_type.ClearField("shape")


def other_bands(model: Any) -> None:
    """A mel of 81 bands, which the graph does not take."""
    for entry in model.metadata_props:
        entry.value = entry.value.replace('"n_mels":80', '"n_mels":81')


@pytest.mark.parametrize(
    ("change", "n_mels", "words"), [(flat, 80, "this graph gives"), (other_bands, 81, "fails")]
)
def test_graphs_that_do_something_else(
    run: Run,  # noqa: F811
    make: Callable[..., tuple[Path, Export]],
    tmp_path: Path,
    change: Callable[[Any], None],
    n_mels: int,
    words: str,
) -> None:
    model = onnx.load(make()[0])
    change(model)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    np.save(tmp_path / "a.npy", -6 + np.random.default_rng(0).random((n_mels, 20)))
    vocode = ("vocode", tmp_path / "a.npy", "-o", tmp_path / "a.wav", "--backend", "onnx")
    assert_one_line(run(*vocode, "--model", tmp_path / "m.onnx"), words)
    assert not (tmp_path / "a.wav").exists()


def test_a_graph_that_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(CheckpointError, match="cannot read graph"):
            OnnxVocoder(path)
