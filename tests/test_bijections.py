"""The contract of `bijections/base.py`, kept by every bijection, and what each adds to it."""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import N_FEATURES, SMALL
from torch import Tensor, nn

from waveflow.audio.mel import MelConfig
from waveflow.bijections import (
    ActNorm,
    Additive,
    Affine,
    AllActive,
    BatchNorm,
    Bijection,
    Chain,
    Condition,
    Coupling,
    EvenOdd,
    EveryNth,
    FactorOut,
    Halves,
    Inverse,
    InvertibleConv1x1,
    InvertibleConv1x1PLU,
    LappedSqueeze,
    MapCond,
    MixtureOfLogistics,
    OnChannels,
    OverChannels,
    OverTime,
    Permute,
    RationalQuadratic,
    Reverse,
    Squeeze,
    SqueezeCondition,
    check_bijection,
)
from waveflow.bijections.coupling import Split
from waveflow.bijections.elementwise import ElementwiseMap
from waveflow.context import context_of
from waveflow.errors import ConfigError, ContractError
from waveflow.models.frameglow import FrameGlowConfig, frameglow
from waveflow.models.registry import FlowConfig, build_flow
from waveflow.models.waveglow import WaveGlowConfig, waveglow
from waveflow.nn.causal_wavenet import CausalWaveNet
from waveflow.nn.made import MADE
from waveflow.nn.row_net import RowNet
from waveflow.nn.wavenet import WaveNet

BANDS = N_FEATURES  # channels of the features in every case
BATCH = 3


class Case(NamedTuple):
    build: Callable[[], Bijection]
    shape: tuple[int, int]  # C and L of x
    positions: int  # L of the condition
    shorter: tuple[int, int]  # valid positions of the condition in items 1 and 2 when padded


class Pointwise(nn.Module):
    """A network that only the features steer, for couplings without a passive part."""

    context = (0, 0)

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.layer = nn.Conv1d(BANDS, out_channels, 1)

    def forward(self, x: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        return self.layer(features)


class MapFeatures(nn.Module):
    """Features through a layer; the mask as it is."""

    context = (0, 0)

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, cond: Condition) -> Condition:
        return Condition(self.layer(cond.features), cond.mask)


def _coupling(map: ElementwiseMap, split: Split, channels: int = 4, bands: int = BANDS) -> Coupling:
    half = channels // 2
    return Coupling(WaveNet(half, bands, 4, map.n_params * half, n_layers=2), map, split)


def _small_waveglow() -> Bijection:
    config = WaveGlowConfig(
        n_mels=1,
        hop_length=4,
        n_flows=3,
        squeeze_factor=BANDS,
        n_early_every=2,
        n_layers=2,
        hidden_channels=4,
        upsample_kernel=8,
    )
    return waveglow(config).bijection


def _small_frameglow() -> Bijection:
    """Its couplings, under as many features as it wants from the four of a case."""
    config = FrameGlowConfig(
        n_levels=2, n_flows=2, hidden_channels=4, dilations=(1, 2), encoder_channels=4
    )
    mel = MelConfig(sample_rate=8000, n_fft=16, hop_length=4, win_length=16, n_mels=4, f_max=4000)
    features = nn.Conv1d(BANDS, 4 + 4 * mel.hop_length + mel.n_mels, 1)
    return MapCond(frameglow(config, mel).bijection, MapFeatures(features))


def _batch_norm() -> Bijection:
    """With averages that are not those of a fresh one."""
    bijection = BatchNorm(4)
    bijection.mean.copy_(torch.tensor([0.5, -1.0, 0.1, 2.0]))
    bijection.variance.copy_(torch.tensor([0.5, 2.0, 0.1, 3.0]))
    return bijection


def _model(config: FlowConfig, hop_length: int = 8) -> Bijection:
    """The bijection of a small model, whose features are those of a case."""
    mel = MelConfig(
        sample_rate=8000, n_fft=16, hop_length=hop_length, win_length=16, n_mels=4, f_max=4000
    )
    return build_flow(config, mel).bijection


def _vae() -> Any:
    return _model(SMALL["vae"][0])


CASES: dict[str, Case] = {
    "squeeze": Case(lambda: Squeeze(4), (2, 24), 6, (4, 1)),
    "lapped": Case(lambda: LappedSqueeze(4), (1, 24), 6, (4, 1)),
    "lapped_quadrature": Case(lambda: LappedSqueeze(6, quadrature=True), (1, 30), 5, (4, 1)),
    "permute": Case(lambda: Permute([2, 0, 3, 1]), (4, 6), 6, (4, 1)),
    "reverse": Case(lambda: Reverse(4), (4, 6), 6, (4, 1)),
    "conv1x1": Case(lambda: InvertibleConv1x1(4), (4, 6), 6, (4, 1)),
    "conv1x1_identity": Case(lambda: InvertibleConv1x1(4, "identity"), (4, 6), 6, (4, 1)),
    "conv1x1_plu": Case(lambda: InvertibleConv1x1PLU(4), (4, 6), 6, (4, 1)),
    "actnorm": Case(lambda: ActNorm(4), (4, 6), 6, (4, 1)),
    "additive_halves": Case(lambda: _coupling(Additive(), Halves()), (4, 6), 6, (4, 1)),
    "affine_halves": Case(lambda: _coupling(Affine(), Halves()), (4, 6), 6, (4, 1)),
    "affine_halves_swap": Case(lambda: _coupling(Affine(), Halves(swap=True)), (4, 6), 6, (4, 1)),
    "affine_even_odd": Case(lambda: _coupling(Affine(), EvenOdd()), (4, 6), 6, (4, 1)),
    "bounded_even_odd_swap": Case(
        lambda: _coupling(Affine(bound=2.0), EvenOdd(swap=True)), (4, 6), 6, (4, 1)
    ),
    "affine_all_active": Case(
        lambda: Coupling(Pointwise(8), Affine(), AllActive()), (4, 6), 6, (4, 1)
    ),
    "factor_out": Case(
        lambda: FactorOut(
            2,
            Chain(
                InvertibleConv1x1(6),
                _coupling(Affine(), Halves(), 6),
                FactorOut(2, _coupling(Affine(), EvenOdd(), 4)),
            ),
        ),
        (8, 4),
        4,
        (3, 1),
    ),
    "on_channels": Case(
        lambda: OnChannels(
            slice(1, None, 2), Chain(ActNorm(4), _coupling(Affine(), EvenOdd(swap=True)))
        ),
        (8, 4),
        4,
        (3, 1),
    ),
    "inverse": Case(lambda: Inverse(_coupling(Affine(), Halves())), (4, 6), 6, (4, 1)),
    "inverse_squeeze": Case(lambda: Inverse(Squeeze(4)), (8, 6), 6, (4, 1)),
    "chain": Case(
        lambda: Chain(
            LappedSqueeze(4),
            ActNorm(4),
            _coupling(Affine(), EvenOdd()),
            InvertibleConv1x1PLU(4),
            _coupling(Affine(bound=1.0), EvenOdd(swap=True)),
            Reverse(4),
        ),
        (1, 24),
        6,
        (4, 1),
    ),
    "map_cond": Case(
        lambda: MapCond(
            Chain(Squeeze(2), _coupling(Affine(), Halves(), 4, 2 * BANDS)), SqueezeCondition(2)
        ),
        (2, 8),
        8,
        (6, 2),
    ),
    "waveglow": Case(_small_waveglow, (1, 24), 6, (4, 1)),
    "frameglow": Case(_small_frameglow, (1, 24), 6, (4, 1)),
    "batch_norm": Case(_batch_norm, (4, 6), 6, (4, 1)),
    "spline": Case(lambda: _coupling(RationalQuadratic(4), Halves()), (4, 6), 6, (4, 1)),
    "mixture": Case(lambda: _coupling(MixtureOfLogistics(3), Halves()), (4, 6), 6, (4, 1)),
    "every_nth": Case(
        lambda: MapCond(Chain(Squeeze(2), _coupling(Affine(), Halves())), EveryNth(2)),
        (2, 8),
        8,
        (6, 2),
    ),
    "made_over_channels": Case(
        lambda: OverChannels(MADE(4, BANDS, 9, 2), Affine(), 4), (4, 6), 6, (4, 1)
    ),
    "rows_over_channels": Case(
        lambda: OverChannels(RowNet(4, BANDS, 3, 2, [1, 2]), Affine(), 4), (4, 6), 6, (4, 1)
    ),
    "wavenet_over_time": Case(
        lambda: OverTime(CausalWaveNet(1, BANDS, 4, 2, [1, 2]), Affine()), (1, 6), 6, (4, 1)
    ),
    **{
        name: Case(lambda c=config: _model(c), (1, 16), 16 // n, (8 // n, 8 // n))
        for name, (config, n) in SMALL.items()
        if name != "vae"
    },
    # A VAE draws its latents y; its maps of y and of (x, y) are bijections.
    "vae_posterior": Case(lambda: _vae()[2].posterior, (2, 4), 4, (3, 1)),
    "vae_joint": Case(lambda: _vae()[3:], (6, 4), 4, (3, 1)),
}
# What is a fixed map: no weights, and nothing of the condition but its mask enters.
FIXED = {"squeeze", "lapped", "lapped_quadrature", "permute", "reverse", "inverse_squeeze"}
UNCONDITIONAL = FIXED | {"conv1x1", "conv1x1_identity", "conv1x1_plu", "actnorm", "batch_norm"}


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def _make(
    name: str, dtype: torch.dtype = torch.float64, direction: str = "forward"
) -> tuple[Bijection, Tensor, Condition]:
    """A bijection with random weights, an input of the given direction and a condition."""
    torch.manual_seed(0)
    case = CASES[name]
    bijection = case.build().to(dtype).eval()
    with torch.no_grad():
        for weight in bijection.parameters():
            weight.add_(0.25 * torch.randn_like(weight))
    x = torch.randn(BATCH, *case.shape, dtype=dtype)
    cond = Condition(torch.randn(BATCH, BANDS, case.positions, dtype=dtype))
    if direction == "inverse":
        # Of the size of z, but not an image of some x that the test made.
        with torch.no_grad():
            x = torch.randn_like(bijection(x, cond)[0])
    return bijection, x, cond


def _call(bijection: Bijection, direction: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return bijection if direction == "forward" else bijection.inverse


both_directions = pytest.mark.parametrize("direction", ["forward", "inverse"])


@both_directions
@pytest.mark.parametrize("padded", [False, True])
def test_the_contract_is_kept(name: str, direction: str, padded: bool) -> None:
    """Round trip, log-determinants, leaks between items, padding with NaN, and the context."""
    bijection, x, cond = _make(name, direction=direction)
    if direction == "inverse":
        bijection = Inverse(bijection)
    if padded:
        cond = cond._replace(mask=_mask(CASES[name]))
    report = check_bijection(bijection, x, cond, tolerance=1e-8)
    assert report.round_trip < 1e-10
    if name not in FIXED | {"additive_halves"}:
        # Else a log_det of 0 would pass as well.
        assert bijection(x, cond)[1].abs().min() > 1e-3


@both_directions
def test_log_det_has_the_shape_of_the_batch_and_its_dtype(name: str, direction: str) -> None:
    bijection, x, cond = _make(name, direction=direction)
    z, log_det = _call(bijection, direction)(x, cond)
    assert log_det.shape == (BATCH,)
    assert z.dtype == log_det.dtype == torch.float64
    assert z.numel() == x.numel()


@both_directions
def test_gradients_reach_weights_and_features(name: str, direction: str) -> None:
    bijection, x, cond = _make(name, direction=direction)
    cond.features.requires_grad_()
    x.requires_grad_()
    z, log_det = _call(bijection, direction)(x, cond)
    (z.square().sum() + log_det.sum()).backward()
    reached: dict[str, Tensor] = dict(bijection.named_parameters())
    if name not in UNCONDITIONAL:
        reached["features"] = cond.features
    reached["x"] = x
    dead = [n for n, p in reached.items() if p.grad is None or not p.grad.any()]
    assert dead == []


@both_directions
def test_condition_is_not_changed(name: str, direction: str) -> None:
    bijection, x, cond = _make(name, direction=direction)
    cond = cond._replace(mask=_mask(CASES[name]))
    before = copy.deepcopy(cond)
    with torch.no_grad():
        _call(bijection, direction)(x, cond)
    assert torch.equal(cond.features, before.features)
    assert torch.equal(cond.mask, before.mask)  # type: ignore[arg-type]


def _mask(case: Case) -> Tensor:
    lengths = torch.tensor([case.positions, *case.shorter])
    return (torch.arange(case.positions) < lengths[:, None])[:, None].double()


@both_directions
def test_padded_items_get_what_they_get_alone(name: str, direction: str) -> None:
    """Whatever lies in the padding of x and of the features."""
    case = CASES[name]
    bijection, x, cond = _make(name, direction=direction)
    function = _call(bijection, direction)
    z, log_det = function(x, cond._replace(mask=_mask(case)))
    for item, valid in enumerate([case.positions, *case.shorter]):
        own_x = x[item : item + 1, :, : x.shape[2] * valid // case.positions]
        own_cond = Condition(cond.features[item : item + 1]).crop(valid)
        own_z, own_log_det = function(own_x, own_cond)
        length = own_z.shape[2]
        torch.testing.assert_close(z[item, :, :length], own_z[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(log_det[item], own_log_det[0], rtol=0, atol=1e-10)


def test_a_full_mask_is_no_mask(name: str) -> None:
    bijection, x, cond = _make(name)
    full = cond._replace(mask=torch.ones(BATCH, 1, CASES[name].positions, dtype=torch.float64))
    torch.testing.assert_close(bijection(x, full), bijection(x, cond), rtol=0, atol=1e-12)


def test_state_dict_carries_everything(name: str) -> None:
    bijection, x, cond = _make(name)
    torch.manual_seed(1)
    fresh = CASES[name].build().double().eval()
    fresh.load_state_dict(bijection.state_dict())
    assert torch.equal(fresh(x, cond)[0], bijection(x, cond)[0])
    z = bijection(x, cond)[0]
    assert torch.equal(fresh.inverse(z, cond)[0], bijection.inverse(z, cond)[0])


@both_directions
def test_autocast_keeps_signal_and_log_det_in_float32(name: str, direction: str) -> None:
    """Networks may run in bfloat16; what is summed, mixed or transformed does not."""
    bijection, x, cond = _make(name, torch.float32, direction)
    function = _call(bijection, direction)
    with torch.no_grad():
        exact, exact_log_det = function(x, cond)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z, log_det = function(x, cond)
    assert z.dtype == log_det.dtype == torch.float32
    # bfloat16 has 8 bits; only parameters that networks made may show it.
    tolerance = 1e-6 if name in UNCONDITIONAL else 0.2
    torch.testing.assert_close(z, exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(log_det, exact_log_det, rtol=tolerance, atol=tolerance)


def test_round_trip_in_float32(name: str) -> None:
    bijection, x, cond = _make(name, torch.float32)
    with torch.no_grad():
        again, _ = bijection.inverse(bijection(x, cond)[0], cond)
    torch.testing.assert_close(again, x, rtol=1e-4, atol=1e-4)


def _plain(split: Split) -> Coupling:
    """A coupling of 8 channels whose network is a layer of torch's."""
    return Coupling(nn.Conv1d(4, 8, 3, padding=1), Affine(), split)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Squeeze(4)(torch.zeros(1, 1, 10)), "cannot squeeze 10 positions by 4"),
        (lambda: LappedSqueeze(4)(torch.zeros(1, 1, 10)), "multiple of 4"),
        (lambda: LappedSqueeze(4)(torch.zeros(1, 2, 8)), r"takes \(B, 1, T\)"),
        (lambda: LappedSqueeze(5), "even"),
        (lambda: SqueezeCondition(2)(Condition(torch.zeros(1, 3, 5))), "by 2: not a multiple"),
        (lambda: Inverse(Squeeze(4))(torch.zeros(1, 6, 3)), "cannot unsqueeze 6 channels by 4"),
        (lambda: LappedSqueeze(4).inverse(torch.zeros(1, 6, 3)), "makes 4 bands, not 6"),
        (lambda: Permute(range(4))(torch.zeros(1, 5, 3)), r"\(B, 4, L\), and got \(1, 5, 3\)"),
        (lambda: ActNorm(1)(torch.zeros(1, 5, 3)), r"\(B, 1, L\), and got \(1, 5, 3\)"),
        (lambda: ActNorm(1).inverse(torch.zeros(1, 5, 3)), r"\(B, 1, L\), and got"),
        (lambda: InvertibleConv1x1(4)(torch.zeros(1, 5, 3)), r"\(B, 4, L\), and got \(1, 5, 3\)"),
        (lambda: InvertibleConv1x1PLU(4).inverse(torch.zeros(1, 5, 3)), r"\(B, 4, L\), and got"),
        (lambda: FactorOut(4, Chain())(torch.zeros(1, 4, 3)), r"n=4\) takes n of 4 channels out"),
        (lambda: FactorOut(2, Squeeze(3))(torch.zeros(1, 4, 3)), "end it with the inverse squeeze"),
        (lambda: OnChannels(slice(2), Squeeze(3))(torch.zeros(1, 4, 3)), "inverse squeeze"),
        (lambda: _plain(Halves())(torch.zeros(1, 1, 3)), "two channels or more, not 1"),
        (lambda: _plain(EvenOdd())(torch.zeros(1, 5, 3)), "even number of channels, not 5"),
        (lambda: Squeeze(0), "n must be 1 or more"),
        (lambda: Permute([0, 2]), "not a permutation"),
        (lambda: Permute([0, 0, 1]), "not a permutation"),
        (lambda: InvertibleConv1x1(4, "random"), "'orthogonal' or 'identity'"),
    ],
)
def test_wrong_sizes_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# check_bijection finds mistakes; a coupling takes any network


class WrongSign(Permute):
    """Its log-determinant is that of the other direction."""

    def __init__(self) -> None:
        super().__init__(range(4))
        self.norm = ActNorm(4)
        nn.init.normal_(self.norm.log_scale)

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = self.norm(x, cond)
        return z, -log_det

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        return self.norm.inverse(z, cond)


class OneForAll(ActNorm):
    """Its log-determinant is one number, not one for each item."""

    def _log_det(self, x: Tensor, cond: Condition | None, sign: int) -> Tensor:
        return super()._log_det(x, cond, sign).sum()


class NoTensor(ActNorm):
    """Its log-determinant is a Python number."""

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        return super().forward(x, cond)[0], 0.0  # type: ignore[return-value]


class Forgetful(ActNorm):
    """Its inverse undoes a part alone."""

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = super().inverse(z, cond)
        return x + 0.1, log_det


class Mean(nn.Module):
    """A network that looks at a mean, and says that it does not."""

    context = (0, 0)

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        return (x + x.mean(self.axis, keepdim=True)).tanh().repeat(1, 2, 1)


class Multiplied(nn.Module):
    """A network that masks by multiplication."""

    context = (1, 1)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(2, 4, 3, padding=1)

    def forward(self, x: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        return self.layer(x if mask is None else x * mask)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (WrongSign, r"WrongSign.forward: log_det is .*, the Jacobian says"),
        (lambda: OneForAll(4), r"log_det is \(\), not \(3,\)"),
        (lambda: NoTensor(4), r"NoTensor.forward: log_det is 0.0, not \(3,\)"),
        (lambda: Forgetful(4), r"inverse\(forward\(x\)\) differs from x by 0.1"),
        (lambda: Coupling(Mean(0), Affine(), Halves()), "depends on x of another item"),
        (lambda: Coupling(Mean(2), Affine(), Halves()), "depend on x in the padding"),
        (lambda: Coupling(Multiplied(), Affine(), Halves()), "NaN in the padding changes"),
    ],
)
def test_check_bijection_finds(build: Callable[[], Bijection], message: str) -> None:
    torch.manual_seed(0)
    mask = (torch.arange(6) < torch.tensor([[6], [4], [1]]))[:, None]
    cond = Condition(torch.randn(BATCH, BANDS, 6), mask)
    with pytest.raises(ContractError, match=message):
        check_bijection(build(), torch.randn(BATCH, 4, 6), cond)


def test_check_bijection_finds_a_context_that_is_too_small() -> None:
    network = WaveNet(2, BANDS, 4, 4, n_layers=2)
    coupling = Coupling(network, Affine(), Halves())
    nn.init.normal_(network.end.weight)
    x, cond = torch.randn(2, 4, 9), Condition(torch.randn(2, BANDS, 9))
    assert check_bijection(coupling, x, cond).context == (3, 3)

    class Short(WaveNet):
        context = (3, 2)  # type: ignore[assignment]

    network.__class__ = Short
    with pytest.raises(ContractError, match=r"context is declared as \(3, 2\), but .* \(3, 3\)"):
        check_bijection(coupling, x, cond)


@pytest.mark.parametrize("context", [1, (1, 0, 0), (-1, 0)])
def test_check_bijection_refuses_a_context_that_is_none(context: object) -> None:
    step = Permute([1, 0])
    step.context = context  # type: ignore[assignment]
    with pytest.raises(ContractError, match="declares the context"):
        check_bijection(step, torch.randn(1, 2, 4))


def test_check_bijection_finds_a_stream_that_forgets_too_much() -> None:
    torch.manual_seed(0)

    class Short(OverTime):
        stream_context = (3, 0)  # type: ignore[assignment]

    network = CausalWaveNet(1, BANDS, 4, 2, [1, 2])
    nn.init.normal_(network.leave.weight)
    x, cond = torch.randn(2, 1, 9), Condition(torch.randn(2, BANDS, 9))
    check_bijection(OverTime(network, Affine()), x, cond)
    with pytest.raises(ContractError, match="inverse_after 4 positions is not the inverse"):
        check_bijection(Short(network, Affine()), x, cond)


def test_a_network_of_too_few_parameters_is_refused() -> None:
    """It would broadcast, and the log-determinant would be wrong."""
    x = torch.randn(2, 8, 5)
    with pytest.raises(ValueError, match=r"makes \(2, 2, 5\) of \(2, 4, 5\); Affine.* \(2, 8, 5\)"):
        Coupling(nn.Conv1d(4, 2, 1), Affine(), Halves())(x)
    with pytest.raises(ValueError, match=r"makes \(2, 8, 3\)"):
        Coupling(nn.Conv1d(4, 8, 3), Affine(), Halves()).inverse(x)
    with pytest.raises(ValueError, match=r"condition has 4 positions, the signal .* 5"):
        _coupling(Affine(), Halves(), 8)(x, Condition(torch.randn(2, BANDS, 4)))


class Two(nn.Module):
    """A network that takes no mask."""

    context = (1, 1)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(2 + BANDS, 8, 3, padding=1), nn.Tanh(), nn.Conv1d(8, 4, 1)
        )

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        return self.layers(torch.cat([x, features], 1))


@pytest.mark.parametrize("network", [nn.Conv1d(2, 4, 3, padding=1), nn.Conv1d(2, 4, 1), Two()])
@pytest.mark.parametrize("padded", [False, True])
def test_a_coupling_gives_a_network_what_it_takes(network: nn.Module, padded: bool) -> None:
    """One, two or three arguments; without a mask, items of a padded batch go through alone."""
    mask = (torch.arange(6) < torch.tensor([[6], [4], [1]]))[:, None] if padded else None
    cond = Condition(torch.randn(BATCH, BANDS, 6), mask)
    coupling = Coupling(network, Affine(bound=2.0), Halves())
    check_bijection(coupling, torch.randn(BATCH, 4, 6), cond)


def test_recomputed_networks_have_the_same_gradients() -> None:
    torch.manual_seed(0)
    coupling = _coupling(Affine(), Halves())
    nn.init.normal_(coupling.network.end.weight)  # type: ignore[union-attr, arg-type]
    x, cond = torch.randn(2, 4, 6), Condition(torch.randn(2, BANDS, 6))
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    # Before, because the second pass stops as soon as it has all that is missing.
    coupling.network.register_forward_pre_hook(count)
    gradients = []
    for coupling.recompute in (False, True):
        calls = 0
        for direction in (coupling, coupling.inverse):
            coupling.zero_grad()
            z, log_det = direction(x, cond)
            (z.square().sum() + log_det.sum()).backward()
            gradients.append([p.grad.clone() for p in coupling.parameters()])  # type: ignore[union-attr]
        assert calls == (4 if coupling.recompute else 2)
    for kept, recomputed in ((0, 2), (1, 3)):
        for first, second in zip(gradients[kept], gradients[recomputed], strict=True):
            assert torch.equal(first, second)


# Context


def _context(module: nn.Module) -> tuple[float, float]:
    return tuple(context_of(module))  # type: ignore[return-value]


def test_contexts_of_torchs_layers() -> None:
    assert _context(nn.Conv1d(2, 2, 5, padding=2)) == (2, 2)
    assert _context(nn.Conv1d(2, 2, 3, dilation=4, padding="same")) == (4, 4)
    assert _context(nn.Conv1d(2, 2, 4, padding="same")) == (1, 2)
    assert _context(nn.Conv1d(2, 2, 3)) == (0, 2)
    assert _context(nn.Conv1d(2, 2, 3, padding=2)) == (2, 0)
    assert _context(nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 3, padding=1))) == (1, 1)
    assert _context(nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.GELU(), nn.Linear(2, 2)))
    assert _context(nn.GroupNorm(1, 2)) == (math.inf, math.inf)
    circular = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular")
    assert _context(circular) == (math.inf, math.inf)


def test_a_context_is_never_guessed() -> None:
    class Net(nn.Conv1d):
        """A subclass may look further than its base."""

    for unknown in (Net(1, 1, 1), nn.Conv1d(1, 1, 3, stride=2), nn.LSTM(1, 1), nn.Module()):
        with pytest.raises(ConfigError, match=f"{type(unknown).__name__} declares no context"):
            context_of(nn.Sequential(unknown))
    for wrong in ((1,), (1.5, 0), (-1, 0), "ab", 3):
        net = Net(1, 1, 1)
        net.context = wrong  # type: ignore[assignment]
        with pytest.raises(ConfigError, match="Net declares the context"):
            context_of(net)
    # A bijection of one's own that says nothing, inside a chain.
    with pytest.raises(ConfigError, match="Bijection declares no context"):
        _ = Chain(Squeeze(2), Bijection()).inverse_context


def test_contexts_add_up_through_chains_and_squeezes() -> None:
    def step(taps: int) -> Coupling:
        return Coupling(nn.Conv1d(1, 2, taps, padding=taps // 2), Affine(), Halves())

    assert Chain(step(3), step(5)).context == (3, 3)
    tied = step(3)
    assert Chain(*[tied] * 6).inverse_context == (6, 6)
    assert Chain(Squeeze(4), step(3)).context == (4, 4)
    assert Chain(Squeeze(4), step(3)).factor == 4
    whole = Chain(step(3), Squeeze(4), step(3), Squeeze(2), step(3), Inverse(Squeeze(8)))
    # From the audio side: 1, rounded up to a group of 4, then 4, which is a group of 8, then 8.
    assert whole.inverse_context == (16, 16)
    # From the noise side: 8, then 4, then 1.
    assert whole.context == (13, 13)
    assert (whole.factor, whole.block) == (1, 8)
    assert Chain(LappedSqueeze(6), step(3)).inverse_context == (12, 12)
    assert Inverse(Chain(Squeeze(4), step(3))).context == (1, 1)
    mapped = MapCond(step(3), nn.Conv1d(4, 4, 5, padding=2))
    assert mapped.context == mapped.inverse_context == (3, 3)
    unbounded = Coupling(nn.GroupNorm(1, 2), Affine(), Halves())
    assert Chain(Squeeze(2), step(3), unbounded).context == (math.inf, math.inf)


def test_a_chain_is_a_list() -> None:
    chain = Chain(Squeeze(4), InvertibleConv1x1(4), Reverse(4))
    assert len(chain) == 3 and chain[1].channels == 4 and chain[-1] is chain.steps[2]
    assert isinstance(chain[:2], Chain) and len(chain[:2]) == 2
    for words in ("Squeeze(n=4)", "InvertibleConv1x1(channels=4)", "Reverse(channels=4)"):
        assert words in repr(chain)
    assert "map=Affine(bound=2), split=Halves(swap=True)" in repr(
        Coupling(nn.Conv1d(1, 2, 1), Affine(bound=2.0), Halves(swap=True))
    )


# Condition, Squeeze, FactorOut, splits


def test_squeeze_takes_audio_in_groups_and_mels_band_by_band() -> None:
    audio = torch.arange(8.0)[None, None]
    assert Squeeze(4)(audio)[0][0].T.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    mel = torch.stack([torch.arange(4.0), torch.arange(10.0, 14.0)])[None]
    assert Squeeze(2)(mel)[0][0].T.tolist() == [[0, 1, 10, 11], [2, 3, 12, 13]]


@settings(deadline=None, derandomize=True, max_examples=30)
@given(n=st.integers(1, 7), channels=st.integers(1, 3), length=st.integers(1, 9))
def test_squeezes_compose(n: int, channels: int, length: int) -> None:
    """Squeezing by n and then by 2 keeps every sample, and undoes in the opposite order."""
    x = torch.randn(2, channels, 2 * n * length)
    chain = Chain(Squeeze(n), Squeeze(2))
    z, _ = chain(x)
    assert z.shape == (2, 2 * n * channels, length)
    assert torch.equal(z.flatten().sort()[0], x.flatten().sort()[0])
    assert torch.equal(chain.inverse(z)[0], x)


def test_squeezed_condition_is_valid_where_all_its_positions_are() -> None:
    mask = torch.tensor([[[1.0, 1, 1, 0, 0, 0]], [[1, 1, 1, 1, 1, 1]]])
    squeezed = SqueezeCondition(2)(Condition(torch.randn(2, 3, 6), mask))
    assert squeezed.features.shape == (2, 6, 3)
    assert squeezed.mask[:, 0].tolist() == [[1, 0, 0], [1, 1, 1]]


def test_condition_crops_and_repeats() -> None:
    cond = Condition(torch.randn(2, 3, 5), torch.ones(2, 1, 5))
    cropped = cond.crop(2)
    assert cropped.features.shape == (2, 3, 2)
    assert cropped.mask is not None and cropped.mask.shape == (2, 1, 2)
    repeated = cond.repeat(3)
    assert torch.equal(repeated.features[2:4], cond.features)
    assert repeated.mask is not None and repeated.mask.shape == (6, 1, 5)


def test_factored_channels_leave_first_and_unchanged() -> None:
    bijection, x, cond = _make("factor_out")
    z, _ = bijection(x, cond)
    assert torch.equal(z[:, :2], x[:, :2])
    assert not torch.equal(z[:, 2:4], x[:, 2:4])


@pytest.mark.parametrize("split", [Halves(), Halves(True), EvenOdd(), EvenOdd(True), AllActive()])
def test_split_and_merge(split: Split) -> None:
    x = torch.randn(2, 6, 5)
    passive, active = split.split(x)
    assert passive.shape[1] + active.shape[1] == 6
    assert torch.equal(split.merge(passive, active), x)


def test_passive_and_active_channels() -> None:
    x = torch.arange(4.0)[None, :, None]

    def active(split: Split) -> list[float]:
        return split.split(x)[1].flatten().tolist()

    assert active(Halves()) == [2, 3]
    assert active(Halves(swap=True)) == [0, 1]
    assert active(EvenOdd()) == [1, 3]
    assert active(EvenOdd(swap=True)) == [0, 2]


def test_bounded_scale_saturates_and_is_the_identity_for_small_values() -> None:
    x = torch.ones(1, 1, 3, dtype=torch.float64)
    params = torch.tensor([[[0.0, 0, 0], [1e3, -1e3, 1e-3]]], dtype=torch.float64)
    log_det = Affine(bound=2.0).forward(x, params)[1].flatten()
    expected = torch.tensor([2.0, -2.0, 1e-3], dtype=torch.float64)
    torch.testing.assert_close(log_det, expected, rtol=1e-6, atol=0)


def test_affine_is_exact_where_its_parameters_are_half_precision() -> None:
    torch.manual_seed(0)
    x, params = torch.randn(2, 3, 5), torch.randn(2, 6, 5).bfloat16()
    z, log_det = Affine(bound=3.0).forward(x, params)
    assert z.dtype == log_det.dtype == torch.float32
    torch.testing.assert_close(Affine(bound=3.0).inverse(z, params)[0], x, rtol=1e-5, atol=1e-6)


def test_all_active_coupling_is_a_conditional_gaussian_base() -> None:
    """log N(z) + log_det = log N(x; mean, std) with x = mean + std z, mean and std of cond."""
    bijection, x, cond = _make("affine_all_active")
    assert isinstance(bijection, Coupling)
    z, log_det = bijection(x, cond)
    shift, log_scale = bijection.network(x[:, :0], *cond).chunk(2, 1)
    std = (-log_scale).exp()
    expected = torch.distributions.Normal(-shift * std, std).log_prob(x).sum((1, 2))
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum((1, 2))
    torch.testing.assert_close(standard + log_det, expected)


# LappedSqueeze


def _matrix(squeeze: LappedSqueeze, n_blocks: int, cond: Condition | None = None) -> Tensor:
    """Row t is what a unit impulse at sample t becomes."""
    return squeeze(torch.eye(n_blocks * squeeze.n, dtype=torch.float64)[:, None], cond)[0].flatten(
        1
    )


def _assert_orthonormal(matrix: Tensor) -> None:
    gram = matrix @ matrix.T
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=gram.dtype), rtol=0, atol=1e-12)


@pytest.mark.parametrize("quadrature", [False, True])
@pytest.mark.parametrize("n", [2, 4, 10, 64])
@pytest.mark.parametrize("n_blocks", range(1, 10))
def test_lapped_squeeze_is_orthonormal(n: int, n_blocks: int, quadrature: bool) -> None:
    _assert_orthonormal(_matrix(LappedSqueeze(n, quadrature), n_blocks))


@pytest.mark.parametrize(("n", "n_blocks"), [(8, 150), (256, 3)])
def test_large_lapped_squeezes_are_orthonormal(n: int, n_blocks: int) -> None:
    _assert_orthonormal(_matrix(LappedSqueeze(n), n_blocks))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    half=st.integers(1, 20),
    n_blocks=st.integers(1, 12),
    valid=st.integers(1, 12),
    quadrature=st.booleans(),
    seed=st.integers(0, 999),
)
def test_lapped_squeeze_keeps_energy_and_the_item(
    half: int, n_blocks: int, valid: int, quadrature: bool, seed: int
) -> None:
    """With any mask: energy is kept, the inverse undoes it, the item is as if alone."""
    n, valid = 2 * half, min(valid, n_blocks)
    squeeze = LappedSqueeze(n, quadrature)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 1, n * n_blocks, generator=generator, dtype=torch.float64)
    mask = (torch.arange(n_blocks) < valid)[None, None].double()
    cond = Condition(torch.zeros(1, 1, n_blocks), mask)
    z, _ = squeeze(x, cond)
    torch.testing.assert_close(z.norm(), x.norm(), rtol=1e-12, atol=0)
    torch.testing.assert_close(squeeze.inverse(z, cond)[0], x, rtol=0, atol=1e-12)
    alone, _ = squeeze(x[..., : n * valid])
    torch.testing.assert_close(z[..., :valid], alone, rtol=0, atol=1e-12)


def test_a_mask_that_ends_changes_the_transform_at_its_edge() -> None:
    """Else the masked cases above would pass with a mask that is ignored."""
    x = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[[1.0, 1, 0, 0]]])
    z, _ = LappedSqueeze(4)(x, Condition(torch.zeros(1, 1, 4), mask))
    whole, _ = LappedSqueeze(4)(x)
    assert torch.equal(z[..., 0], whole[..., 0])
    assert (z[..., 1] - whole[..., 1]).abs().max() > 0.1


@pytest.mark.parametrize("n", [8, 32])
@pytest.mark.parametrize("quadrature", [False, True])
def test_inside_it_is_the_mdct_up_to_sign(n: int, quadrature: bool) -> None:
    """X[k] = sqrt(2/n) sum over m < 2n of w[m] x[m] cos(pi/n (m + 1/2 + n/2) (k + 1/2)).

    That is the quadrature transform; the plain one takes x[m] backwards.
    """
    x = torch.randn(5 * n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bands = LappedSqueeze(n, quadrature)(x[None, None])[0][0, :, 2]
    m = torch.arange(2 * n, dtype=torch.float64) + 0.5
    k = torch.arange(n, dtype=torch.float64) + 0.5
    window = (math.pi / (2 * n) * m).sin()
    basis = math.sqrt(2 / n) * (math.pi / n * torch.outer(k, m + n / 2)).cos()
    # Block 2 and half a block on each side.
    segment = window * x[2 * n - n // 2 : 3 * n + n // 2]
    mdct = basis @ (segment if quadrature else segment.flip(0))
    torch.testing.assert_close(bands.abs(), mdct.abs(), rtol=0, atol=1e-12)


class WrongRotation(LappedSqueeze):
    """Orthonormal too, but its rotations go the wrong way."""

    def _rotate(self, blocks: Tensor, cond: Condition | None, sign: int) -> Tensor:
        return super()._rotate(blocks, cond, -sign)


def _tone(n: int, band: int, phase: float, n_blocks: int = 20) -> Tensor:
    t = torch.arange(n * n_blocks, dtype=torch.float64)
    return (math.pi / n * (band + 0.5) * t + phase).cos()[None, None]


def _leak(squeeze: LappedSqueeze, band: int, phase: float) -> float:
    """The share of a tone's energy outside its band and the two neighbours, inside the signal."""
    energy = squeeze(_tone(squeeze.n, band, phase))[0][0, :, 2:-2].square().sum(1)
    return 1 - (energy[band - 1 : band + 2].sum() / energy.sum()).item()


@pytest.mark.parametrize("quadrature", [False, True])
@pytest.mark.parametrize("band", [5, 17, 28])
def test_each_channel_is_a_frequency_band(band: int, quadrature: bool) -> None:
    phases = [0.0, 0.7, math.pi / 2, 2.5]
    assert max(_leak(LappedSqueeze(32, quadrature), band, p) for p in phases) < 0.01
    # The bar has teeth: the wrong sign smears a tone over all bands.
    assert min(_leak(WrongRotation(32, quadrature), band, p) for p in phases) > 0.1


def test_the_quadrature_pair_gives_amplitude_without_phase() -> None:
    n, band = 32, 11
    phases = [2 * math.pi * i / 16 for i in range(16)]
    plain = torch.stack([LappedSqueeze(n)(_tone(n, band, p))[0][0, band, 2:-2] for p in phases])
    other = torch.stack(
        [LappedSqueeze(n, True)(_tone(n, band, p))[0][0, band, 2:-2] for p in phases]
    )
    power = plain.square() + other.square()
    # One alone swings between none and all of it; together they hold still.
    assert power.std() < 0.02 * power.mean()
    assert plain.square().std() > 0.5 * plain.square().mean()


# InvertibleConv1x1


@pytest.fixture(params=[InvertibleConv1x1, InvertibleConv1x1PLU])
def conv(request: pytest.FixtureRequest) -> InvertibleConv1x1:
    torch.manual_seed(0)
    conv = request.param(6)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return conv


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "load", "double"])
def test_the_inverse_follows_the_weights(conv: InvertibleConv1x1, change: str) -> None:
    conv.eval().inverse(torch.randn(2, 6, 5))
    if change == "in place":
        next(conv.parameters()).mul_(1.5)
    elif change == "load":
        conv.load_state_dict(type(conv)(6).state_dict())
    else:
        conv.double()
    x = torch.randn(2, 6, 5, dtype=next(conv.parameters()).dtype)
    tolerance = 1e-12 if change == "double" else 1e-4
    again = conv.inverse(conv(x)[0])[0]
    torch.testing.assert_close(again, x, rtol=0, atol=tolerance)


def test_gradients_pass_the_inverse(conv: InvertibleConv1x1) -> None:
    conv.eval().inverse(torch.randn(1, 6, 3))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in conv.parameters())


def test_a_negative_determinant_is_no_nan() -> None:
    conv = InvertibleConv1x1(2, "identity")
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
    log_det = conv(torch.randn(1, 2, 3))[1]
    torch.testing.assert_close(log_det, torch.tensor([3 * math.log(2)]))


def test_matrices_start_as_rotations() -> None:
    torch.manual_seed(0)
    for channels in range(1, 9):
        for kind in (InvertibleConv1x1, InvertibleConv1x1PLU):
            weight = kind(channels).matrix().detach()
            torch.testing.assert_close(weight @ weight.T, torch.eye(channels), rtol=0, atol=1e-5)
            assert torch.linalg.det(weight) > 0.99
    assert torch.equal(InvertibleConv1x1(3, "identity").weight, torch.eye(3))


# ActNorm


def _moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of (N, C)."""
    return z.mean(0), z.var(0, unbiased=False)


def test_actnorm_starts_from_its_first_batch_in_training() -> None:
    torch.manual_seed(0)
    norm = ActNorm(3).double()
    scale, offset = torch.tensor([[0.1], [2.0], [30.0]]), torch.tensor([[5.0], [-1.0], [0.0]])
    x = torch.randn(4, 3, 50, dtype=torch.float64) * scale + offset
    assert torch.equal(norm.eval()(x)[0], x)
    assert not norm.initialized
    z, log_det = norm.train()(x)
    mean, variance = _moments(z.transpose(1, 2).flatten(0, 1))
    torch.testing.assert_close(mean, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(variance, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(log_det, 50 * norm.log_scale.sum().expand(4))

    started = copy.deepcopy(norm.state_dict())
    norm(x * 7)
    assert all(torch.equal(started[k], v) for k, v in norm.state_dict().items())
    loaded = ActNorm(3).double().train()
    loaded.load_state_dict(started)
    assert torch.equal(loaded(x)[0], z)


def test_actnorm_starts_from_valid_positions_only() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 40, dtype=torch.float64) * 3 + 1
    mask = (torch.arange(40) < torch.tensor([[40], [10]]))[:, None].double()
    norm = ActNorm(3).double().train()
    padded = torch.where(mask.bool(), x, 1e3)
    z, _ = norm(padded, Condition(torch.zeros(2, 1, 40), mask))
    valid = torch.cat([z[0], z[1, :, :10]], 1).T
    mean, variance = _moments(valid)
    torch.testing.assert_close(mean, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(variance, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-10)


def test_actnorm_survives_a_silent_channel() -> None:
    z, log_det = ActNorm(2).train()(torch.zeros(1, 2, 8))
    assert z.isfinite().all()
    assert log_det.isfinite().all()


@pytest.mark.parametrize("map", [Affine(), Affine(bound=9.0), MixtureOfLogistics(4)], ids=repr)
def test_initial_parameters_bring_values_to_one(map: Affine | MixtureOfLogistics) -> None:
    x = 0.1 * torch.randn(1, 1, 10_000, generator=torch.Generator().manual_seed(0))
    params = map.initial(0.1)[None, :, None].expand(1, -1, x.shape[2])
    assert 0.8 < map.forward(x, params)[0].std() < 1.25


def test_components_of_a_mixture_do_not_start_alike() -> None:
    """Their gradients would be equal, and they would stay so."""
    map = MixtureOfLogistics(3)
    params = map.initial(0.1)[None, :, None].clone().requires_grad_()
    z, log_slope = map.forward(torch.full((1, 1, 1), 0.05), params)
    (0.5 * z.square() - log_slope).sum().backward()
    assert params.grad is not None
    for gradient in params.grad[0, :, 0].chunk(3):
        assert len(gradient.unique()) == 3
