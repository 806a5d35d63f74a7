"""WaveGlow in rows: the plain path's audio, for every configuration, length and batch."""

import copy
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from waveflow.audio.mel import MEL_PRESETS
from waveflow.bijections import Affine, Reverse, Squeeze
from waveflow.engine.decoder import make_decoder
from waveflow.engine.fast import product
from waveflow.engine.fast.low_rank import Steering, _factors
from waveflow.engine.fast.product import Product
from waveflow.engine.fast.rows import RowsWaveGlow, rows_of
from waveflow.errors import ConfigError
from waveflow.flow import Flow
from waveflow.metrics.spectral import signal_to_noise_db
from waveflow.models.frameglow import FrameGlowConfig, frameglow
from waveflow.models.waveglow import UpsampledMel, WaveGlowConfig, waveglow
from waveflow.nn.wavenet import WaveNet

# What the engine promises; rounding to float32 leaves 120 to 135 dB.
FLOAT32_DB = 110
TINY = WaveGlowConfig(
    n_mels=4,
    hop_length=16,
    n_flows=4,
    n_early_every=2,
    n_layers=3,
    hidden_channels=8,
    upsample_kernel=40,
)


def random_flow(config: WaveGlowConfig, seed: int = 0) -> Flow:
    """A WaveGlow whose couplings do something: log-scales and shifts of about 0.3."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        flow = waveglow(config).eval()
        for module in flow.modules():
            if isinstance(module, WaveNet):
                torch.nn.init.normal_(module.end.weight, std=0.6 * config.hidden_channels**-0.5)
                torch.nn.init.normal_(module.end.bias, std=0.1)
    return flow


def noise_and_mel(
    flow: Flow, n_mels: int, n_frames: int, n_items: int = 1
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n_frames)
    mel = 2 * torch.randn(n_items, n_mels, n_frames, generator=generator)
    return flow.noise(n_frames, seeds=range(n_items)), mel


def exact(flow: Flow, z: Tensor, mel: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The plain path in float64."""
    with torch.no_grad():
        return copy.deepcopy(flow).double().decode(z.double(), mel.double(), lengths)


def rows_decoder(flow: Flow, dtype: torch.dtype = torch.float32) -> RowsWaveGlow:
    rows = rows_of(flow)
    assert rows is not None
    return RowsWaveGlow(rows, dtype)


@st.composite
def configs(draw: st.DrawFn) -> WaveGlowConfig:
    squeeze_factor = draw(st.sampled_from([4, 8, 16]))
    n_positions = draw(st.integers(1, 5))
    hop_length = squeeze_factor * n_positions
    n_early_size = draw(st.sampled_from([2, 4]))
    n_early = (squeeze_factor - 1) // n_early_size
    n_early_every = draw(st.integers(1, 4))
    return WaveGlowConfig(
        n_mels=draw(st.integers(1, 5)),
        hop_length=hop_length,
        n_flows=draw(st.integers(1, min(6, n_early * n_early_every + 1))),
        squeeze_factor=squeeze_factor,
        n_early_every=n_early_every,
        n_early_size=n_early_size,
        n_layers=draw(st.integers(1, 5)),
        hidden_channels=draw(st.sampled_from([1, 6, 16])),
        kernel_size=draw(st.sampled_from([1, 3, 5])),
        conditioning=draw(st.sampled_from(["upsampled", "repeated"])),
        upsample_kernel=draw(st.integers(hop_length, 4 * hop_length)),
        alternate=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(config=configs(), n_frames=st.integers(1, 20))
def test_any_configuration_and_length(config: WaveGlowConfig, n_frames: int) -> None:
    flow = random_flow(config)
    z, mel = noise_and_mel(flow, config.n_mels, n_frames)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "onednn_pays", lambda *_: False)
        audio = rows_decoder(flow)(z, mel, sigma=0.5)
    assert audio.shape == (1, n_frames * config.hop_length)
    assert signal_to_noise_db(exact(flow, 0.5 * z, mel), audio) > FLOAT32_DB


@pytest.mark.parametrize("changes", [{}, {"conditioning": "repeated"}, {"kernel_size": 5}])
@pytest.mark.parametrize("n_frames", [1, 2, 70, 600])
@pytest.mark.parametrize("packed", [True, False], ids=["oneDNN", "torch's own"])
def test_borders_and_blocks(
    changes: dict[str, Any], n_frames: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shorter than the largest dilation, 128 of 2 rows; and more rows than a block has."""
    monkeypatch.setattr(product, "onednn_pays", lambda *_: packed)
    config = TINY.model_copy(update={"n_layers": 8, "n_flows": 2, **changes})
    flow = random_flow(config)
    z, mel = noise_and_mel(flow, config.n_mels, n_frames)
    assert signal_to_noise_db(exact(flow, z, mel), rows_decoder(flow)(z, mel)) > FLOAT32_DB


@pytest.mark.parametrize("conditioning", ["upsampled", "repeated"])
def test_padding_does_not_leak(conditioning: str) -> None:
    flow = random_flow(TINY.model_copy(update={"conditioning": conditioning}))
    decode = rows_decoder(flow)
    z, mel = noise_and_mel(flow, TINY.n_mels, n_frames=9, n_items=3)
    lengths = torch.tensor([4, 9, 1])
    reference = exact(flow, z, mel, lengths)
    for item, n_frames in enumerate(lengths):
        mel[item, :, n_frames:] = float("nan")
        z[item, :, 2 * n_frames :] = float("nan")
    audio = decode(z, mel, lengths)
    assert signal_to_noise_db(reference, audio) > FLOAT32_DB
    for item, n_frames in enumerate(lengths.tolist()):
        alone = decode(z[item, None, :, : 2 * n_frames], mel[item, None, :, :n_frames])
        assert torch.equal(audio[item, : 16 * n_frames], alone[0])
        assert not audio[item, 16 * n_frames :].any()


def test_bfloat16() -> None:
    """An error of 2^-9 in every weight and activation is 54 dB for one product."""
    flow = random_flow(TINY.model_copy(update={"hidden_channels": 32}))
    z, mel = noise_and_mel(flow, TINY.n_mels, n_frames=50)
    reference = exact(flow, z, mel)
    half = rows_decoder(flow, torch.bfloat16)(z, mel)
    assert half.dtype == torch.float32
    assert 40 < signal_to_noise_db(reference, half) < 70


@pytest.mark.parametrize(
    ("has_onednn", "dtype"), [(False, torch.float32), (True, torch.float16), (True, torch.float64)]
)
def test_without_onednn_torchs_own_products_are_taken(
    has_onednn: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU with bfloat16 may lack float16, and no oneDNN multiplies float64."""
    monkeypatch.setattr(product, "_HAS_ONEDNN", has_onednn)
    monkeypatch.setattr(product, "_shortest", lambda *_: [1.0, 2.0])
    assert not product._onednn_is_faster.__wrapped__(dtype, 1)


def test_small_singular_values_are_kept() -> None:
    """What is left out must not be heard at 100 dB."""
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(2, 6, 6, dtype=torch.float64))[0]
    matrix = left @ torch.diag(torch.tensor([1, 0.5, 1e-2, 1e-5, 0, 0]).double()) @ right
    first, second = _factors(matrix)
    assert first.shape == (6, 4)
    assert (first @ second - matrix).abs().max() < 1e-9


def test_a_waveglow_is_run_in_rows_on_a_cpu() -> None:
    flow = waveglow(WaveGlowConfig(n_flows=1, n_layers=1, hidden_channels=8)).eval()
    assert isinstance(make_decoder(flow), RowsWaveGlow)
    assert isinstance(make_decoder(flow, "bfloat16"), RowsWaveGlow)


@pytest.mark.parametrize("packed", [True, False], ids=["oneDNN", "torch's own"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_product(packed: bool, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "onednn_pays", lambda *_: packed)
    generator = torch.Generator().manual_seed(0)
    rows, other = (torch.randn(5, n, generator=generator) for n in (7, 3))
    weight, bias = torch.randn(3, 7, generator=generator), torch.randn(3, generator=generator)
    expected = rows @ weight.T + (bias if with_bias else 0)
    times = Product(weight, torch.float32, 2, bias if with_bias else None)
    assert times.packed == packed
    torch.testing.assert_close(times(rows), expected)
    torch.testing.assert_close(times.plus(rows, other.clone()), expected + other)


@pytest.mark.parametrize(("onednn", "packed"), [(0.95, True), (1.05, False)])
def test_the_faster_routine_is_taken(
    onednn: float, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "_shortest", lambda *_: [onednn, 1.0])
    # Without its cache.
    monkeypatch.setattr(product, "_onednn_is_faster", product._onednn_is_faster.__wrapped__)
    assert product.onednn_pays(torch.float32, product._LEAST_WORK) == packed
    assert not product.onednn_pays(torch.float32, product._LEAST_WORK - 1)


def test_a_probe_takes_the_shortest_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    durations = iter([9.0, 7.0, 3.0, 2.0] + 30 * [5.0, 8.0])

    def work() -> None:
        nonlocal now
        now += next(durations)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    assert product._shortest(work, work) == [3.0, 2.0]


def upsampled(weight: Tensor) -> tuple[Flow, UpsampledMel]:
    """TINY with this weight (M, M, taps) in its upsampler."""
    flow = random_flow(TINY.model_copy(update={"hop_length": 64, "upsample_kernel": 128}))
    conditioner = flow.conditioner
    assert isinstance(conditioner, UpsampledMel)
    conditioner.upsample.convolution.weight.data = weight
    return flow, conditioner


def check_rank(weight: Tensor, n_rows: int, n_columns: int) -> None:
    """Of 8 rows for each frame and 32 columns at full rank; and the audio is what it was."""
    flow, conditioner = upsampled(weight)
    z, mel = noise_and_mel(flow, TINY.n_mels, n_frames=10)
    rows = Steering(*conditioner.affine_map(), n_frames=10).rows(mel[0].T)
    assert rows.shape == (10 * n_rows, n_columns)
    assert signal_to_noise_db(exact(flow, z, mel), rows_decoder(flow)(z, mel)) > FLOAT32_DB


def test_upsampler_of_full_rank_is_left_as_it_is() -> None:
    weight = torch.randn(4, 4, 128, generator=torch.Generator().manual_seed(0))
    check_rank(weight, n_rows=8, n_columns=32)


def test_linear_interpolation_takes_two_rows_and_two_columns_for_a_band() -> None:
    """At each position an affine function of time, and so at each of the 8 samples of a group."""
    triangle = torch.cat([torch.arange(64) / 64, 1 - torch.arange(64) / 64])
    check_rank(torch.eye(4)[:, :, None] * triangle, n_rows=2, n_columns=8)


def test_bands_that_depend_on_each_other_take_fewer_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 2, 128, generator=generator)
    mix = torch.randn(2, 4, generator=generator)
    check_rank(torch.einsum("irt,ro->iot", weight, mix), n_rows=8, n_columns=16)


def test_an_upsampler_of_zeros_has_no_rank_to_compare_with() -> None:
    check_rank(torch.zeros(4, 4, 128), n_rows=8, n_columns=32)


def test_repeated_frames_take_one_row_each() -> None:
    flow = random_flow(TINY.model_copy(update={"conditioning": "repeated"}))
    steering = Steering(*flow.conditioner.affine_map(), n_frames=3)
    mel = torch.arange(12.0).reshape(3, 4)
    rows = steering.rows(mel)
    assert rows.shape == (3, 4)
    torch.testing.assert_close(steering.positions(rows), mel.repeat_interleave(2, 0))


def test_holds_the_weights_it_was_built_from() -> None:
    flow = random_flow(TINY)
    z, mel = noise_and_mel(flow, TINY.n_mels, n_frames=3)
    decode = rows_decoder(flow)
    before = decode(z, mel)
    for parameter in flow.parameters():
        parameter.data.mul_(1.1)
    assert torch.equal(decode(z, mel), before)
    assert signal_to_noise_db(exact(flow, z, mel), rows_decoder(flow)(z, mel)) > FLOAT32_DB


def test_other_flows_are_not_run_in_rows() -> None:
    config = FrameGlowConfig(n_flows=1, hidden_channels=16, encoder_channels=16, encoder_layers=1)
    assert rows_of(frameglow(config, MEL_PRESETS["hifigan"])) is None
    rows = rows_of(random_flow(TINY))
    assert rows is not None
    with pytest.raises(ConfigError, match="float16"):
        RowsWaveGlow(rows, torch.float16)


def subclass_of(value: Any) -> None:
    """Gives an object a class that is derived from its own, as a user's would be."""
    value.__class__ = type("Mine", (type(value),), {})


def changed_bound(flow: Any) -> None:
    flow.bijection[2].map = Affine(bound=1.0)


def changed_dilation(flow: Any) -> None:
    """Still a WaveNet of plain convolutions, so it is run in rows."""
    torch.manual_seed(1)
    flow.bijection[2].network.in_layers[0] = torch.nn.Conv1d(8, 16, 5, padding=18, dilation=9)


def dilated(*sizes: int, **settings: Any) -> Any:
    """Replaces a dilated convolution by one that rows do not know."""

    def change(flow: Any) -> None:
        flow.bijection[2].network.in_layers[0] = torch.nn.Conv1d(8, 16, *sizes, **settings)

    return change


def wide_end(flow: Any) -> None:
    flow.bijection[2].network.end = torch.nn.Conv1d(8, 8, 3, padding=1)


def another_squeeze(flow: Any) -> None:
    flow.bijection.steps[0] = Squeeze(4)


def another_step(flow: Any) -> None:
    flow.bijection.steps.insert(1, Reverse(8))


def a_step_behind(flow: Any) -> None:
    flow.bijection.steps.append(Reverse(8))


CHANGES = {
    "flow": lambda flow: subclass_of(flow),
    "conditioner": lambda flow: subclass_of(flow.conditioner),
    "upsampler": lambda flow: subclass_of(flow.conditioner.upsample),
    "upsampling convolution": lambda flow: subclass_of(flow.conditioner.upsample.convolution),
    "chain": lambda flow: subclass_of(flow.bijection),
    "squeeze": lambda flow: subclass_of(flow.bijection[0]),
    "convolution": lambda flow: subclass_of(flow.bijection[1]),
    "coupling": lambda flow: subclass_of(flow.bijection[2]),
    "network": lambda flow: subclass_of(flow.bijection[2].network),
    "map": lambda flow: subclass_of(flow.bijection[2].map),
    "split": lambda flow: subclass_of(flow.bijection[2].split),
    "factor out": lambda flow: subclass_of(flow.bijection[5]),
    "chain of a level": lambda flow: subclass_of(flow.bijection[5].rest),
    "end": lambda flow: subclass_of(flow.bijection[2].network.end),
    "bound": changed_bound,
    "groups": dilated(3, padding=1, groups=2),
    "padding": dilated(3),
    "padding mode": dilated(3, padding=1, padding_mode="reflect"),
    "even kernel": dilated(4, padding=2),
    "stride": dilated(3, padding=1, stride=2),
    "no bias": dilated(3, padding=1, bias=False),
    "wide end": wide_end,
    "another squeeze": another_squeeze,
    "another step": another_step,
    "a step behind": a_step_behind,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_part_is_not_run_in_rows(change: str) -> None:
    """Whatever is not exactly what the builder makes may compute something else."""
    flow = random_flow(TINY)
    assert rows_of(flow) is not None
    CHANGES[change](flow)
    assert rows_of(flow) is None


def test_other_weights_of_the_same_kind_are_run_in_rows() -> None:
    flow = random_flow(TINY)
    changed_dilation(flow)
    z, mel = noise_and_mel(flow, TINY.n_mels, n_frames=7)
    assert signal_to_noise_db(exact(flow, z, mel), rows_decoder(flow)(z, mel)) > FLOAT32_DB
