"""Activations that are computed again instead of kept, the choice of it, and compiled networks."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import (
    MEL,
    MODELS,
    PLAIN,
    WAVEGLOW,
    batch_of,
    perturbed,
    recipe,
    speech,
    write_cache,
)
from torch import Tensor, nn
from torch.profiler import ProfilerActivity

from waveflow.errors import ConfigError
from waveflow.flow import Flow
from waveflow.models.registry import build_flow
from waveflow.training import loop, machine
from waveflow.training.loop import Trainer
from waveflow.training.machine import choose_recompute, compile_networks, kept_bytes
from waveflow.training.objectives import FlowLoss

CPU = torch.device("cpu")
# All of the paper's 12 flows and two early outputs.
DEEP = WAVEGLOW.model_copy(update={"n_flows": 12, "n_early_every": 4, "hidden_channels": 16})


def gradients(flow: Flow, recompute: bool, **train: object) -> Tensor:
    """Of the loss of a recipe with these settings, of all parameters that have one."""
    flow.recompute = recompute
    flow.zero_grad()
    torch.manual_seed(3)
    FlowLoss(flow, recipe(**train), CPU)(batch_of(*speech(32))).value.backward()
    return torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None])


def peak_bytes(work: Callable[[], object]) -> int:
    """The highest that torch's allocations on the CPU rise while `work` runs."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results: Any = profiler.profiler and profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


# --- the same gradients in less memory ---


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same(name: str, precision: str) -> None:
    """Of all terms, in training mode: random numbers and autocast are those of the first time."""
    flow = perturbed(MODELS[name]).train()
    kept = gradients(flow, False, precision=precision)
    assert kept.norm() > 0
    assert torch.equal(gradients(flow, True, precision=precision), kept)


def test_frozen_parameters_stay_without_gradient() -> None:
    flow = perturbed(WAVEGLOW)
    for name, parameter in flow.named_parameters():
        parameter.requires_grad_("in_layers" not in name and "conditioner" not in name)
    kept = gradients(flow, False, **PLAIN)
    assert torch.equal(gradients(flow, True, **PLAIN), kept)
    assert len(kept) == sum(p.numel() for p in flow.parameters() if p.requires_grad)


def test_every_network_is_evaluated_twice_where_gradients_are_wanted() -> None:
    flow, (audio, mel) = perturbed(DEEP), speech(8)
    calls: list[str] = []
    for name, module in flow.named_modules():
        if name.endswith(".network"):
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    for recompute, times in ((False, 1), (True, 2), (False, 1)):
        flow.recompute = recompute
        assert flow.recompute is recompute
        calls.clear()
        flow(audio, mel).sum().backward()
        assert len(set(calls)) == 12
        assert len(calls) == 12 * times
    flow.recompute = True
    calls.clear()
    with torch.no_grad():
        flow(audio, mel)
    assert len(calls) == 12


def test_memory_does_not_grow_with_the_flows() -> None:
    def peak(n_flows: int, recompute: bool) -> int:
        flow = build_flow(DEEP.model_copy(update={"n_flows": n_flows}), MEL)
        flow.recompute = recompute
        for parameter in flow.parameters():
            parameter.grad = torch.zeros_like(parameter)
        audio, mel = speech(32)
        return peak_bytes(lambda: flow(audio, mel).mean().backward())

    few, many = peak(2, True), peak(12, True)
    assert many < 1.4 * few
    assert peak(12, False) > 2.5 * many


# --- the choice ---


def test_auto_is_where_activations_would_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flow = perturbed(WAVEGLOW).train()
    audio, mel = speech(32, 8)
    for parameter in flow.parameters():
        parameter.grad = torch.zeros_like(parameter)
    peak = peak_bytes(lambda: flow(audio, mel).mean().backward())
    caplog.set_level(logging.INFO, "waveflow")

    def chosen(n_items: int = 8, **train: object) -> bool:
        caplog.clear()
        settings = recipe(**(PLAIN | train))
        choice = choose_recompute(flow, settings, n_items, CPU)
        said = any("activations are computed again" in line for line in caplog.messages)
        assert said == (choice and settings.train.recompute == "auto")
        return choice

    for available, recompute in ((1.2 * peak, True), (3 * peak, False)):
        monkeypatch.setattr(machine, "_memory_bytes", lambda _, bytes=available: bytes)
        assert chosen() is recompute
        assert chosen(recompute=False) is False
        assert chosen(recompute=True) is True
    # Fewer items at once fit; with two draws beside each they do not.
    monkeypatch.setattr(machine, "_memory_bytes", lambda _: 1.2 * peak)
    assert not chosen(3)
    assert chosen(3, energy_weight=1.0)
    assert chosen(3, calibration_weight=1.0)
    assert flow.training


def test_kept_bytes_are_those_of_activations_without_weights() -> None:
    class Scale(nn.Module):
        hop_length = 4

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, audio: Tensor, mel: Tensor) -> Tensor:
            return (audio * self.weight * self.weight).sum()

    # The audio and the first product.
    assert kept_bytes(Scale(), 8, 10, CPU) == 2 * 4 * 4 * 10


def test_bytes_that_are_kept_once_for_any_length_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        machine, "kept_bytes", lambda flow, n_mels, n_frames, _: 999 + 10 * n_frames
    )
    for kept in (5 * 32 * 10 - 1, 5 * 32 * 10):
        monkeypatch.setattr(machine, "_memory_bytes", lambda _, kept=kept: 2 * kept)
        chosen = choose_recompute(perturbed(), recipe(**PLAIN), 5, CPU)
        assert chosen == (kept < 5 * 32 * 10)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_run_does_as_its_recipe_says(tmp_path: Path, recompute: bool) -> None:
    cache = write_cache(tmp_path / "cache", ["train", "val"])
    settings = recipe(recompute=recompute, batch_size=5, accumulate=2, **PLAIN)
    assert Trainer(settings, cache, tmp_path / "run").flow.recompute is recompute


def test_a_run_counts_the_items_that_are_in_memory_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = write_cache(tmp_path / "cache", ["train", "val"])
    seen: list[int] = []
    monkeypatch.setattr(loop, "choose_recompute", lambda *args: bool(seen.append(args[2])))
    for accumulate, n_items in ((1, 5), (2, 3), (5, 1)):
        settings = recipe(batch_size=5, accumulate=accumulate, **PLAIN)
        Trainer(settings, cache, tmp_path / f"run{accumulate}")
        assert seen.pop() == n_items


# --- compiled networks ---


def compiled_flow(name: str, backend: str) -> tuple[Flow, Tensor]:
    """A flow with compiled networks, and the gradients that it had before."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    flow = perturbed(MODELS[name].model_copy(update={"n_flows": 1})).train()
    plain = gradients(flow, False, **PLAIN)
    names = list(flow.state_dict())
    compile_networks(flow, CPU, backend)
    assert list(flow.state_dict()) == names
    return flow, plain


def test_compiled_networks_have_the_same_gradients() -> None:
    """As torch traces them, once for all; the slow test below compiles its C++ too."""
    flow, plain = compiled_flow("waveglow", "aot_eager")
    assert (gradients(flow, False, **PLAIN) - plain).norm() < 1e-5 * plain.norm()
    assert dict(torch._dynamo.utils.counters["frames"]) == {"total": 1, "ok": 1}
    assert (gradients(flow, True, **PLAIN) - plain).norm() < 1e-5 * plain.norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_compiled_code_has_the_same_gradients(name: str) -> None:
    flow, plain = compiled_flow(name, "inductor")
    assert (gradients(flow, False, **PLAIN) - plain).norm() < 1e-5 * plain.norm()


def test_the_recipe_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = write_cache(tmp_path / "cache", ["train", "val"])
    seen: list[tuple[object, ...]] = []
    monkeypatch.setattr(loop, "compile_networks", lambda *args: seen.append(args))
    Trainer(recipe(**PLAIN), cache, tmp_path / "plain")
    assert seen == []
    trainer = Trainer(recipe(compile=True, **PLAIN), cache, tmp_path / "compiled")
    assert seen == [(trainer.flow, CPU)]


def test_without_a_compiler_compile_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        compile_networks(perturbed(), CPU)
