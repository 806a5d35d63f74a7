"""WaveGlow: parity with the published code, sizes, config, training.

The fixtures hold numbers computed with NVIDIA/waveglow (commit 8afb643) from small random
models. Tolerances: three to twenty times the measured float32 rounding of the reference itself
(differences from its float64 recomputation), which leaves room for another summation order.
"""

import json
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import pytest
import torch
from conftest import encode_with_terms, latent, published_loss, upsample_weight
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from waveflow.bijections import Chain, Coupling, InvertibleConv1x1, InvertibleConv1x1PLU
from waveflow.errors import CheckpointError
from waveflow.flow import Flow
from waveflow.foreign.nvidia import from_nvidia, load_nvidia_state_dict, nvidia_names
from waveflow.models.waveglow import WaveGlowConfig, waveglow
from waveflow.nn.wavenet import WaveNet

FIXTURES = Path(__file__).parent / "fixtures"
TINY = WaveGlowConfig(
    n_mels=4,
    hop_length=16,
    n_flows=4,
    n_early_every=2,
    n_layers=2,
    hidden_channels=8,
    upsample_kernel=32,
)


class Published(NamedTuple):
    config: WaveGlowConfig
    state_dict: dict[str, Tensor]
    reference: dict[str, Tensor]

    def flow(self) -> Flow:
        return from_nvidia(self.state_dict, self.config)


def _read(name: str) -> Published:
    folder = FIXTURES / name
    sizes = json.loads((folder / "config.json").read_text())["waveglow_config"]
    config = WaveGlowConfig(
        n_mels=sizes["n_mel_channels"],
        n_flows=sizes["n_flows"],
        squeeze_factor=sizes["n_group"],
        n_early_every=sizes["n_early_every"],
        n_early_size=sizes["n_early_size"],
        n_layers=sizes["WN_config"]["n_layers"],
        hidden_channels=sizes["WN_config"]["n_channels"],
        kernel_size=sizes["WN_config"]["kernel_size"],
    )
    state_dict = load_file(folder / "state_dict.safetensors")
    with np.load(folder / "reference.npz", allow_pickle=False) as arrays:
        if "upsample_factor_a" in arrays:
            state_dict["upsample.weight"] = upsample_weight(arrays)
        reference = {k: torch.from_numpy(v) for k, v in arrays.items() if v.dtype.kind in "fi"}
        reference["grad_names"] = list(arrays["grad_names"])  # type: ignore[assignment]
    return Published(config, state_dict, reference)


@pytest.fixture(scope="module", params=["nvidia-waveglow-small", "nvidia-waveglow-80mel"])
def published(request: pytest.FixtureRequest) -> Published:
    return _read(request.param)


@pytest.fixture(scope="module")
def small() -> Published:
    return _read("nvidia-waveglow-small")


def test_z_and_log_determinants_are_the_published_ones(published: Published) -> None:
    reference = published.reference
    z, log_s, log_det = encode_with_terms(published.flow(), reference["audio"], reference["mel"])
    torch.testing.assert_close(z, reference["z"], rtol=0, atol=1e-5)
    torch.testing.assert_close(log_s, reference["log_s_sum_per_item"], rtol=1e-6, atol=2e-3)
    torch.testing.assert_close(log_s.sum(1), reference["log_s_sum"], rtol=1e-6, atol=2e-3)
    torch.testing.assert_close(log_det.sum(1), reference["log_det_W"], rtol=0, atol=3e-3)


def test_log_determinants_in_float64(published: Published) -> None:
    reference = published.reference
    _, log_s, log_det = encode_with_terms(
        published.flow().double(), reference["audio"].double(), reference["mel"].double()
    )
    # Both sides are float64 sums of at most 2e4 terms of order 1: 1e-9 is far above rounding.
    torch.testing.assert_close(log_s.sum(1), reference["f64_log_s_sum"], rtol=0, atol=1e-9)
    torch.testing.assert_close(log_det.sum(1), reference["f64_log_det_W"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("dtype", "prefix", "tolerance"), [(torch.float32, "", 1e-6), (torch.float64, "f64_", 1e-12)]
)
def test_loss(published: Published, dtype: torch.dtype, prefix: str, tolerance: float) -> None:
    reference = published.reference
    flow = published.flow().to(dtype)
    audio, mel = reference["audio"].to(dtype), reference["mel"].to(dtype)
    for name, sigma in (("1", 1.0), ("07071", 0.7071)):
        loss = published_loss(flow, audio, mel, sigma)
        expected = reference[f"{prefix}loss_sigma_{name}"].to(dtype)
        torch.testing.assert_close(loss, expected, rtol=0, atol=tolerance)


def test_gradients(published: Published) -> None:
    reference = published.reference
    flow = published.flow()
    (-flow(reference["audio"], reference["mel"]).mean()).backward()
    own = dict(flow.named_parameters())
    gradients = {
        name: cast(Tensor, own[own_name].grad) for name, own_name in nvidia_names(flow).items()
    }
    assert gradients.keys() == {str(name) for name in reference["grad_names"]}

    norms = torch.stack([gradients[str(name)].norm() for name in reference["grad_names"]])
    torch.testing.assert_close(norms, reference["grad_norms"], rtol=2e-5, atol=1e-9)
    stored = {
        f"convinv.{k}.conv.weight": reference[f"grad_convinv_{k}"]
        for k in range(published.config.n_flows)
    }
    for kind in ("end.weight", "start.weight_g", "start.weight_v"):
        stored[f"WN.0.{kind}"] = reference[f"grad_WN0_{kind.replace('.', '_')}"]
    for name, expected in stored.items():
        difference = (gradients[name].reshape(expected.shape) - expected).norm()
        assert difference < 2e-5 * expected.norm(), name


@pytest.mark.parametrize(("name", "sigma"), [("0666", 0.666), ("1", 1.0), ("0", 0.0)])
def test_synthesis_from_stored_noise(published: Published, name: str, sigma: float) -> None:
    reference = published.reference
    flow = published.flow()
    z = sigma * latent(reference)
    with torch.no_grad():
        audio = flow.decode(z, reference["infer_mel"])
        again = flow.encode(audio, reference["infer_mel"])
    torch.testing.assert_close(audio, reference[f"infer_audio_sigma_{name}"], rtol=0, atol=3e-5)
    torch.testing.assert_close(again, z, rtol=0, atol=3e-5)


def test_audio_that_is_no_whole_number_of_groups(small: Published) -> None:
    reference = small.reference
    audio = reference["ragged_audio"][:, :3000]  # 3005 samples: the last 5 make no group
    z, log_s, log_det = encode_with_terms(small.flow(), audio, reference["ragged_mel"])
    torch.testing.assert_close(z, reference["ragged_z"], rtol=0, atol=1e-5)
    torch.testing.assert_close(log_s[:, 0], reference["ragged_log_s_sum"], rtol=1e-6, atol=2e-3)
    torch.testing.assert_close(log_det[:, 0], reference["ragged_log_det_W"], rtol=0, atol=3e-3)


def test_intermediate_values(small: Published) -> None:
    """Where parity breaks: mel order, audio order, the first matrix, the first network."""
    reference = small.reference
    flow = small.flow()
    cond = flow.condition(reference["mel"]).crop(1250)
    squeeze, conv, coupling = cast(Chain, flow.bijection).steps[:3]
    heads = {}
    with torch.no_grad():
        heads["cond"] = cond.features
        heads["group"] = squeeze(reference["audio"][:, None])[0]
        heads["conv1x1_0"] = conv(heads["group"])[0]
        network = cast(Coupling, coupling).network
        heads["wn0_out"] = network(heads["conv1x1_0"][:, :4], *cond)
    for name, value in heads.items():
        expected = reference[f"debug_{name}_head"]
        torch.testing.assert_close(value[..., :4], expected, rtol=0, atol=1e-5, msg=name)


def test_speech_survives_the_round_trip(small: Published) -> None:
    """audio -> z -> audio in float32, on the speech of the fixture."""
    reference = small.reference
    flow = small.flow()
    with torch.no_grad():
        z = flow.encode(reference["audio"], reference["mel"])
        audio = flow.decode(z, reference["mel"])
    assert (audio - reference["audio"]).abs().max() < 1e-4


def test_sizes_of_the_published_model() -> None:
    """87.9 M parameters; 12 flows see 255 groups of 8 samples on each side."""
    with torch.device("meta"):
        flow = waveglow(WaveGlowConfig())
    assert sum(p.numel() for p in flow.parameters()) == 87_879_272
    networks = [m for m in flow.modules() if isinstance(m, WaveNet)]
    assert [n.context for n in networks] == [(255, 255)] * 12
    channels = [m.weight.shape[0] for m in flow.modules() if isinstance(m, InvertibleConv1x1)]
    assert channels == [8] * 4 + [6] * 4 + [4] * 4


def test_receptive_field_is_what_the_jacobian_shows() -> None:
    torch.manual_seed(0)
    network = WaveNet(2, 3, 4, 2, n_layers=3, kernel_size=5).double()
    torch.nn.init.normal_(network.end.weight)
    x = torch.randn(1, 2, 101, dtype=torch.float64, requires_grad=True)
    network(x, torch.randn(1, 3, 101, dtype=torch.float64))[0, :, 50].sum().backward()
    seen = x.grad[0].abs().sum(0).nonzero()[:, 0]  # type: ignore[index]
    assert network.context == (2 * (1 + 2 + 4),) * 2
    assert (seen[0], seen[-1]) == (50 - 14, 50 + 14)


def test_a_new_model_is_volume_preserving() -> None:
    """`end` starts at zero and the matrices are rotations: log_det is 0, |z| = |x|."""
    torch.manual_seed(0)
    flow = waveglow(TINY).double()
    audio = torch.randn(2, 64, dtype=torch.float64)
    mel = torch.randn(2, 4, 4, dtype=torch.float64)
    z, log_det = flow.bijection(audio[:, None], flow.condition(mel))
    # The matrices are orthogonal to float32 only (their QR): 4 flows of 16 positions.
    torch.testing.assert_close(log_det, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.norm(), audio.norm(), rtol=1e-6, atol=0)
    matrices = [m.weight for m in flow.modules() if isinstance(m, InvertibleConv1x1)]
    assert all(abs(torch.linalg.det(w) - 1) < 1e-5 for w in matrices)


@pytest.mark.parametrize("plu", [False, True])
def test_a_tiny_model_learns_one_batch(plu: bool) -> None:
    torch.manual_seed(0)
    flow = waveglow(TINY)
    if plu:
        _use_plu(flow)
    mel = torch.randn(4, 4, 16)
    envelope = mel[:, 0].exp().repeat_interleave(16, 1)
    audio = 0.1 * envelope * torch.randn(4, 256)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = -flow(audio, mel).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # A new flow keeps volume; scaling noise of level 0.1 to level 1 alone is worth 2.3 nats.
    assert losses[-1] < losses[0] - 1.0
    with torch.no_grad():
        again = flow.decode(flow.encode(audio, mel), mel)
    assert (again - audio).abs().max() < 1e-4


def _use_plu(flow: Flow) -> None:
    for chain in [m for m in flow.modules() if isinstance(m, Chain)]:
        for i, step in enumerate(chain.steps):
            if isinstance(step, InvertibleConv1x1):
                chain.steps[i] = InvertibleConv1x1PLU(step.weight.shape[0])


def test_a_padded_batch_gives_each_item_what_it_gets_alone(small: Published) -> None:
    flow = small.flow().double()
    torch.manual_seed(0)
    audio = torch.randn(2, 5 * 256, dtype=torch.float64)
    mel = torch.randn(2, 4, 5, dtype=torch.float64)
    lengths = torch.tensor([5, 3])
    with torch.no_grad():
        batch = flow(audio, mel, lengths)
        z = flow.encode(audio, mel, lengths)
        for item, frames in enumerate(lengths.tolist()):
            own_audio = audio[item : item + 1, : 256 * frames]
            own_mel = mel[item : item + 1, :, :frames]
            torch.testing.assert_close(batch[item], flow(own_audio, own_mel)[0])
            torch.testing.assert_close(
                z[item, :, : 32 * frames], flow.encode(own_audio, own_mel)[0]
            )


def test_what_lies_in_the_padding_of_a_mel_does_not_enter() -> None:
    torch.manual_seed(0)
    flow = waveglow(TINY)
    mel, lengths = torch.randn(2, 4, 5), torch.tensor([5, 3])
    expected = flow.condition(mel, lengths)
    mel[1, :, 3:] = 1e6
    cond = flow.condition(mel, lengths)
    assert torch.equal(cond.features, expected.features)
    assert cond.mask is not None
    assert cond.mask.sum((1, 2)).tolist() == [5 * 16 // 8, 3 * 16 // 8]


def test_weights_of_another_configuration_are_refused(small: Published) -> None:
    wider = small.config.model_copy(update={"hidden_channels": 12})
    with pytest.raises(CheckpointError, match=r"has shape .* needs"):
        from_nvidia(small.state_dict, wider)
    deeper = small.config.model_copy(update={"n_layers": 4})
    with pytest.raises(CheckpointError, match="tensors are missing"):
        from_nvidia(small.state_dict, deeper)
    flow = small.flow()
    with pytest.raises(CheckpointError, match="belong to no layer"):
        load_nvidia_state_dict(flow, {**small.state_dict, "stray": torch.zeros(1)})


def test_couplings_follow_the_paper(small: Published) -> None:
    """Flow k: [early output], 1x1 convolution, coupling, in this order."""
    kinds = [type(m).__name__ for m in small.flow().bijection.modules()]
    wanted = ("FactorOut", "InvertibleConv1x1", "Coupling")
    two = ["InvertibleConv1x1", "Coupling"] * 2
    assert [k for k in kinds if k in wanted] == [*two, "FactorOut", *two, "FactorOut", *two]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"squeeze_factor": 7}, "even"),
        ({"n_early_size": 1}, "even"),
        ({"n_early_every": 1}, "early outputs would take 22 of 8"),
        ({"hop_length": 250}, "multiple of squeeze_factor"),
        ({"kernel_size": 2}, "odd"),
        ({"upsample_kernel": 200}, "reach over the hop"),
        ({"n_layers": 0}, "greater than 0"),
        ({"n_channels": 256}, "Extra inputs are not permitted"),
    ],
)
def test_config_says_what_is_wrong(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        WaveGlowConfig(**fields)  # type: ignore[arg-type]


def test_config_survives_json() -> None:
    assert WaveGlowConfig.model_validate_json(TINY.model_dump_json()) == TINY


@pytest.mark.parametrize("fields", [{"conditioning": "repeated"}, {"alternate": True}])
def test_the_other_layouts_are_invertible_and_differ(fields: dict[str, object]) -> None:
    flow = waveglow(TINY.model_copy(update=fields)).double()
    plain = waveglow(TINY).double()
    generator = torch.Generator().manual_seed(5)
    for parameter in (*flow.parameters(), *plain.parameters()):
        parameter.data = 0.3 * torch.randn(
            parameter.shape, generator=generator, dtype=torch.float64
        )
    mel = torch.randn(1, TINY.n_mels, 6, generator=generator, dtype=torch.float64)
    audio = torch.randn(1, 6 * TINY.hop_length, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        z = flow.encode(audio, mel)
        assert (flow.decode(z, mel) - audio).abs().max() < 1e-8
        assert (plain.encode(audio, mel) - z).abs().max() > 1e-3
