"""A model of one's own, outside the package, has all that ours have."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from toy_model import ToyConfig

import waveflow
from waveflow.audio.mel import MEL_PRESETS, MelConfig
from waveflow.bijections import Affine, Chain, Condition, Coupling, Halves, Squeeze
from waveflow.checkpoint import ModelConfig
from waveflow.cli.main import main
from waveflow.engine import streaming
from waveflow.engine.vocoder import Vocoder
from waveflow.errors import CheckpointError, ConfigError
from waveflow.flow import Flow
from waveflow.models import registry
from waveflow.models.registry import build_flow

pytestmark = pytest.mark.filterwarnings("ignore:.*were clipped")

MEL = MelConfig(sample_rate=8000, n_fft=64, hop_length=16, win_length=64, n_mels=5, f_max=4000.0)
RECIPE = """
mel = "hifigan"
[model]
type = "toy"
[train]
steps = 3
batch_size = 2
segment_frames = 8
validate_every = 3
"""


def build(**fields: bool) -> Vocoder:
    """A vocoder with random weights, far from the identity."""
    config = ToyConfig(**fields)  # type: ignore[arg-type]
    torch.manual_seed(0)
    flow = build_flow(config, MEL)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Vocoder(ModelConfig(model=config, mel=MEL), flow)


def random_mel(n_frames: int) -> Tensor:
    return torch.randn(5, n_frames, generator=torch.Generator().manual_seed(1))


def whole(vocoder: Vocoder, mel: Tensor) -> Tensor:
    with torch.no_grad():
        z = vocoder.flow.noise(mel.shape[1], [0])
        return vocoder.flow.decode(z, mel[None])[0].clamp(-1, 1)


def test_it_keeps_the_contract() -> None:
    flow = build().flow
    cond = Condition(torch.randn(2, 3, 8), (torch.arange(8) < torch.tensor([[8], [4]]))[:, None])
    report = waveflow.check_bijection(flow.bijection, torch.randn(2, 1, 32), cond)
    # By hand, in samples. Left: 2 groups of 4, 2 groups of 8, 2 groups of 4. Right: 1 group of 4,
    # then whole groups of 8, one of them more, and 1 group of 4.
    assert flow.bijection.inverse_context == (8 + 16 + 8, 8 + 8 + 4)
    assert report.inverse_context.left > 16


def test_windows_streams_and_batches_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a second squeeze inside, and a subclass of Coupling that no decoder replaces."""
    monkeypatch.setattr(streaming, "WINDOW_FRAMES", 10)
    vocoder, mel = build(), random_mel(61)
    expected = whole(vocoder, mel)
    torch.testing.assert_close(vocoder(mel), expected, rtol=0, atol=1e-5)
    pieces = list(vocoder.stream(mel.split(3, 1), least_frames=1))
    assert len(pieces) > 15
    torch.testing.assert_close(torch.cat(pieces), expected, rtol=0, atol=1e-5)
    audio, _ = vocoder(torch.stack([mel, mel]), lengths=[61, 22])
    short = whole(vocoder, mel[:, :22])
    torch.testing.assert_close(audio[1, : len(short)], short, rtol=0, atol=1e-5)


def test_without_a_declared_context_it_is_refused_by_name() -> None:
    vocoder, mel = build(declares=False), random_mel(4)
    with pytest.raises(ConfigError, match="ToyNetwork declares no context"):
        vocoder(mel)
    with pytest.raises(ConfigError, match="ToyNetwork declares no context"):
        vocoder.stream([mel])
    # What needs no context works.
    assert whole(vocoder, mel).shape == (64,)
    assert vocoder.log_prob(torch.zeros(64), mel).shape == (1,)


def test_it_trains_saves_loads_and_resumes(tiny_corpus: Path, tmp_path: Path) -> None:
    recipe, run = tmp_path / "toy.toml", tmp_path / "run"
    recipe.write_text(RECIPE)
    assert main(["train", str(recipe), "--data", str(tiny_corpus), "--out", str(run)]) == 0
    vocoder = waveflow.load(run)
    assert vocoder.config.model == ToyConfig()
    assert vocoder.folder is not None and vocoder.folder.parent == run
    assert vocoder(torch.full((80, 4), -8.0)).shape == (4 * 256,)
    recipe.write_text(RECIPE.replace("steps = 3", "steps = 5"))
    assert main(["train", str(recipe), "--out", str(run), "--resume"]) == 0
    assert main(["info", str(run)]) == 0


def test_training_refuses_a_model_that_could_never_speak(
    tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = tmp_path / "toy.toml", tmp_path / "run"
    recipe.write_text(RECIPE.replace('type = "toy"', 'type = "toy"\ndeclares = false'))
    assert main(["train", str(recipe), "--data", str(tiny_corpus), "--out", str(run)]) == 2
    assert "ToyNetwork declares no context" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"channels": 4}, r"4 samples a frame, the mel has 16: give Flow\(\.\.\., hop_length="),
        ({"hop_length": 16}, r"1 channels, its bijection squeezes by 4: give .* channels=4"),
    ],
)
def test_a_flow_that_does_not_fit_the_mel_is_refused(
    sizes: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def builder(config: ToyConfig, mel: MelConfig) -> Flow:
        return Flow(Chain(Squeeze(4)), **sizes)  # type: ignore[arg-type]

    monkeypatch.setitem(registry._registered, "toy", (ToyConfig, builder))
    with pytest.raises(ConfigError, match=message):
        build_flow(ToyConfig(), MEL)


def test_a_type_that_nobody_registered_is_named(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = tmp_path / "toy.toml", tmp_path / "run"
    recipe.write_text(RECIPE)
    assert main(["train", str(recipe), "--data", str(tiny_corpus), "--out", str(run)]) == 0
    monkeypatch.delitem(registry._registered, "toy")
    with pytest.raises(CheckpointError, match="type 'toy' is registered by no model here"):
        waveflow.load(run)


class Decode(nn.Module):
    """The other direction as a module, for exporters."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, z: Tensor, mel: Tensor) -> Tensor:
        return self.flow.decode(z, mel)


def inputs(flow: Flow, n_mels: int) -> tuple[Tensor, Tensor]:
    mel = torch.randn(1, n_mels, 12, generator=torch.Generator().manual_seed(2))
    return flow.noise(12, [0]), mel


@torch.no_grad()
def check_exports(flow: Flow, n_mels: int, strict: bool) -> None:
    z, mel = inputs(flow, n_mels)
    audio = flow.decode(z, mel)
    exported = torch.export.export(Decode(flow), (z, mel), strict=strict).module()
    torch.testing.assert_close(exported(z, mel), audio, rtol=0, atol=1e-5)
    exported = torch.export.export(flow, (audio, mel), strict=strict).module()
    torch.testing.assert_close(exported(audio, mel), flow(audio, mel))


@torch.no_grad()
def check_compiles(flow: Flow, n_mels: int) -> None:
    """By dynamo; the code generator behind it needs a C++ compiler (tests marked slow)."""
    torch._dynamo.reset()
    z, mel = inputs(flow, n_mels)
    audio = flow.decode(z, mel)
    decode = torch.compile(Decode(flow), fullgraph=True, backend="eager")
    torch.testing.assert_close(decode(z, mel), audio, rtol=0, atol=1e-5)
    density = torch.compile(flow, fullgraph=True, backend="eager")
    torch.testing.assert_close(density(audio, mel), flow(audio, mel))


@pytest.mark.parametrize("strict", [False, True])
def test_it_can_be_exported(strict: bool) -> None:
    check_exports(build().flow, 5, strict)


def test_it_compiles_into_one_graph() -> None:
    check_compiles(build().flow, 5)


@pytest.mark.slow  # a minute of tracing
def test_the_shipped_model_can_be_exported_and_compiled() -> None:
    for strict in (False, True):
        check_exports(waveflow.load().flow, 80, strict)
    check_compiles(waveflow.load().flow, 80)


def test_fake_tensors_leave_nothing_behind() -> None:
    """A pass with fake tensors, as exporters make it, and then a real one in the same process."""
    mel_of = waveflow.MelSpectrogram(MEL_PRESETS["hifigan"])
    flow = waveflow.load().flow
    audio = torch.randn(1, 2560, generator=torch.Generator().manual_seed(3))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        flow(mode.from_tensor(audio), mel_of(mode.from_tensor(audio)))
    assert torch.isfinite(flow(audio, mel_of(audio))).all()


def test_two_moons() -> None:
    """Toy data are audio of two samples; a plain layer is a coupling's network."""
    torch.manual_seed(0)
    angle, upper = 3.14159 * torch.rand(512), torch.rand(512) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    moons = torch.stack([x, y], 1) + 0.05 * torch.randn(512, 2)

    def network() -> nn.Module:
        return nn.Sequential(nn.Conv1d(1, 32, 1), nn.Tanh(), nn.Conv1d(32, 2, 1))

    steps = [Coupling(network(), Affine(bound=2.0), Halves(swap=k % 2 == 1)) for k in range(6)]
    flow = Flow(Chain(Squeeze(2), *steps), channels=2)
    before = flow(moons).mean().item()
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        (-flow(moons).mean()).backward()
        optimizer.step()
    assert flow(moons).mean().item() > before + 0.3
    draws = flow.sample(n_items=300, seed=1)
    assert draws.shape == (300, 2) and len(draws.unique(dim=0)) == 300
    # Draws lie near the moons, not where the Gaussian was.
    nearest = torch.cdist(draws, moons).amin(1)
    assert nearest.median() < 0.1
    twin = copy.deepcopy(flow)
    assert torch.equal(twin(moons), flow(moons))
