"""Reversible training: the gradients of ordinary training, in memory constant in the depth."""

import json
import logging
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_bijections import BANDS, BATCH, CASES, Case
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from waveflow.audio.mel import MelConfig
from waveflow.bench.training_cost import TrainingStep, peak_bytes, training_cost
from waveflow.bijections import (
    ActNorm,
    Affine,
    Chain,
    Condition,
    Coupling,
    Halves,
    Inverse,
    InvertibleConv1x1,
    Reversible,
)
from waveflow.bijections.base import record_log_dets
from waveflow.bijections.reversible import record_drift
from waveflow.cli import bench_training
from waveflow.cli.main import main
from waveflow.flow import Flow
from waveflow.models.frameglow import FrameGlowConfig
from waveflow.models.registry import build_flow
from waveflow.models.waveglow import WaveGlowConfig, waveglow
from waveflow.nn.wavenet import WaveNet
from waveflow.training import memory
from waveflow.training.compile import compile_networks
from waveflow.training.config import Recipe, TrainConfig
from waveflow.training.losses import SpectralDistance, objectives
from waveflow.training.memory import choose_reversible, drift_logged, kept_bytes

CPU = torch.device("cpu")
# Few mels and channels, all of the paper's 12 flows and two early outputs.
WAVEGLOW = WaveGlowConfig(
    n_mels=8, hop_length=32, n_layers=2, hidden_channels=8, upsample_kernel=64
)
MEL = MelConfig(sample_rate=8000, n_fft=256, hop_length=64, win_length=256, n_mels=20, f_max=4000.0)
FRAMEGLOW = FrameGlowConfig(
    n_levels=1,
    n_flows=2,
    hidden_channels=8,
    dilations=(1,),
    encoder_channels=8,
    encoder_layers=1,
)


def randomised(module: nn.Module, spread: float = 0.05) -> None:
    """Couplings start as the identity, with which anything would pass."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(spread * torch.randn_like(weight))


def deep(dtype: torch.dtype = torch.float32) -> Flow:
    torch.manual_seed(0)
    flow = waveglow(WAVEGLOW)
    randomised(flow)
    return flow.to(dtype)


def gradients(
    flow: Flow, reversible: bool, autocast: bool = False, model: nn.Module | None = None
) -> dict[str, Tensor]:
    """Of the likelihood of noise, by parameter; `model` is called, the flow or what wraps it."""
    flow.reversible = reversible
    flow.zero_grad()
    generator = torch.Generator().manual_seed(1)
    dtype = next(flow.parameters()).dtype
    audio = torch.randn(2, 16 * 32, generator=generator).to(dtype)
    mel = torch.randn(2, 8, 16, generator=generator).to(dtype)
    call = flow if model is None else model
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = -call(audio, mel).mean()
    loss.backward()
    return {n: p.grad.clone() for n, p in flow.named_parameters() if p.grad is not None}


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative error of a parameter's gradient."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs)


# --- gradients ---


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("padded", [False, True])
def test_every_bijection_gets_the_gradients_of_autograd(
    case: Case, direction: str, padded: bool
) -> None:
    """Of z, log_det and recorded volumes, to x, features and parameters, in both directions."""
    torch.manual_seed(0)
    plain = case.build().double()
    randomised(plain, 0.25)
    x = torch.randn(BATCH, *case.shape, dtype=torch.float64)
    features = torch.randn(BATCH, BANDS, case.positions, dtype=torch.float64)
    lengths = torch.tensor([case.positions, *case.shorter])
    mask = (torch.arange(case.positions) < lengths[:, None])[:, None].double()
    cond = Condition(features, mask if padded else None)
    with torch.no_grad():
        x = plain(x, cond)[0] if direction == "inverse" else x
    results = []
    for bijection in (plain, Reversible(plain)):
        leaves = [x.clone().requires_grad_(), features.clone().requires_grad_()]
        function = bijection if direction == "forward" else bijection.inverse
        with record_log_dets() as terms:
            z, log_det = function(leaves[0], cond._replace(features=leaves[1]))
        loss = (z * torch.arange(z.numel()).reshape(z.shape)).sin().sum() + log_det.square().sum()
        loss = loss + sum(term.cos().sum() for term in terms)
        grads = torch.autograd.grad(
            loss, [*leaves, *plain.parameters()], allow_unused=True, materialize_grads=True
        )
        results.append([z, log_det, *terms, *grads])
    # 1e-8 is what is asked for; the round trip in float64 is exact to 1e-12 or so.
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-3)])
def test_a_waveglow_of_12_flows(dtype: torch.dtype, tolerance: float) -> None:
    """The conditioner's parameters are among them: they are reached by the features alone."""
    flow = deep(dtype)
    ordinary = gradients(flow, reversible=False)
    assert len(ordinary) == len(list(flow.parameters()))
    assert furthest(gradients(flow, reversible=True), ordinary) < tolerance


def test_under_autocast_the_networks_are_computed_as_before() -> None:
    flow = deep()
    exact, rough = gradients(flow, False), gradients(flow, False, autocast=True)
    rebuilt = gradients(flow, True, autocast=True)
    rounding = furthest(rough, exact)
    assert rounding > 1e-3  # else autocast would not have been on
    assert furthest(rebuilt, rough) < 0.1 * rounding


def test_under_autocast_later_uses_of_a_weight_have_gradients() -> None:
    """Autocast keeps a copy of each weight, in older torches one without gradients too."""
    coupling = Coupling(nn.Conv1d(2, 4, 1), Affine(), Halves())
    coupling._params = lambda passive, cond: coupling.network(passive)  # type: ignore[method-assign]
    x = torch.ones(1, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        Reversible(coupling)(x)
        z, _ = coupling(x)
    z.sum().backward()
    assert coupling.network.weight.grad is not None


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_all_three_objectives(precision: str) -> None:
    """Draws are a reversible path of their own, after that of speech under the same autocast."""
    torch.manual_seed(0)
    flow = build_flow(FRAMEGLOW, MEL)
    randomised(flow)
    audio = 0.1 * torch.randn(2, 40 * MEL.hop_length)
    mel = torch.randn(2, MEL.n_mels, 40) - 5
    spectral = SpectralDistance(MEL)
    results = []
    for reversible in (False, True):
        flow.reversible = reversible
        flow.zero_grad()
        torch.manual_seed(3)
        terms = objectives(flow, spectral, audio, mel, True, True, precision)
        sum(terms).backward()
        grads = {n: p.grad for n, p in flow.named_parameters() if p.grad is not None}
        results.append((torch.stack(list(terms)), {n: g.clone() for n, g in grads.items()}))
    (terms, ordinary), (same_terms, rebuilt) = results
    torch.testing.assert_close(same_terms, terms, rtol=1e-5, atol=1e-6)
    # bfloat16 rounds what the rebuilt input moved by 1e-7 to a neighbour now and then.
    assert furthest(rebuilt, ordinary) < (0.03 if precision == "bf16" else 1e-3)


def test_frozen_parameters_and_steps() -> None:
    flow = deep()
    frozen = [n for n, _ in flow.named_parameters() if "steps.2." in n or n.endswith("bias")]
    for name, parameter in flow.named_parameters():
        parameter.requires_grad_(name not in frozen)
    ordinary = gradients(flow, False)
    assert not ordinary.keys() & set(frozen)
    assert furthest(gradients(flow, True), ordinary) < 1e-3


def test_without_a_condition_and_with_data_that_starts_a_step() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv1d(2, 4, 1)

        def forward(self, x: Tensor, features: None, mask: None) -> Tensor:
            return self.layer(x)

    x = 3 * torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(0)) + 1
    results = []
    for reversible in (False, True):
        torch.manual_seed(0)
        chain = Chain(ActNorm(4), Coupling(Own(), Affine(), Halves()), InvertibleConv1x1(4))
        z, log_det = (Reversible(chain) if reversible else chain)(x)
        (z.square().sum() - log_det.sum()).backward()
        results.append([z, log_det, *(p.grad for p in chain.parameters())])
        assert chain.steps[0].initialized
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


# --- how it runs ---


def test_a_coupling_evaluates_its_network_once_in_each_pass() -> None:
    flow, calls = deep(), []
    for module in flow.modules():
        if isinstance(module, WaveNet):
            module.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    gradients(flow, reversible=True)
    assert calls == 12 * [False] + 12 * [True]


def test_both_directions_of_a_coupling_share_the_evaluation() -> None:
    network = WaveNet(2, BANDS, 4, 4, n_layers=1)
    calls: list[None] = []
    network.register_forward_hook(lambda *_: calls.append(None))
    coupling = Inverse(Coupling(network, Affine(), Halves()))
    cond = Condition(torch.zeros(1, BANDS, 5))
    Reversible(coupling)(torch.ones(1, 4, 5), cond)[0].sum().backward()
    assert len(calls) == 2


def test_memory_does_not_grow_with_the_flows() -> None:
    def peak(n_flows: int, reversible: bool) -> int:
        flow = waveglow(WAVEGLOW.model_copy(update={"n_flows": n_flows, "hidden_channels": 16}))
        flow.reversible = reversible
        for parameter in flow.parameters():
            parameter.grad = torch.zeros_like(parameter)
        audio, mel = torch.randn(2, 64 * 32), torch.randn(2, 8, 64)
        return peak_bytes(lambda: flow(audio, mel).mean().backward(), CPU)

    assert peak(12, True) < 1.4 * peak(2, True)
    assert peak(12, False) > 3 * peak(2, False)


def test_peak_is_the_most_that_is_held_at_once() -> None:
    def work() -> None:
        for _ in range(3):
            first = torch.ones(1000, 1000)
            second = first + 1
            del first
        second.sum()

    # Two of 4 MB, and the one of the round before while it is replaced.
    assert peak_bytes(work, CPU) == pytest.approx(12e6, rel=0.01)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_sees_each_gradient_once() -> None:
    flow = deep()
    ordinary = gradients(flow, False)
    model = DistributedDataParallel(flow)
    seen: list[int] = []

    def send(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        seen.extend(id(parameter) for parameter in bucket.parameters())
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.register_comm_hook(None, send)
    assert furthest(gradients(flow, True, model=model), ordinary) < 1e-3
    assert sorted(seen) == sorted(id(parameter) for parameter in flow.parameters())


def test_gradients_arrive_step_by_step() -> None:
    """The last step's before the first's network is computed again: sending may overlap."""
    flow, events = deep(), []
    networks = [module for module in flow.modules() if isinstance(module, WaveNet)]
    networks[0].register_forward_hook(lambda *_: events.append("first computed"))
    last = networks[-1].end.weight
    last.register_post_accumulate_grad_hook(lambda _: events.append("last arrived"))
    gradients(flow, True)
    assert events == ["first computed", "last arrived", "first computed"]


def test_networks_may_be_compiled() -> None:
    flow = waveglow(WAVEGLOW.model_copy(update={"n_flows": 1, "n_layers": 1}))
    randomised(flow)
    ordinary = gradients(flow, False)
    # All of torch.compile but the generation of code.
    compile_networks(flow, CPU, backend="aot_eager")
    assert furthest(gradients(flow, True), ordinary) < 1e-3


def test_a_second_backward_pass() -> None:
    flow = deep()
    flow.reversible = True
    audio, mel = torch.randn(1, 8 * 32), torch.randn(1, 8, 8)
    weight = next(flow.bijection.parameters())
    loss = flow(audio, mel).mean()
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(loss, weight)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, weight)


def test_weights_that_changed_meanwhile_are_noticed() -> None:
    flow = deep()
    flow.reversible = True
    loss = flow(torch.randn(1, 8 * 32), torch.randn(1, 8, 8)).mean()
    with torch.no_grad():
        next(flow.bijection.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- drift ---


def test_drift_names_the_worst_step() -> None:
    """A matrix that is nearly singular loses digits on the way back; a good one does not."""
    torch.manual_seed(0)
    good, bad = InvertibleConv1x1(4), InvertibleConv1x1(4)
    with torch.no_grad():
        bad.weight[0] = bad.weight[1] + 1e-3 * bad.weight[0]
    x = torch.randn(2, 4, 100)
    with record_drift() as drifts:
        z, _ = Reversible(Chain(good, bad, good))(x)
        assert drifts == []
    z.square().sum().backward()
    assert [(drift.step, drift.name) for drift in drifts] == [
        (step, "InvertibleConv1x1") for step in (2, 1, 0)
    ]
    last, worst, _ = (drift.relative for drift in drifts)
    assert last < 1e-6
    assert 1e-5 < worst < 1e-2


def test_drift_of_a_deep_waveglow_is_rounding() -> None:
    flow = deep()
    with record_drift() as drifts:
        gradients(flow, True)
    assert len(drifts) == 1 + 2 * 12
    assert 0 < max(drift.relative for drift in drifts) < 1e-4
    assert {drift.name for drift in drifts} == {"Squeeze", "InvertibleConv1x1", "Coupling"}


def test_the_debug_switch_logs_the_worst_step(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "waveflow.training.memory")
    flow = deep()
    for wanted, reversible in ((False, True), (True, False)):
        with drift_logged(wanted):
            gradients(flow, reversible)
    assert caplog.messages == []
    with drift_logged(True):
        gradients(flow, True)
    (message,) = caplog.messages
    assert re.search(r"off by \de-\d+ of .* flow step \d+, [A-Z]\w+$", message)


# --- the switch ---


def recipe(**train: object) -> Recipe:
    mel = MEL.model_copy(update={"n_mels": 8, "hop_length": 32})
    return Recipe(model=WAVEGLOW, mel=mel, train=TrainConfig(**train))


def test_auto_is_where_activations_would_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = deep().train()
    audio, mel = torch.randn(8, 64 * 32), torch.randn(8, 8, 64)
    for parameter in flow.parameters():
        parameter.grad = torch.zeros_like(parameter)
    peak = peak_bytes(lambda: flow(audio, mel).mean().backward(), CPU)
    settings = {"segment_frames": 64}
    for available, reversible in ((1.2 * peak, True), (3 * peak, False)):
        monkeypatch.setattr(memory, "_memory_bytes", lambda _, bytes=available: bytes)
        assert choose_reversible(flow, recipe(**settings), 8, CPU) is reversible
        assert choose_reversible(flow, recipe(reversible=False, **settings), 8, CPU) is False
        assert choose_reversible(flow, recipe(reversible=True, **settings), 8, CPU) is True
    # Fewer items at once fit; with two draws beside each they do not.
    monkeypatch.setattr(memory, "_memory_bytes", lambda _: 1.2 * peak)
    assert not choose_reversible(flow, recipe(**settings), 3, CPU)
    assert choose_reversible(flow, recipe(energy_weight=1, **settings), 3, CPU)
    assert flow.training


def test_what_is_kept_is_counted() -> None:
    """Of one layer: its input, weights left out."""

    class Scale(nn.Module):
        hop_length = 4

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, audio: Tensor, mel: Tensor) -> Tensor:
            return (audio * self.weight).sum()

    assert kept_bytes(Scale(), 8, 10, CPU) == 4 * 4 * 10


# --- the benchmark ---


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("waveflow.bench.subjects.UNTRAINED", {"waveglow-64": WAVEGLOW})
    monkeypatch.setattr(bench_training, "SEGMENT_FRAMES", 16)
    # The verb sets them for its libraries.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")


@pytest.mark.usefixtures("small")
def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cost.json"
    assert main(["bench", "--training", "--runs", "1", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    for row in ("2 flows, activations kept", "12 flows, activations rebuilt", "relative error"):
        assert row in printed
    found = json.loads(file.read_text())
    assert [(s["n_flows"], s["reversible"]) for s in found["steps"]] == [
        (2, False), (2, True), (12, False), (12, True)
    ]  # fmt: skip
    assert found["n_samples"] == 16 * 32
    assert found["gradient_error"] < 1e-3
    assert 0 < found["drift"] < 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["squeezewave-128-256"], "one untrained size, waveglow-64"),
        (["waveglow-64", "waveglow-64"], "measures one"),
        (["--profile"], "--training goes with"),
        (["--precision", "int8"], "--training goes with"),
    ],
)
@pytest.mark.usefixtures("small")
def test_what_does_not_go_with_it(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--training", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_figures_of_the_step_are_of_the_step() -> None:
    result = training_cost(WAVEGLOW, 1, 16, CPU, runs=1)
    for n_flows in (2, 12):
        ordinary, rebuilt = (result.cost(n_flows, reversible) for reversible in (False, True))
        assert ordinary.ratio == 1
        assert rebuilt.ratio == pytest.approx(rebuilt.seconds / ordinary.seconds)
    step = TrainingStep(WAVEGLOW.model_copy(update={"n_flows": 12}), 1, 16, CPU)
    step(True)
    assert peak_bytes(partial(step, True), CPU) == pytest.approx(
        result.cost(12, True).peak_bytes, rel=0.05
    )
