"""The benchmark: that its figures are right, and that nothing flatters anyone."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from waveflow.audio.mel import MEL_PRESETS
from waveflow.bench import benchmark as benchmark_module
from waveflow.bench import calibration
from waveflow.bench.benchmark import (
    Contender,
    Contenders,
    benchmark,
    prepare_contenders,
)
from waveflow.bench.calibration import MATMUL_SHAPE, Matmul, describe_machine, matmul, timed
from waveflow.bench.figures import (
    Benchmark,
    Calibration,
    Quartiles,
    Row,
    Section,
    Settings,
    short,
)
from waveflow.bench.memory import memory_growth
from waveflow.bench.peers import Vocos
from waveflow.bench.profiling import BETWEEN, OUTSIDE, group_of, profile, role_of
from waveflow.bench.subjects import (
    PLAIN,
    SPREAD,
    UNTRAINED,
    FlowSubject,
    RunPath,
    VocosSubject,
    load_subject,
    speech_mel,
    untrained_waveglow,
)
from waveflow.cli.main import main
from waveflow.engine.cost import count_parameters
from waveflow.engine.fast.packed import with_packed_linears
from waveflow.metrics.spectral import signal_to_noise_db
from waveflow.models.waveglow import WaveGlowConfig
from waveflow.nn.wavenet import WaveNet

CPU = torch.device("cpu")
MEL = MEL_PRESETS["hifigan"]
HOP_SECONDS = MEL.hop_length / MEL.sample_rate
TINY = WaveGlowConfig(n_flows=3, n_layers=2, hidden_channels=8, n_early_every=2)


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The verb sets the threads of this process, and the environment for its libraries."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is measured in a process of its own, of some seconds: one test does it."""
    monkeypatch.setattr(benchmark_module, "memory_growth", lambda *_: 12_000_000)


class Clock:
    """In the place of the module `time`: CPU time by hand, and a wall clock twice as fast."""

    def __init__(self) -> None:
        self.cpu = 0.0

    def spend(self, seconds: float) -> None:
        self.cpu += seconds

    def process_time(self) -> float:
        return self.cpu

    def perf_counter(self) -> float:
        return 2 * self.cpu


class Busy:
    """A system that takes a known time and writes down its turns."""

    def __init__(
        self, name: str, seconds: float, turns: list[str], error: float, clock: Clock
    ) -> None:
        self.name, self.seconds, self.turns, self.error = name, seconds, turns, error
        self.clock = clock

    def __call__(self, mel: Tensor) -> Tensor:
        self.turns.append(self.name)
        self.clock.spend(self.seconds)
        return self.draw(mel)

    def draw(self, mel: Tensor) -> Tensor:
        return torch.ones(len(mel), mel.shape[2] * MEL.hop_length) + self.error

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor] | None:
        """Needs ten frames before its first audio."""
        n_frames = 0
        for chunk in chunks:
            n_frames += chunk.shape[1]
            self.clock.spend(0.001)
            if n_frames >= 10:
                yield self.draw(chunk[None])[0]


class BusySubject:
    """A model of 5 multiply-adds per second of audio that has two paths of known speed."""

    name, mel_config, trained = "busy", MEL, False
    module: nn.Module | None = None

    def macs_per_second(self) -> float | None:
        return 5e9

    def paths(self, precisions: Sequence[str], compile: bool) -> list[RunPath]:
        return [PLAIN, RunPath("engine")]

    def system(self, path: RunPath) -> Busy:
        raise NotImplementedError


@pytest.fixture
def measured(no_processes: None, monkeypatch: pytest.MonkeyPatch) -> tuple[Benchmark, list[str]]:
    """A plain path of 30 ms and an engine of 10 ms, and the order of all calls."""
    clock = Clock()
    monkeypatch.setattr(calibration, "time", clock)
    product = Matmul("by hand", lambda: clock.spend(0.02), operations=2_000_000_000)
    monkeypatch.setattr(benchmark_module, "matmul", lambda *_: product)
    turns: list[str] = []
    subject = BusySubject()
    made = [
        Contender(subject, PLAIN, Busy("a", 0.03, turns, 0.0, clock), 0.5),
        Contender(subject, RunPath("engine"), Busy("b", 0.01, turns, 0.1, clock), 0.25),
    ]
    settings = Settings(seconds=(0.5,), runs=3, batch=2)
    return benchmark(settings, Contenders(made, ["c: no"], {"busy": 1.5})), turns


def test_paths_take_turns_in_reversed_order_every_second_round(measured):
    result, turns = measured
    assert "".join(turns) == "ab" + "ab" + "ba" + "ab"
    assert [len(row.cpu_seconds) for row in result.sections[0].rows] == [3, 3]
    assert len(result.sections[0].calibrations[0].rates) == 3


def test_figures_of_paths_of_known_speed(measured):
    result, _ = measured
    plain, engine = result.sections[0].rows
    audio_seconds = 2 * round(0.5 / HOP_SECONDS) * HOP_SECONDS
    assert plain.times_real_time == pytest.approx(audio_seconds / 0.03)
    assert plain.times_real_time_wall == pytest.approx(audio_seconds / 0.06)
    assert plain.waiting == pytest.approx(2)
    assert plain.ratio_to_plain == Quartiles(low=1, median=1, high=1)
    assert engine.ratio_to_plain.median == pytest.approx(3)
    assert engine.ratio_to_vocos is None
    rate = 2e9 / 0.02
    assert result.sections[0].calibrations[0].median == pytest.approx(rate)
    assert plain.share == pytest.approx(2 * 5e9 * audio_seconds / 0.03 / rate)
    assert plain.snr_db is None
    assert engine.snr_db == pytest.approx(20, abs=1e-4)  # an error of a tenth
    assert engine.memory_bytes == 12_000_000
    assert engine.first_audio is not None
    # The chunk that brings the tenth frame is the third of four.
    assert engine.first_audio.mel_seconds == pytest.approx(12 * HOP_SECONDS)
    assert engine.first_audio.compute_seconds == pytest.approx(0.003)
    assert (plain.prepare_seconds, engine.prepare_seconds) == (0.5, 0.25)
    assert (result.models[0].load_seconds, result.left_out) == (1.5, ("c: no",))


def test_json_holds_everything(measured):
    result, _ = measured
    assert Benchmark.model_validate_json(result.to_json()) == result


def test_no_headline_where_the_machine_was_not_steady(measured):
    section = measured[0].sections[0]
    steady = Calibration(precision="float32", routine="torch.mm", rates=(100, 129))
    shaken = Calibration(precision="int8", routine="torch._int_mm", rates=(100, 131))
    (line,) = section.model_copy(update={"calibrations": (steady,)}).headlines()
    assert line.startswith("busy, engine float32: ") and "3.00 x plain (20 dB)" in line
    assert section.model_copy(update={"calibrations": (steady, shaken)}).headlines() == []


def test_the_cpu_clock_is_for_one_thread_on_a_cpu_alone():
    assert Settings().uses_cpu_time
    assert not Settings(threads=2).uses_cpu_time
    assert not Settings(device="cuda").uses_cpu_time


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_calibration_makes_the_products_that_it_counts(precision: str):
    product = matmul(precision, CPU)
    assert product is not None
    rows, inner, columns = MATMUL_SHAPE
    one = 2 * rows * inner * columns
    assert product.operations % one == 0
    # No machine makes 10^14 a second on a thread, nor fewer than 10^8.
    assert 1e8 < product.operations / timed(product.work).cpu < 1e14


def test_machine():
    machine = describe_machine(CPU)
    assert machine.threads == torch.get_num_threads()
    assert machine.libraries["torch"] == torch.__version__
    assert machine.processor


# Models


def test_every_coupling_of_an_untrained_size_does_real_work():
    config, flow = untrained_waveglow(TINY)
    outputs: list[Tensor] = []
    networks = [module for module in flow.modules() if isinstance(module, WaveNet)]
    for network in networks:
        network.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    mel = speech_mel(config.mel, 40, 1)
    flow.decode(flow.noise(40, [3]), mel)
    assert len(outputs) == TINY.n_flows
    for output in outputs:
        shift, log_scale = output.chunk(2, 1)
        # Scaled for another noise and mel, on few channels.
        assert 0.3 * SPREAD < shift.std().item() < 3 * SPREAD
        assert 0.3 * SPREAD < log_scale.std().item() < 3 * SPREAD
    again = untrained_waveglow(TINY)[1].state_dict()
    assert all(torch.equal(again[name], value) for name, value in flow.state_dict().items())


def test_untrained_sizes_are_what_their_names_say():
    for name, config in UNTRAINED.items():
        *_, last = name.split("-")
        assert config.hidden_channels == int(last)
    for name in ("squeezewave-128-256", "squeezewave-256-128"):
        assert UNTRAINED[name].squeeze_factor == int(name.split("-")[1])
        assert UNTRAINED[name].conditioning == "repeated"


def test_cost_of_a_published_size():
    subject = load_subject("waveglow-64", CPU)
    # Counted on the public code: 17.6 M parameters, folded, and 30.8 G multiply-adds a second.
    assert subject.module is not None
    assert count_parameters(subject.module) == pytest.approx(17.6e6, abs=0.05e6)
    assert subject.macs_per_second() == pytest.approx(30.8e9, rel=0.01)


def test_paths_of_a_waveglow_agree():
    subject = FlowSubject("tiny", *untrained_waveglow(TINY), CPU, trained=False)
    paths = subject.paths(["float32", "int8"], compile=True)
    assert [path.label for path in paths] == [
        "published",
        "plain",
        "engine float32",
        "engine int8",
        "compiled float32",
    ]
    mel = speech_mel(subject.mel_config, 20, 2)
    with torch.inference_mode():
        plain, published, engine = (
            subject.system(path).draw(mel) for path in (PLAIN, paths[0], paths[2])
        )
    assert signal_to_noise_db(plain, published) > 110
    assert signal_to_noise_db(plain, engine) > 110


def test_a_frameglow_is_measured_with_its_refinement(tiny_model: Path):
    subject = load_subject(str(tiny_model), CPU)
    assert subject.trained
    assert subject.paths(["float32"], compile=False) == [PLAIN, RunPath("engine")]
    system, mel = subject.system(PLAIN), speech_mel(subject.mel_config, 20, 1)
    assert isinstance(subject, FlowSubject)
    refined = subject.system(PLAIN).vocoder(mel)
    assert torch.equal(system(mel), refined)
    assert not torch.allclose(system(mel), system.draw(mel).clamp(-1, 1), atol=1e-3)


def test_a_path_that_cannot_be_run_is_left_out(tiny_model: Path):
    settings = Settings(models=(str(tiny_model),), precisions=("float16",), peers=False)
    contenders = prepare_contenders(settings)
    assert [c.path for c in contenders.made] == [PLAIN]
    (reason,) = contenders.left_out
    assert reason.startswith(f"{tiny_model}, engine float16: ")


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
def test_vocos_is_the_published_network():
    subject = VocosSubject(CPU)
    # Counted on the public code at 80 bands: 13.5 M parameters, 1.16 G multiply-adds a second.
    assert count_parameters(subject.network) == pytest.approx(13.5e6, abs=0.05e6)
    assert subject.macs_per_second() == pytest.approx(1.16e9, rel=0.01)
    network = Vocos(MEL, channels=32, n_layers=2).eval()
    mel = torch.randn(2, 80, 30, generator=torch.Generator().manual_seed(0))
    expected = vocos_as_published(network, mel)
    assert network(mel).shape == (2, 30 * 256)
    assert signal_to_noise_db(expected, network(mel)) > 100
    assert signal_to_noise_db(expected, with_packed_linears(network)(mel)) > 100


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's /proc")
def test_memory_of_a_fresh_process():
    n_frames = 2000
    grown = memory_growth("griffin-lim", PLAIN, n_frames, 1, "cpu", 1)
    if grown is None:
        pytest.skip("this system does not let a process reset its peak")
    spectrum = n_frames * (MEL.n_fft // 2 + 1) * 8
    # It holds a few spectra of complex64 and frames at a time; torch alone takes 30 of them.
    assert 2 * spectrum < grown < 20 * spectrum


# Profile


def test_kinds_of_operators_and_roles_of_layers():
    for operator, group in {
        "addmm": "matrix product",
        "mkldnn_convolution": "convolution",
        "_fft_r2c": "Fourier transform",
        "copy_": "copy",
        "expand": "view",
        "mul": "elementwise",
        "native_layer_norm": "normalisation",
        "an_unheard_of_thing": "other",
    }.items():
        assert group_of(operator) == group
    role = role_of("bijection.steps.4.steps.2.network.in_layers.3")
    assert role == "network.in_layers"


def test_profile_accounts_for_the_time(tiny_model: Path):
    settings = Settings(models=(str(tiny_model),), peers=False, seconds=(0.2,))
    plain, engine = prepare_contenders(settings).made
    found = profile(settings, plain)
    # Rounding of microseconds over thousands of operators.
    assert sum(part.share for part in found.groups) == pytest.approx(1, abs=0.05)
    assert sum(part.share for part in found.layers) == pytest.approx(1, abs=0.01)
    groups = {part.name: part.share for part in found.groups}
    layers = {part.name: part for part in found.layers}
    assert {"matrix product", "Fourier transform", OUTSIDE} <= groups.keys()
    assert 0 < layers["body.dilated"].share < 1 - layers[BETWEEN].share
    assert layers["body.dilated"].calls == 1  # of one layer, in one synthesis
    assert profile(settings, engine).layers == ()


class Multiplying(BusySubject):
    """Some matrix products in one layer, and nothing else but an idle time."""

    def __init__(self, n_rows: int, idle_seconds: float) -> None:
        self.module = nn.ModuleDict({"expand": nn.Linear(1024, 1024)})
        self.n_rows, self.idle_seconds = n_rows, idle_seconds

    def __call__(self, mel: Tensor) -> Tensor:
        assert self.module is not None
        time.sleep(self.idle_seconds)
        return self.module["expand"](torch.ones(self.n_rows, 1024))


@pytest.mark.parametrize(("n_rows", "idle_seconds", "busy"), [(4000, 0, True), (1, 0.1, False)])
def test_profile_tells_work_from_what_is_beside_it(n_rows: int, idle_seconds: float, busy: bool):
    """Products of 4000 rows take 30 ms and more, of one row less than a millisecond."""
    model = Multiplying(n_rows, idle_seconds)
    settings = Settings(models=("multiplying",), peers=False, seconds=(0.1,))
    found = profile(settings, Contender(model, PLAIN, model, 0.0))
    groups = {part.name: part.share for part in found.groups}
    layers = {part.name: part.share for part in found.layers}
    assert (groups["matrix product"] > 0.5) == (layers["expand"] > 0.5) == busy
    assert (groups[OUTSIDE] > 0.5) == (layers[BETWEEN] > 0.5) == (not busy)


# The verb


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*args: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(arg) for arg in args])
        return status, *capsys.readouterr()

    return call


def test_bench_prints_a_table(no_processes: None, run, tiny_model: Path, tmp_path: Path):
    file = tmp_path / "figures.json"
    quick = ("--no-peers", "--runs", "1", "--seconds", "0.1", "--seconds", "0.2")
    status, out, err = run("bench", tiny_model, *quick, "--profile", "--json", file)
    assert (status, err) == (0, "")
    assert out.count("M param") == 2
    assert out.count("  plain ") == out.count("  engine float32 ") == 2
    assert "float32 matrix products" in out and "by layer" in out
    figures = json.loads(file.read_text())
    assert [section["seconds"] for section in figures["sections"]] == [0.1, 0.2]
    result = Benchmark.model_validate_json(file.read_text())
    row: Row = result.sections[1].rows[0]
    assert short(row.times_real_time) in out
    assert not any(line.endswith(" ") for line in out.splitlines())
    assert all(isinstance(section, Section) for section in result.sections)


def test_bench_names_the_row_whose_memory_process_died(
    run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    def dies(name: str, path: RunPath, *_: object) -> int:
        if path == PLAIN:
            raise BrokenProcessPool
        return 12_000_000

    monkeypatch.setattr(benchmark_module, "memory_growth", dies)
    status, out, _ = run("bench", tiny_model, "--no-peers", "--runs", "1", "--seconds", "0.1")
    assert status == 0
    assert f"no memory figure of {tiny_model}, plain: " in out
    assert f"no memory figure of {tiny_model}, engine" not in out


def test_bench_draws_a_picture(no_processes: None, run, tiny_model: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "speeds.png"
    quick = ("--no-peers", "--runs", "1", "--seconds", "0.1")
    assert run("bench", tiny_model, *quick, "--picture", file)[0] == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_bench_prints_what_a_path_costs_in_quality(
    no_processes: None, run, tiny_model: Path, tiny_corpus: Path
):
    pytest.importorskip("pesq")
    quick = ("--no-peers", "--runs", "1", "--seconds", "0.1")
    status, out, _ = run("bench", tiny_model, *quick, "--data", tiny_corpus)
    assert status == 0
    assert "log-mel L1" in out and "PESQ-WB" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("nothing",), "no model 'nothing'"),
        (("--picture", "x.gif"), ".png"),
        (("--json", "missing/x.json"), "missing"),
        (("--device", "nowhere"), "nowhere"),
        (("--seconds", "0"), "--seconds"),
        (("--precision", "int3"), "int3"),
        (("--precision", "int8", "--precision", "auto"), "auto"),
    ],
)
def test_what_bench_refuses(run, args: tuple[str, ...], words: str):
    status, out, err = run("bench", *args)
    assert (status, out) == (2, "")
    assert words in err and len(err.splitlines()) == 1


def test_quality_is_of_trained_models(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(UNTRAINED, "waveglow-64", TINY)
    status, _, err = run("bench", "waveglow-64", "--no-peers", "--data", tmp_path)
    assert status == 2 and "trained" in err
