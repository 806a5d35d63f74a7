"""`waveflow bench` and the timing under it: that the figures are right."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from sizes import untrained
from waveflow.audio.mel import MEL_PRESETS
from waveflow.cli.bench import compare
from waveflow.cli.main import main
from waveflow.engine import cost
from waveflow.engine.cost import plain_path, speed_ratio, take_turns, timed
from waveflow.engine.vocoder import Vocoder
from waveflow.metrics.spectral import signal_to_noise_db
from waveflow.models.waveglow import WaveGlowConfig

MEL = MEL_PRESETS["hifigan"]
TINY = WaveGlowConfig(n_flows=3, n_layers=2, hidden_channels=8, n_early_every=2)


@pytest.fixture(autouse=True)
def _threads_are_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Clock:
    """In place of the module `time`: CPU time by hand, and a wall clock twice as fast."""

    def __init__(self) -> None:
        self.cpu = 0.0

    def process_time(self) -> float:
        return self.cpu

    def perf_counter(self) -> float:
        return 2 * self.cpu


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(cost, "time", made)
    return made


class Busy:
    """A vocoder that takes a known time, and whose draw is off by a known error."""

    sample_rate, hop_length, mel_config, device = MEL.sample_rate, MEL.hop_length, MEL, "cpu"

    def __init__(self, clock: Clock, seconds: float, error: float) -> None:
        self.clock, self.seconds, self.error = clock, seconds, error

    def __call__(self, mel: Tensor) -> Tensor:
        self.clock.cpu += self.seconds
        return self.draw(mel)

    def example_mel(self) -> None:
        return None

    def draw(self, mel: Tensor) -> Tensor:
        return torch.ones(mel.shape[1] * MEL.hop_length) + self.error


def test_works_take_turns_in_reversed_order_every_second_round() -> None:
    turns: list[str] = []

    def work(name: str) -> float:
        turns.append(name)
        return len(turns)

    calls: list[tuple[int, int]] = []
    works = {name: lambda name=name: work(name) for name in "ab"}
    times = take_turns(works, 3, lambda done, total: calls.append((done, total)))
    assert "".join(turns) == "ab" + "ba" + "ab" + "ba"
    assert times == {"a": [4, 5, 8], "b": [3, 6, 7]}  # without the round that warms up
    assert calls == [(done, 8) for done in range(1, 9)]


def test_a_ratio_is_taken_within_each_round() -> None:
    ratio = speed_ratio([2, 30, 4, 50, 6], [1, 10, 1, 10, 1])
    assert ratio == (3, 4, 5)
    assert str(ratio) == "4.00 (3.00-5.00)"


@pytest.mark.parametrize(
    ("threads", "device", "seconds"), [(1, "cpu", 3), (2, "cpu", 6), (1, "cuda", 6)]
)
def test_cpu_time_counts_on_one_thread_of_a_cpu(
    clock: Clock, threads: int, device: str, seconds: float
) -> None:
    def work() -> None:
        clock.cpu += 3

    torch.set_num_threads(threads)
    assert timed(work, device)() == seconds


def test_figures_of_paths_of_known_speed(clock: Clock, tiny_model: Path) -> None:
    paths = {"plain": Busy(clock, 0.03, 0.0), "engine int8": Busy(clock, 0.01, 0.1)}
    calls: list[int] = []
    rows = compare(str(tiny_model), paths, 0.5, 3, lambda done, total: calls.append(total))  # type: ignore[arg-type]
    seconds = round(0.5 * MEL.sample_rate / MEL.hop_length) * MEL.hop_length / MEL.sample_rate
    name = str(tiny_model)
    assert rows == [
        (name, "plain", "0.5 s", f"{seconds / 0.03:.3g}", "1", ""),
        # An error of a tenth is 20 dB.
        (name, "engine int8", "0.5 s", f"{seconds / 0.01:.3g}", "3.00 (3.00-3.00)", "20"),
    ]
    assert calls == [8] * 8


def test_the_plain_path_is_the_model_without_weight_norm() -> None:
    config, flow = untrained(TINY)
    mel = torch.randn(1, 80, 20) - 5
    published = Vocoder(config, flow, lambda flow: flow.decode).draw(mel)
    plain = plain_path(Vocoder(config, flow))
    assert not any(is_parametrized(module) for module in plain.flow.modules())
    assert plain.decoder == plain.flow.decode
    assert signal_to_noise_db(published, plain.draw(mel)) > 110


# The verb

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["bench", *(str(arg) for arg in args)])
        return status, *capsys.readouterr()

    return call


def test_bench_prints_a_table(run: Run, tiny_model: Path) -> None:
    precisions = ("--precision", "float32", "--precision", "float16", "--precision", "bfloat16")
    lengths = ("--seconds", "0.1", "--seconds", "0.2")
    status, out, err = run(tiny_model, *precisions, *lengths, "--runs", "1")
    assert status == 0
    assert "waveflow: left out: engine float16: " in err
    # Where this CPU is slower in bfloat16, a line says so.
    assert all("left out" in line or "runs in float32" in line for line in err.splitlines())
    header, *rows = out.splitlines()
    assert " ".join(header.split()) == "model path audio x real time x plain SNR dB"
    assert all(row.startswith(str(tiny_model)) for row in rows)
    found = [row.split("  ")[1].strip() for row in rows]
    assert found == ["plain", "engine float32", "engine bfloat16"] * 2
    assert not any(line.endswith(" ") for line in out.splitlines())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("nothing",), "no model 'nothing'"),
        (("--device", "nowhere"), "nowhere"),
        (("--seconds", "0"), "--seconds"),
        (("--precision", "int3"), "int3"),
        (("--precision", "int8", "--precision", "auto"), "auto"),
    ],
)
def test_bench_refuses(run: Run, args: tuple[str, ...], words: str) -> None:
    status, out, err = run(*args)
    assert (status, out) == (2, "")
    assert words in err and len(err.splitlines()) == 1
