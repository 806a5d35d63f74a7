"""TorchDecoder: stand-ins of the flow's own modules, run faster, give what the flow gives."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from waveflow.audio.mel import MEL_PRESETS
from waveflow.bijections import (
    Affine,
    Bijection,
    Chain,
    Condition,
    Coupling,
    EvenOdd,
    Halves,
    InvertibleConv1x1,
    InvertibleConv1x1PLU,
    LappedSqueeze,
    Squeeze,
)
from waveflow.decoding import Kit
from waveflow.engine.decoder import WeightsVersion, make_decoder
from waveflow.engine.fast import product
from waveflow.engine.fast.packed import DecodingKit, PackedLinear
from waveflow.engine.fast.torch_decoder import TorchDecoder, _padded
from waveflow.errors import ConfigError
from waveflow.flow import Flow
from waveflow.models.frameglow import FrameGlowConfig
from waveflow.models.frameglow.conditioner import FrameConditioner
from waveflow.models.registry import build_flow
from waveflow.models.waveglow import WaveGlowConfig
from waveflow.nn.frame import GatedLayer
from waveflow.nn.pitch import PitchHead

# Of waveforms of order 1: float32 rounding through all steps of a flow.
TOLERANCE = 1e-5
FRAMEGLOW = FrameGlowConfig(
    n_flows=2,
    hidden_channels=16,
    dilations=(1, 2),
    encoder_channels=16,
    encoder_layers=1,
    minimum_phase=True,
    noise_share=True,
)
CONFIGS = {
    "frameglow": FRAMEGLOW,
    "convnext": FRAMEGLOW.model_copy(update={"network": "convnext"}),
    "waveglow": WaveGlowConfig(n_flows=4, hidden_channels=8, n_layers=2),
}


@torch.no_grad()
def perturbed(module: Any) -> Any:
    """With random weights where new modules have zeros, in evaluation mode."""
    for parameter in module.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return module.eval()


def made(config: FrameGlowConfig | WaveGlowConfig) -> Flow:
    """A flow whose couplings do something."""
    torch.manual_seed(0)
    return perturbed(build_flow(config, MEL_PRESETS["hifigan"]))


def inputs(flow: Flow, n_frames: int, n_items: int = 1) -> tuple[Tensor, Tensor]:
    """Noise (B, C, L), and mels (B, 80, F) of the level of speech."""
    generator = torch.Generator().manual_seed(1)
    mel = -5 + torch.randn(n_items, 80, n_frames, generator=generator)
    return flow.noise(n_frames, range(n_items)), mel


@pytest.fixture(scope="module", params=CONFIGS)
def flow(request: pytest.FixtureRequest) -> Flow:
    return made(CONFIGS[request.param])


@pytest.fixture(params=[True, False], ids=["oneDNN", "torch's own"])
def packed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both routines of a product, whichever is faster here."""
    monkeypatch.setattr(product, "onednn_pays", lambda *_: request.param)
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("n_frames", [1, 2, 40])
def test_float32_is_the_flow_itself(flow: Flow, n_frames: int, packed: bool) -> None:
    z, mel = inputs(flow, n_frames)
    for sigma in (1.0, 0.2):
        audio = TorchDecoder(flow)(z, mel, sigma=sigma)
        torch.testing.assert_close(audio, flow.decode(z, mel, sigma=sigma), rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_a_padded_batch_and_a_state(flow: Flow) -> None:
    z, mel = inputs(flow, 30, n_items=2)
    lengths = torch.tensor([30, 17])
    phase, path = torch.tensor([0.25, 0.5], dtype=torch.float64), torch.rand(2, 30).double()
    state = ((phase, path), None) if isinstance(flow.conditioner, FrameConditioner) else None
    audio = TorchDecoder(flow)(z, mel, lengths, state, 0.3)
    expected = flow.decode(z, mel, lengths, state, 0.3)
    assert not torch.allclose(expected, flow.decode(z, mel, lengths, state))
    torch.testing.assert_close(audio, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_but_not_the_same(flow: Flow, dtype: torch.dtype) -> None:
    z, mel = inputs(flow, 20)
    plain = flow.decode(z, mel, sigma=0.5)
    audio = TorchDecoder(flow, dtype)(z, mel, sigma=0.5)
    assert audio.dtype == torch.float32
    assert not torch.allclose(audio, plain, rtol=0, atol=TOLERANCE)
    noise = (audio - plain).square().mean() / plain.square().mean()
    # bfloat16 keeps 8 bits: 48 dB each rounding, some lost over the flow's steps.
    assert 10 * noise.log10() < -30


@torch.no_grad()
def test_transforms_and_mixing_stay_in_float32_in_half_precision(packed: bool) -> None:
    kit = DecodingKit(torch.bfloat16)
    z = torch.randn(2, 8, 5)
    with torch.autocast("cpu", torch.bfloat16):
        mixing = InvertibleConv1x1(8)
        mixing.weight.mul_(2)
        for module in (mixing, LappedSqueeze(8)):
            expected, log_det = module.inverse(z)
            assert expected.dtype == torch.float32
            audio, its_log_det = kit.convert(module).inverse(z)  # type: ignore[operator]
            torch.testing.assert_close(audio, expected, rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(its_log_det, log_det)


@torch.no_grad()
def test_the_flow_is_left_as_it_was(flow: Flow) -> None:
    z, mel = inputs(flow, 5)
    before, names = flow.decode(z, mel), list(flow.state_dict())
    modules, version = list(flow.modules()), WeightsVersion(flow)
    TorchDecoder(flow)
    assert list(flow.state_dict()) == names
    assert list(flow.modules()) == modules and version == WeightsVersion(flow)
    assert torch.equal(flow.decode(z, mel), before)


@torch.no_grad()
def test_the_pitch_is_the_flows_own_to_the_bit() -> None:
    """In every precision: the phase is integrated from it."""
    pitch = PitchHead(80)
    assert DecodingKit().convert(pitch) is pitch
    assert DecodingKit(torch.bfloat16).convert(pitch) is pitch


# --- Who chooses a stand-in ---


class Doubled(Coupling):
    """A user's coupling that computes something else."""

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = super().forward(x, cond)
        return 2 * z, log_det

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        return super().inverse(z / 2, cond)


class Negative(InvertibleConv1x1):
    """A user's 1x1 convolution, derived from one that declares a stand-in."""

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        return super().inverse(-z, cond)


class LateLayer(GatedLayer):
    """A user's layer, derived from one that declares a stand-in."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x.roll(1, 1), mask)


class Scaled(nn.Linear):
    """A user's linear layer, derived from torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Channels(nn.Module):
    """A network (B, C, L) of layers that take (B, L, C)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.transpose(1, 2)).transpose(1, 2)


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda _, __, result: 3 * result)
    return layer


def with_weight_norm(layer: nn.Module) -> nn.Module:
    return parametrizations.weight_norm(layer)


USERS_STEPS: dict[str, Callable[[], Bijection]] = {
    "a subclass of Coupling": lambda: Doubled(nn.Conv1d(4, 8, 1), Affine(), Halves()),
    "a subclass of InvertibleConv1x1": lambda: Negative(8),
    "InvertibleConv1x1PLU": lambda: InvertibleConv1x1PLU(8),
    "a subclass of GatedLayer": lambda: Coupling(
        Channels(LateLayer(4, 3, 1), nn.Linear(4, 8)), Affine(), EvenOdd()
    ),
    "GatedLayer of other layers": lambda: Coupling(
        Channels(_with(GatedLayer(4, 3, 1), out=Scaled(4, 4)), nn.Linear(4, 8)), Affine(), EvenOdd()
    ),
    "GatedLayer with a hook": lambda: Coupling(
        Channels(_with(GatedLayer(4, 3, 1), out=hooked(nn.Linear(4, 4))), nn.Linear(4, 8)),
        Affine(),
        EvenOdd(),
    ),
    "a subclass of Linear": lambda: Coupling(Channels(Scaled(4, 8)), Affine(), Halves()),
    "a hook": lambda: Coupling(Channels(hooked(nn.Linear(4, 8))), Affine(), Halves()),
    "weight norm, Linear": lambda: Coupling(
        Channels(with_weight_norm(nn.Linear(4, 8))), Affine(), Halves()
    ),
    "weight norm, groups": lambda: Coupling(
        with_weight_norm(nn.Conv1d(4, 8, 3, padding=1, groups=2)), Affine(), Halves()
    ),
    "weight norm, padding mode and no bias": lambda: Coupling(
        with_weight_norm(
            nn.Conv1d(4, 8, 3, padding="same", padding_mode="reflect", bias=False, dilation=2)
        ),
        Affine(),
        Halves(),
    ),
    "weight norm, transposed": lambda: Coupling(
        nn.Sequential(with_weight_norm(nn.ConvTranspose1d(4, 8, 3, padding=1))), Affine(), Halves()
    ),
    "spectral norm": lambda: Coupling(
        parametrizations.spectral_norm(nn.Conv1d(4, 8, 1)), Affine(), Halves()
    ),
    "weight and bias": lambda: Coupling(_softplus(nn.Conv1d(4, 8, 1)), Affine(), Halves()),
    "weight norm of a layer that declares": lambda: _softplus(InvertibleConv1x1(8), "weight"),
    "weight norm by hooks": lambda: Coupling(
        Channels(torch.nn.utils.weight_norm(nn.Linear(4, 8))), Affine(), Halves()
    ),
}


def _with(module: nn.Module, **children: nn.Module) -> nn.Module:
    for name, child in children.items():
        setattr(module, name, child)
    return module


def _softplus(layer: Any, *names: str) -> Any:
    for name in names or ("weight", "bias"):
        register_parametrization(layer, name, nn.Softplus())
    return layer


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("step", USERS_STEPS)
def test_users_modules_give_what_they_give(step: str, packed: bool) -> None:
    torch.manual_seed(0)
    flow = Flow(Chain(Squeeze(8), USERS_STEPS[step]()), channels=8).eval()
    z = flow.noise(20, [0])
    expected = flow.decode(z)
    audio = make_decoder(flow)(z, torch.zeros(1, 0, 20))
    torch.testing.assert_close(audio, expected, rtol=0, atol=TOLERANCE)
    assert not torch.allclose(expected, flow.decode(0.5 * z), rtol=0, atol=1e-2)


class Recorded(nn.Module):
    """A module that declares a stand-in."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(3, 3)
        self.kits: list[Kit] = []

    def for_decoding(self, kit: Kit) -> nn.Module:
        self.kits.append(kit)
        return kit.convert(self.child)


def test_a_module_says_itself_what_stands_in_for_it(packed: bool) -> None:
    module, kit = Recorded(), DecodingKit()
    stand_in = kit.convert(nn.Sequential(module))[0]  # type: ignore[index]
    assert module.kits == [kit]
    assert type(stand_in) is (PackedLinear if packed else nn.Linear)


def test_autocast_has_torchs_own_layers_in_half_precision(packed: bool) -> None:
    """A packed product would stay in float32."""
    assert type(DecodingKit(torch.bfloat16).convert(nn.Linear(3, 3))) is nn.Linear


def test_the_plu_form_declares_too() -> None:
    """A declaration is not inherited."""
    for module in (InvertibleConv1x1(4), InvertibleConv1x1PLU(4)):
        assert type(DecodingKit().convert(module)) is not type(module)


def test_a_shared_module_has_one_stand_in(packed: bool) -> None:
    shared = nn.Sequential(nn.Linear(3, 3))
    stand_in: Any = DecodingKit().convert(nn.Sequential(shared, shared))
    assert stand_in[0] is stand_in[1] and stand_in[0] is not shared


def test_replaced_children() -> None:
    module = nn.Sequential(nn.Linear(2, 3), Recorded())
    other = nn.Identity()
    replaced = DecodingKit().replaced(module, **{"0": other})
    assert replaced[0] is other and type(replaced[1]) is not Recorded  # type: ignore[index]
    assert type(module[0]) is nn.Linear


@torch.no_grad()
def test_parametrized_weights_are_computed_once() -> None:
    flow = made(CONFIGS["waveglow"])
    twin = TorchDecoder(flow)._flow
    assert not any(is_parametrized(module) for module in twin.modules())
    assert any(is_parametrized(module) for module in flow.modules())


@torch.no_grad()
def test_a_flow_without_weights() -> None:
    flow = Flow(Squeeze(4), channels=4).eval()
    z = flow.noise(3, [0])
    assert torch.equal(make_decoder(flow)(z, torch.zeros(1, 0, 3)), flow.decode(z))


# --- When a decoder is made anew ---


def _add_one(flow: Any) -> None:
    with torch.no_grad():
        flow.bijection[-1].weight.add_(1)


def _load(flow: Any) -> None:
    flow.load_state_dict(copy.deepcopy(flow.state_dict()))


def _replace_step(flow: Any) -> None:
    flow.bijection.steps[1] = copy.deepcopy(flow.bijection[1])


def _replace_weight(flow: Any) -> None:
    flow.bijection[-1].weight = nn.Parameter(flow.bijection[-1].weight.clone())


def _use_twice(flow: Any) -> None:
    """The same modules, in another order."""
    flow.bijection.steps[2] = flow.bijection[1]


def _other_map(flow: Any) -> None:
    """Another module with the same weights."""
    old = flow.bijection[1]
    flow.bijection.steps[1] = Coupling(old.network, Affine(bound=1.0), old.split)


def _fill_buffer(flow: Any) -> None:
    flow.conditioner.in_phase.cosine.zero_()


CHANGES = [_add_one, _load, _replace_step, _replace_weight, _use_twice, _other_map, _fill_buffer]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: Callable[[Flow], None]) -> None:
    flow = made(FRAMEGLOW)
    version = WeightsVersion(flow)
    assert version == WeightsVersion(flow)
    change(flow)
    assert version != WeightsVersion(flow)


# --- Compilation and padded lengths ---


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
def test_compiled_equals_eager_at_lengths_that_are_not_compiled_anew(packed: bool) -> None:
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
def test_a_compiler_is_given_an_operator(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights cannot be compiled."""
    layer = PackedLinear(torch.eye(3), torch.ones(3))
    if packed:
        layer._product = pytest.fail  # type: ignore[assignment]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(layer(torch.ones(2, 3)), 2 * torch.ones(2, 3))
