"""int8: as near to float32 as its bits allow, for any length and batch, and clear refusals."""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from waveflow.audio.mel import MelConfig
from waveflow.bijections import Affine, Chain, Coupling, Halves, InvertibleConv1x1, Squeeze
from waveflow.context import Context
from waveflow.decoding import IntegerKit, NotInIntegers
from waveflow.engine.fast import int8
from waveflow.engine.fast.int8 import (
    Int8Decoder,
    Int8Kit,
    _input_peaks,
    int8_decoder,
    speech_like_mel,
)
from waveflow.engine.fast.int8_graph import WEIGHT_7_BITS, WEIGHT_8_BITS, RowGraph, largest_weight
from waveflow.errors import ConfigError
from waveflow.flow import Flow
from waveflow.metrics.spectral import signal_to_noise_db
from waveflow.models.frameglow import FrameGlowConfig, frameglow
from waveflow.models.frameglow.networks import MelLevelNetwork
from waveflow.models.waveglow import WaveGlowConfig, waveglow
from waveflow.nn.frame import GatedLayer, GatedStack
from waveflow.nn.wavenet import WaveNet

pytest.importorskip("openvino", reason="int8 needs the package openvino")

N_MELS = 20
WAVEGLOWS = {
    "published shape": {},
    "halves alternate, condition repeated": {"alternate": True, "conditioning": "repeated"},
    "five taps": {"kernel_size": 5},
    "one tap": {"kernel_size": 1},
}
# In dB, for the whole and for the first and last 64 samples, where blocks and padding end: 3 to 4
# below the measured figures of 7-bit weights. Eight bits at full scale have 50; layers add up, and
# the affine maps make errors of one flow larger or smaller in the next. Without the zeros beyond
# the ends, or with sums that do not fit 16 bits, the published shape has 30 or less.
LEAST_SNR = {
    "published shape": 39,
    "halves alternate, condition repeated": 26,
    "five taps": 42,
    "one tap": 38,
    "frameglow": 16,
}


def _trained_like(flow: Flow, seed: int = 0) -> Flow:
    """With random weights where a new flow has zeros, so that every network matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for step in flow.bijection.modules():
            if isinstance(step, Coupling):
                for parameter in step.network.parameters():
                    if not parameter.any():
                        parameter.normal_(std=0.1, generator=generator)
    return flow.eval()


def _waveglow(**sizes: object) -> Flow:
    torch.manual_seed(0)
    config = {"n_mels": N_MELS, "hop_length": 64, "upsample_kernel": 128, "n_flows": 3}
    config |= {"n_early_every": 2, "n_layers": 4, "hidden_channels": 32}
    return _trained_like(waveglow(WaveGlowConfig(**(config | sizes))))


def _frameglow(**sizes: object) -> Flow:
    torch.manual_seed(0)
    mel = MelConfig(sample_rate=22050, n_mels=N_MELS, n_fft=256, win_length=256, hop_length=64)
    config = {"n_levels": 2, "n_flows": 2, "hidden_channels": 32, "encoder_channels": 32}
    config["noise_share"] = True
    flow = _trained_like(frameglow(FrameGlowConfig(**(config | sizes)), mel))
    for module in flow.modules():
        if isinstance(module, MelLevelNetwork):
            # Levels of random weights, one behind the other, would multiply every error.
            for layer in (module.slopes, module.slope_and_offset):
                layer.weight.data.mul_(0.3)
    return flow


class Pair(NamedTuple):
    name: str
    flow: Flow
    decode: Int8Decoder


@pytest.fixture(scope="module", params=LEAST_SNR)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=[WEIGHT_7_BITS, WEIGHT_8_BITS], ids=["7 bits", "8 bits"])
def pair(request: pytest.FixtureRequest, name: str) -> Iterator[Pair]:
    """Each model with 7-bit weights on every CPU, and with 8 bits where they are exact."""
    if request.param > largest_weight():
        pytest.skip("this CPU sums products of 8 bits in 16")
    sizes = WAVEGLOWS.get(name)
    flow = _frameglow() if sizes is None else _waveglow(**sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "largest_weight", lambda: request.param)
        yield Pair(name, flow, int8_decoder(flow, speech_like_mel(N_MELS)))


@pytest.fixture(scope="module")
def small() -> Pair:
    flow = _waveglow()
    return Pair("published shape", flow, int8_decoder(flow, speech_like_mel(N_MELS)))


def test_the_chosen_weights_are_summed_without_loss() -> None:
    """Of random signs, and at the corner: all inputs and weights as large as they can be."""
    n = 256
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (2, n, n), generator=generator) * 2.0 - 1
    for rows, weight in (signs, torch.ones(2, n, n)):
        layer = nn.Linear(n, n)
        layer.weight = nn.Parameter(weight)
        graph = RowGraph(n, 0, largest_weight(), lambda _: np.ones(n, np.float32))
        run = graph.compiled(graph.apply(layer, graph.input(n)))
        torch.testing.assert_close(run(rows), layer(rows).detach(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(("most", "largest"), [(1000, WEIGHT_8_BITS), (63, WEIGHT_7_BITS)])
def test_the_probe_chooses(most: float, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that sums without loss, and one whose sums end at `most`; the probe's is 64."""

    def summed(rows: Tensor) -> Tensor:
        exact = rows.sum(1, keepdim=True).repeat(1, 64)
        return torch.cat([exact, -exact], 1).clamp(-1000, most)

    monkeypatch.setattr(RowGraph, "compiled", lambda *_: summed)
    assert largest_weight.__wrapped__() == largest


def _run(
    layer: nn.Module,
    rows: Tensor,
    peak: Tensor,
    reach: int = 0,
    describe: Callable[[RowGraph, Any], Any] | None = None,
) -> Tensor:
    """A layer as a graph in blocks of 8 rows; `peak` are the largest inputs."""

    def peak_of(inner: Any) -> Any:
        return peak.repeat(inner.in_features // len(peak)).numpy()

    graph = RowGraph(8, reach, largest_weight(), peak_of)
    x = graph.input(rows.shape[1])
    result = graph.apply(layer, x) if describe is None else describe(graph, x)
    return graph.compiled(result)(rows)


@pytest.mark.parametrize("silent", ["nothing", "input", "column", "row"])
@torch.no_grad()
def test_channels_of_unlike_ranges_keep_their_digits(silent: str) -> None:
    """One channel is 1,000 times as loud with weights as much smaller; others may be silent."""
    torch.manual_seed(0)
    rows, layer = torch.randn(24, 16), nn.Linear(16, 16)
    rows[:, 3] *= 1000
    layer.weight[:, 3] /= 1000
    if silent == "input":
        rows[:, 5] = 0
    elif silent == "column":
        layer.weight[:, 5] = 0
    elif silent == "row":
        layer.weight[5] = 0
    result, exact = _run(layer, rows, rows.abs().amax(0)), layer(rows)
    assert (result - exact).abs().max() < 0.03 * exact.abs().max()


@torch.no_grad()
def test_a_channel_that_was_silent_in_the_calibration_is_clipped_and_finite() -> None:
    rows, layer = torch.ones(8, 16), nn.Linear(16, 16)
    peak = torch.ones(16)
    peak[5] = 0
    without = layer(rows * peak)
    torch.testing.assert_close(_run(layer, rows, peak), without, rtol=0, atol=0.05)


@torch.no_grad()
def test_the_loudest_tap_decides_the_scale() -> None:
    torch.manual_seed(0)
    rows, layer = torch.rand(24, 4), nn.Linear(12, 4)
    peaks = torch.cat([torch.full((4,), 0.01), torch.ones(8)])
    weights = layer.weight.split(4, 1)
    integers = lambda graph, x: graph.product(  # noqa: E731
        graph.taps(x, layer, weights, 2), layer.weight, layer.bias
    )
    padded = nn.functional.pad(rows, (0, 0, 2, 2))
    exact = layer(torch.cat([padded[2 * i :][:24] for i in range(3)], 1))
    result = _run(layer, rows, peaks, 2, integers)
    torch.testing.assert_close(result, exact, rtol=0, atol=0.03)


@torch.no_grad()
def test_a_norm_has_its_gains() -> None:
    layer, rows = nn.LayerNorm(8), torch.randn(24, 8)
    layer.weight.uniform_(0.5, 2)
    layer.bias.uniform_(-1, 1)
    torch.testing.assert_close(_run(layer, rows, torch.ones(8)), layer(rows), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_signal_is_late_by_less_and_then_by_more() -> None:
    rows, layer = torch.randn(24, 4), nn.Linear(4, 4)
    one = [torch.zeros(4, 4), torch.zeros(4, 4), torch.eye(4)]

    def taken(graph: RowGraph, x: Any) -> Any:
        h = graph.affine(x, torch.eye(4), torch.zeros(4))
        for dilation in (1, 3):
            joined = graph.taps(h, layer, one, dilation)
            later = graph.product(joined, torch.cat(one, 1), torch.zeros(4))
            x = graph.add(x, later)
        return x

    padded = nn.functional.pad(rows, (0, 0, 0, 3))
    exact = rows + padded[1:25] + padded[3:]
    result = _run(layer, rows, rows.abs().amax(0), 3, taken)
    torch.testing.assert_close(result, exact, rtol=0, atol=0.1)


@torch.no_grad()
def test_nothing_enters_from_beyond_the_ends() -> None:
    """The layers' biases make rows of padding other than zero."""
    torch.manual_seed(0)
    stack, rows = GatedStack(4, [1, 2]), torch.randn(11, 4)
    for layer in stack.layers:
        cast(GatedLayer, layer).out.bias.fill_(2)
        cast(GatedLayer, layer).dilated.weight.mul_(3)
    result = _run(stack, rows, torch.full((4,), 8.0), 3)
    torch.testing.assert_close(result, stack(rows[None])[0], rtol=0, atol=0.2)


def test_what_cannot_run_in_integers() -> None:
    """A layer without calibration, and a network without a bound."""
    graph = Int8Kit({}).graph(8, Context(1, 1), 1)
    with pytest.raises(NotInIntegers):
        graph.apply(nn.Linear(4, 4), graph.input(4))
    with pytest.raises(NotInIntegers):
        Int8Kit({}).graph(8, Context(math.inf, 0), 1)


@pytest.mark.parametrize("n_frames", [1, 2, 64, 65, 200])
@torch.inference_mode()
def test_it_is_decode_to_8_bits(pair: Pair, n_frames: int) -> None:
    name, flow, decode = pair
    mel = speech_like_mel(N_MELS, n_frames)[None]
    z = flow.noise(n_frames, seeds=[3])
    reference, audio = flow.decode(z, mel, sigma=0.9), decode(z, mel, sigma=0.9)
    still = decode(z, mel, sigma=0.0)
    assert torch.equal(still, decode(-z, mel, sigma=0.0))
    assert not torch.equal(still, audio)
    assert audio.shape == reference.shape
    for part in (slice(None), slice(0, 64), slice(-64, None)):
        assert LEAST_SNR[name] < signal_to_noise_db(reference[:, part], audio[:, part]) < 70


def test_blocks_are_seamless(small: Pair) -> None:
    """What lies frames away changes nothing, whichever block of rows a frame falls into."""
    _, flow, decode = small
    mel, z = speech_like_mel(N_MELS, 200)[None], flow.noise(200, seeds=[0])
    left, right = flow.context
    first = 30  # frames; not a multiple of a block
    window = decode(z[:, :, first * 8 :], mel[:, :, first:])
    whole = decode(z, mel)[:, first * 64 :]
    assert torch.equal(window[:, left * 64 :], whole[:, left * 64 :])
    window = decode(z[:, :, : first * 8], mel[:, :, :first])
    kept = (first - right) * 64
    assert kept > 0
    assert torch.equal(window[:, :kept], decode(z, mel)[:, :kept])


def test_a_padded_item_is_what_it_is_alone(pair: Pair) -> None:
    _, flow, decode = pair
    lengths = torch.tensor([30, 7])
    mel = torch.stack([speech_like_mel(N_MELS, 30), torch.full((N_MELS, 30), -4.0)])
    z = flow.noise(30, seeds=[0, 1])
    batch = decode(z, mel, lengths)
    positions = 7 * z.shape[2] // 30
    alone = decode(z[1:, :, :positions], mel[1:, :, :7])
    assert torch.equal(batch[1:, : 7 * 64], alone)
    assert not batch[1, 7 * 64 :].any()
    assert torch.equal(batch[:1], decode(z[:1], mel[:1]))


def test_the_phase_of_the_source_arrives() -> None:
    flow = _frameglow()
    decode = int8_decoder(flow, speech_like_mel(N_MELS))
    mel, z = speech_like_mel(N_MELS, 40)[None], flow.noise(40, seeds=[0])
    start = torch.tensor([0.3], dtype=torch.float64)
    with torch.inference_mode():
        shifted = flow.decode(z, mel, None, ((start, None), None))
    assert signal_to_noise_db(shifted, decode(z, mel, None, ((start, None), None))) > 16
    assert signal_to_noise_db(shifted, decode(z, mel)) < 10
    starts = ((torch.cat([2 * start, start]), None), None)
    both = decode(z.repeat(2, 1, 1), mel.repeat(2, 1, 1), None, starts)
    alone = [decode(z, mel, None, ((phase, None), None)) for phase in (2 * start, start)]
    assert torch.equal(both, torch.cat(alone))


def test_the_same_again_and_the_flow_is_left_alone(small: Pair) -> None:
    _, flow, decode = small
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    modules = list(flow.modules())
    mel, z = speech_like_mel(N_MELS, 50)[None], flow.noise(50, seeds=[0])
    again = int8_decoder(flow, speech_like_mel(N_MELS))
    assert torch.equal(decode(z, mel), decode(z, mel))
    assert torch.equal(decode(z, mel), again(z, mel))
    assert list(flow.modules()) == modules
    assert all(torch.equal(before[name], value) for name, value in flow.state_dict().items())
    assert not any(module._forward_pre_hooks for module in modules)


class Late(WaveNet):
    """A user's network, derived from one that runs in integers."""

    def forward(self, x: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x.roll(1, 2), features, mask)


def derived(module: Any) -> Any:
    module.__class__ = type("Mine", (type(module),), {})
    return module


def grouped(flow: Any) -> None:
    flow.bijection[2].network.in_layers[0] = nn.Conv1d(32, 64, 3, padding=1, groups=2)


def late(flow: Any) -> None:
    flow.bijection[2].network.__class__ = Late


@pytest.mark.parametrize("change", [grouped, late])
def test_a_changed_network_runs_as_it_is_beside_the_others(change: Callable[[Flow], None]) -> None:
    flow = _waveglow(n_flows=2)
    change(flow)
    decode = int8_decoder(flow, speech_like_mel(N_MELS))
    mel, z = speech_like_mel(N_MELS, 20)[None], flow.noise(20, seeds=[0])
    with torch.inference_mode():
        assert 35 < signal_to_noise_db(flow.decode(z, mel), decode(z, mel)) < 70


CHANGED_PARTS: dict[str, Callable[[Any], Any]] = {
    "body": lambda network: derived(network.body),
    "layer": lambda network: derived(network.body.layers[0]),
    "dilated": lambda network: derived(network.body.layers[0].dilated),
    "out": lambda network: derived(network.body.layers[0].out),
    "enter": lambda network: derived(network.enter),
    "norm": lambda network: derived(network.norm),
    "network": lambda network: derived(network),
}


@pytest.mark.parametrize("part", CHANGED_PARTS)
def test_a_network_with_a_changed_part_is_not_run_in_integers(part: str) -> None:
    flow: Any = _frameglow(n_flows=1)
    CHANGED_PARTS[part](flow.bijection[-2].network)
    with pytest.raises(ConfigError, match="no network that runs in int8"):
        int8_decoder(flow, speech_like_mel(N_MELS))


class Observed(nn.Conv1d):
    """A network whose inputs are observed."""

    def for_integers(self, kit: IntegerKit) -> nn.Module:
        raise NotInIntegers


def test_a_network_that_is_used_twice_is_calibrated_for_both() -> None:
    """The second use has inputs of a hundredth, the first decides."""
    coupling, smaller = Coupling(Observed(1, 2, 1), Affine(), Halves()), InvertibleConv1x1(2)
    nn.init.zeros_(coupling.network.weight)
    smaller.weight.data = 100 * torch.eye(2)
    flow = Flow(Chain(Squeeze(2), coupling, smaller, coupling), channels=2)
    peaks = _input_peaks(flow, torch.zeros(1, 0, 50))
    largest = flow.noise(50, [0])[0, 0].abs().max()
    assert peaks[coupling.network][0] == largest == peaks[coupling.network][1].max()


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match=r"waveflow\[int8\]"):
        int8_decoder(_waveglow(), speech_like_mel(N_MELS))


def test_without_a_network_for_it() -> None:
    flow = _frameglow(network="convnext")
    with pytest.raises(ConfigError, match="no network that runs in int8"):
        int8_decoder(flow, speech_like_mel(N_MELS))


@pytest.mark.skipif(sys.platform != "linux", reason="the signal stack is Linux's")
def test_a_signal_after_the_last_graph_is_gone() -> None:
    """In another thread than the one that made it: OpenVINO would free this one's signal stack."""
    code = (
        "import gc, signal, threading\n"
        "from waveflow.engine.fast.int8_graph import RowGraph\n"
        "def graph():\n"
        "    made = RowGraph(8, 0, 63)\n"
        "    x = made.input(4)\n"
        "    return made.compiled(made.add(x, x))\n"
        "graphs = [graph()]\n"
        "thread = threading.Thread(target=lambda: (graphs.clear(), gc.collect()))\n"
        "thread.start(); thread.join()\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('heard'))\n"
        "signal.raise_signal(signal.SIGTERM)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "heard\n"), run.stderr
