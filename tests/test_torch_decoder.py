"""TorchDecoder: the flow's own modules run faster give what the flow gives."""

import pytest
import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from waveflow.audio.mel import MEL_PRESETS
from waveflow.engine.fast import product
from waveflow.engine.fast.packed import PackedLinear
from waveflow.engine.fast.torch_decoder import TorchDecoder, _padded
from waveflow.errors import ConfigError
from waveflow.flow import Flow
from waveflow.models.frameglow import FrameGlowConfig
from waveflow.models.registry import build_flow
from waveflow.models.waveglow import WaveGlowConfig

# Of waveforms of order 1: float32 rounding through all steps of a flow.
TOLERANCE = 1e-5
FRAMEGLOW = FrameGlowConfig(
    n_flows=2, hidden_channels=16, dilations=(1, 2), encoder_channels=16, encoder_layers=1
)
CONFIGS = {
    "frameglow": FRAMEGLOW,
    "convnext": FRAMEGLOW.model_copy(update={"network": "convnext"}),
    "waveglow": WaveGlowConfig(n_flows=4, hidden_channels=8, n_layers=2),
}


def made(config: FrameGlowConfig | WaveGlowConfig) -> Flow:
    """A flow whose couplings do something."""
    torch.manual_seed(0)
    flow = build_flow(config, MEL_PRESETS["hifigan"])
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return flow.eval()


def inputs(flow: Flow, n_frames: int, n_items: int = 1) -> tuple[Tensor, Tensor]:
    """Noise (B, C, L), and mels (B, 80, F) of the level of speech."""
    generator = torch.Generator().manual_seed(1)
    mel = -5 + torch.randn(n_items, 80, n_frames, generator=generator)
    return flow.noise(n_frames, range(n_items)), mel


@pytest.fixture(scope="module", params=CONFIGS)
def flow(request: pytest.FixtureRequest) -> Flow:
    return made(CONFIGS[request.param])


@torch.no_grad()
@pytest.mark.parametrize("n_frames", [1, 2, 40])
def test_float32_is_the_flow_itself(flow: Flow, n_frames: int) -> None:
    z, mel = inputs(flow, n_frames)
    audio = TorchDecoder(flow)(z, mel)
    torch.testing.assert_close(audio, flow.decode(z, mel), rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_a_padded_batch_and_a_running_phase(flow: Flow) -> None:
    z, mel = inputs(flow, 30, n_items=2)
    lengths = torch.tensor([30, 17])
    start = torch.tensor([0.25, 0.5], dtype=torch.float64)
    audio = TorchDecoder(flow)(z, mel, lengths, start)
    expected = flow.decode(z, mel, lengths, start)
    torch.testing.assert_close(audio, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_but_not_the_same(flow: Flow, dtype: torch.dtype) -> None:
    z, mel = inputs(flow, 20)
    plain = flow.decode(z, mel)
    audio = TorchDecoder(flow, dtype)(z, mel)
    assert audio.dtype == torch.float32
    assert not torch.allclose(audio, plain, rtol=0, atol=TOLERANCE)
    noise = (audio - plain).square().mean() / plain.square().mean()
    # bfloat16 keeps 8 bits: 48 dB each rounding, some lost over the flow's steps.
    assert 10 * noise.log10() < -30


@torch.no_grad()
def test_the_flow_is_left_as_it_was(flow: Flow) -> None:
    z, mel = inputs(flow, 5)
    before, names = flow.decode(z, mel), list(flow.state_dict())
    TorchDecoder(flow)
    assert list(flow.state_dict()) == names
    assert torch.equal(flow.decode(z, mel), before)


@torch.no_grad()
def test_the_pitch_is_the_flows_own_to_the_bit() -> None:
    flow = made(FRAMEGLOW)
    pitch = TorchDecoder(flow)._flow.conditioner.pitch
    x = torch.randn(1, 50, 80)
    assert torch.equal(pitch(x)[0], flow.conditioner.pitch(x)[0])


@torch.no_grad()
@pytest.mark.parametrize("n_frames", [1, 64, 65, 300, 1100])
def test_padded_lengths_share_few_sizes_and_change_nothing(n_frames: int) -> None:
    flow = made(FRAMEGLOW)
    z, mel = inputs(flow, n_frames)
    longer_z, longer_mel, lengths = _padded(z, mel, None)
    size = longer_mel.shape[2]
    assert size % 64 == 0 and n_frames <= size < max(n_frames + 64, 1.25 * n_frames)
    audio = flow.decode(longer_z, longer_mel, lengths)[:, : n_frames * 256]
    torch.testing.assert_close(audio, flow.decode(z, mel), rtol=0, atol=TOLERANCE)


def test_without_a_compiler_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="C\\+\\+ compiler: install no-such-compiler"):
        TorchDecoder(made(FRAMEGLOW), compile=True)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_equals_eager_at_lengths_that_are_not_compiled_anew() -> None:
    from torch._dynamo.utils import counters

    flow = made(FRAMEGLOW.model_copy(update={"n_levels": 1, "n_flows": 1}))
    eager, compiled = TorchDecoder(flow), TorchDecoder(flow, compile=True)
    before = counters["stats"]["unique_graphs"]
    for n_frames in (20, 7, 31):
        z, mel = inputs(flow, n_frames)
        # Whatever the memory's order, and made in inference mode or not.
        for noise in (z, z.contiguous()):
            audio = compiled(noise, mel)
            torch.testing.assert_close(audio, eager(z, mel), rtol=0, atol=TOLERANCE)
    assert counters["stats"]["unique_graphs"] == before + 1


@torch.no_grad()
def test_weight_norm_is_folded() -> None:
    flow = made(CONFIGS["waveglow"])
    twin = TorchDecoder(flow)._flow
    assert not any(is_parametrized(module) for module in twin.modules())
    assert any(is_parametrized(module) for module in flow.modules())


@torch.no_grad()
def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_HAS_ONEDNN", False)
    flow = made(FRAMEGLOW)
    z, mel = inputs(flow, 9)
    torch.testing.assert_close(
        TorchDecoder(flow)(z, mel), flow.decode(z, mel), rtol=0, atol=TOLERANCE
    )
    # What a compiler would be given instead of oneDNN's operator.
    layer = PackedLinear(torch.eye(3))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(layer(torch.ones(2, 3)), torch.ones(2, 3))
