"""The scripts in benchmarks/: each runs, and what they compare with is what it claims to be."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import against
import first_audio
import hot_spots
import lab
import memory
import sizes
import speed
import training
from peers import Vocos
from waveflow.audio.mel import MEL_PRESETS
from waveflow.engine.cost import count_parameters, plain_path
from waveflow.engine.fast.packed import with_packed_linears
from waveflow.engine.vocoder import Vocoder
from waveflow.errors import ConfigError
from waveflow.metrics.spectral import signal_to_noise_db
from waveflow.models.waveglow import WaveGlowConfig
from waveflow.nn.wavenet import WaveNet

MEL = MEL_PRESETS["hifigan"]
TINY = WaveGlowConfig(n_flows=3, n_layers=2, hidden_channels=8, n_early_every=2)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.SIZES, "tiny", TINY)
    monkeypatch.setattr(speed, "N_PRODUCTS", 1)


def words(capsys: pytest.CaptureFixture[str], start: str) -> list[list[str]]:
    """The words of all printed lines that begin with `start`."""
    lines = capsys.readouterr().out.splitlines()
    return [line.split() for line in lines if line.startswith(start)]


# Models


def test_every_coupling_of_an_untrained_size_does_real_work() -> None:
    config, flow = sizes.untrained(TINY)
    outputs: list[Tensor] = []
    networks = [module for module in flow.modules() if isinstance(module, WaveNet)]
    for network in networks:
        network.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    flow.decode(flow.noise(40, [3]), lab.speech(config.mel, 40 * 256 / 22050))
    assert len(outputs) == TINY.n_flows
    for output in outputs:
        shift, log_scale = output.chunk(2, 1)
        # Scaled for another noise and mel, on few channels.
        assert 0.3 * sizes.SPREAD < shift.std().item() < 3 * sizes.SPREAD
        assert 0.3 * sizes.SPREAD < log_scale.std().item() < 3 * sizes.SPREAD
    torch.manual_seed(1)
    again = sizes.untrained(TINY)[1].state_dict()
    assert all(torch.equal(again[name], value) for name, value in flow.state_dict().items())


def test_sizes_are_what_their_names_say() -> None:
    for name, config in sizes.SIZES.items():
        if name.startswith(("waveglow", "squeezewave")):
            assert config.hidden_channels == int(name.split("-")[-1])
    for name in ("squeezewave-128-256", "squeezewave-256-128"):
        assert sizes.SIZES[name].squeeze_factor == int(name.split("-")[1])
        assert sizes.SIZES[name].conditioning == "repeated"


@pytest.mark.slow
def test_cost_of_a_published_size() -> None:
    vocoder = plain_path(Vocoder(*sizes.untrained(sizes.SIZES["waveglow-64"])))
    # Counted on the public code: 17.6 M parameters, folded, and 30.8 G multiply-adds a second.
    assert count_parameters(vocoder.flow) == pytest.approx(17.6e6, abs=0.05e6)
    assert speed.macs(vocoder) == pytest.approx(30.8e9, rel=0.01)


def vocos_as_published(network: Vocos, mel: Tensor) -> Tensor:
    """The same weights in the published arrangement: (B, C, L), grouped Conv1d, F.fold."""
    x = network.norm(network.embed(mel).transpose(1, 2)).transpose(1, 2)
    for block in network.blocks:
        depthwise = block.depthwise
        h = F.conv1d(x, depthwise.weight, depthwise.bias, padding=3, groups=x.shape[1])
        h = block.norm(h.transpose(1, 2))
        x = x + (block.gain * block.contract(F.gelu(block.expand(h)))).transpose(1, 2)
    log_magnitude, phase = network.head(network.final_norm(x.transpose(1, 2))).chunk(2, -1)
    magnitude = log_magnitude.exp().clip(max=1e2)
    frames = torch.fft.irfft((magnitude * torch.exp(1j * phase)).transpose(1, 2), dim=1)
    window = torch.hann_window(1024)
    size = (1, (frames.shape[2] - 1) * 256 + 1024)
    fold = {"output_size": size, "kernel_size": (1, 1024), "stride": (1, 256)}
    energy = F.fold(window.square()[None, :, None].expand_as(frames[:1]), **fold)
    audio = F.fold(frames * window[None, :, None], **fold) / energy
    return audio[:, 0, 0, 384:-384]


@torch.inference_mode()
def test_vocos_is_the_published_network() -> None:
    whole = lab.load(lab.VOCOS, lab.PLAIN)
    # Counted on the public code at 80 bands: 13.5 M parameters, 1.16 G multiply-adds a second.
    assert count_parameters(whole) == pytest.approx(13.5e6, abs=0.05e6)
    assert speed.macs(whole) == pytest.approx(1.16e9, rel=0.01)
    mel = lab.speech(MEL, 0.1)
    assert signal_to_noise_db(whole(mel), lab.load(lab.VOCOS, "engine float32")(mel)) > 100
    network = Vocos(MEL, channels=32, n_layers=2).eval()
    mel = torch.randn(2, 80, 30, generator=torch.Generator().manual_seed(0))
    expected = vocos_as_published(network, mel)
    assert network(mel).shape == (2, 30 * 256)
    assert signal_to_noise_db(expected, network(mel)) > 100
    assert signal_to_noise_db(expected, with_packed_linears(network)(mel)) > 100


def test_paths_of_a_model_agree() -> None:
    with lab.folders(["tiny"]) as found:
        paths = lab.paths(found["tiny"], ["float32", "int8"], compile=True)
        systems = {path: lab.load(found["tiny"], path) for path in paths[:3]}
    assert paths == [
        "plain",
        "published",
        "engine float32",
        "engine int8",
        "compiled float32",
    ]
    mel = lab.speech(MEL, 0.2)
    plain, published, engine = (system.draw(mel) for system in systems.values())
    assert signal_to_noise_db(plain, published) > 110
    assert signal_to_noise_db(plain, engine) > 110


# Scripts


def test_products_are_counted() -> None:
    rows, inner, columns = speed.PRODUCT_SHAPE
    made = speed.products("float32", "cpu")
    assert made.operations == 2 * rows * inner * columns * speed.N_PRODUCTS


@pytest.mark.slow
def test_speed(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precisions = ["--precision", "float32", "float16", "bfloat16"]
    speed.main([str(tiny_model), *precisions, "--seconds", "0.1", "0.2", "--runs", "1"])
    printed = capsys.readouterr()
    assert "engine float16: float16 is for GPUs" in printed.err
    for start, count in {
        f"{tiny_model}: ": 1,
        "float32 products: ": 2,
        f"{tiny_model}  plain ": 2,
        f"{tiny_model}  engine bfloat16 ": 2,
        "griffin-lim": 2,
    }.items():
        assert sum(line.startswith(start) for line in printed.out.splitlines()) == count
    rows = [line.split() for line in printed.out.splitlines() if line.startswith("vocos  ")]
    # Vocos's plain path is as fast as itself.
    assert [row[4] for row in rows if row[1] == "plain"] == ["1.00", "1.00"]


@pytest.mark.slow
def test_memory_of_a_fresh_process(capsys: pytest.CaptureFixture[str]) -> None:
    n_frames = 1000
    seconds = n_frames * MEL.hop_length / MEL.sample_rate
    memory.main(["griffin-lim", "--no-peers", "--seconds", f"{seconds}"])
    ((_, _, megabytes, *words_left),) = words(capsys, "griffin-lim")
    if words_left:
        pytest.skip("this system does not tell")
    spectrum = n_frames * (MEL.n_fft // 2 + 1) * 8 / 1e6
    # It holds a few spectra of complex64 and frames at a time; torch alone takes 60 of them.
    assert 2 * spectrum < float(megabytes) < 20 * spectrum


def test_memory_that_was_freed_again_counts() -> None:
    try:
        rise = memory.rise(lambda: np.ones(10_000_000).sum())
    except OSError:
        pytest.skip("this system does not tell")
    assert rise == pytest.approx(80e6, rel=0.1)


def test_first_audio(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first_audio.main([str(tiny_model), "--runs", "1", "--look-ahead", "0.1"])
    rows = words(capsys, str(tiny_model))
    paths = [["plain"], ["plain"], ["engine", "float32"], ["engine", "float32"]]
    assert [row[1:-4] for row in rows] == paths
    for row in rows:
        mel_seconds, look_ahead, _, decibels = map(float, row[-4:])
        assert look_ahead < mel_seconds < 2 * look_ahead + 2 * first_audio.PIECE_SECONDS
        assert decibels < (-100 if look_ahead > 0.1 else -10)


def test_quality(tiny_model: Path, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pesq")
    import quality

    quality.main([str(tiny_model), "--data", str(tiny_corpus)])
    rows = words(capsys, str(tiny_model))
    assert [row[-4] for row in rows] == ["4", "4"]


class Multiplying:
    """Some matrix products, and an idle time."""

    mel_config = MEL

    def __init__(self, n_rows: int, idle_seconds: float) -> None:
        self.layer, self.n_rows, self.idle_seconds = nn.Linear(1024, 1024), n_rows, idle_seconds

    def __call__(self, mel: Tensor) -> Tensor:
        time.sleep(self.idle_seconds)
        return self.layer(torch.ones(self.n_rows, 1024))


@pytest.mark.parametrize(("n_rows", "idle_seconds", "busy"), [(4000, 0, True), (1, 0.1, False)])
def test_hot_spots_tell_work_from_idleness(n_rows: int, idle_seconds: float, busy: bool) -> None:
    """Products of 4000 rows take 30 ms and more, of one row less than a millisecond."""
    products, outside, *_ = hot_spots.profile(Multiplying(n_rows, idle_seconds), 0.1)
    assert (int(products.split()[0][:-1]) > 50) == busy
    assert (int(outside.split()[0][:-1]) > 50) == (not busy)


def test_hot_spots(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hot_spots.main([str(tiny_model), "--seconds", "0.1"])
    out = capsys.readouterr().out
    assert f"{tiny_model}, plain, 0.1 s" in out and "aten::addmm" in out


@pytest.mark.slow
def test_training(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.SIZES, "tiny", WaveGlowConfig(n_layers=2, hidden_channels=8))
    training.main(["tiny", "--runs", "1", "--seconds", "0.1"])
    rows = words(capsys, "tiny")
    assert [row[1:3] for row in rows] == [
        ["kept", "2"],
        ["recomputed", "2"],
        ["kept", "12"],
        ["recomputed", "12"],
    ]


def test_peak_is_the_most_that_is_held_at_once() -> None:
    def work() -> None:
        for _ in range(3):
            first = torch.ones(1000, 1000)
            second = first + 1
            del first
        second.sum()

    # Two of 4 MB, and the one of the round before while it is replaced.
    assert training.peak_bytes(work, "cpu") == pytest.approx(12e6, rel=0.01)


@pytest.mark.slow
@pytest.mark.skipif(not (against.ROOT / ".git").exists(), reason="the history is not here")
def test_against(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trees: list[Path] = []

    class Recorded(against.Worker):
        def __init__(self, tree: Path) -> None:
            trees.append(tree)
            super().__init__(tree)

    monkeypatch.setattr(against, "Worker", Recorded)
    against.main([str(tiny_model), "--base", "HEAD", "--runs", "1", "--seconds", "0.1"])
    out = capsys.readouterr().out
    assert f"\n{tiny_model}, 0.1 s of audio\n" in out
    assert "\nplain " in out and "\nengine float32 " in out
    assert trees[0].name == against.BASE and trees[1] == against.ROOT.resolve()


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="not a size: nothing"):
        training.main(["nothing"])
    with pytest.raises(ConfigError, match="nowhere"):
        speed.main(["frameglow-cc0", "--device", "nowhere"])
    with pytest.raises(SystemExit, match="2"):
        lab.run(lambda: against.main(["frameglow-cc0", "--base", "no-such-commit"]))
    assert len(capsys.readouterr().err.splitlines()) == 1
