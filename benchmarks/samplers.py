"""Speed of the samplers that compute nothing twice, beside running the whole network each time.

    python benchmarks/samplers.py wavenet maf waveflow --seconds 1

A model is a type with its default sizes and random weights. The plain sampler runs the whole
network for each element; its time is that of one such pass, the median of some, times their
number. `tests/test_zoo.py` compares what both make.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

import lab
from waveflow.audio.mel import MEL_PRESETS, MelConfig
from waveflow.bijections import Autoregressive
from waveflow.cli.console import show_table
from waveflow.flow import Flow
from waveflow.models.registry import AnyFlowConfig, build_flow

CONFIGS = TypeAdapter(AnyFlowConfig)
N_PASSES = 5


def cpu_seconds(work: Callable[[], Any]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


@torch.inference_mode()
def measured(flow: Flow, mel: Tensor) -> tuple[float, float]:
    """CPU seconds of a draw: by the sampler that keeps what it has computed, and plainly."""
    noise = flow.noise(mel.shape[2], [0])
    calls: list[tuple[Autoregressive, tuple[Any, ...]]] = []
    steps = [step for step in flow.bijection.modules() if isinstance(step, Autoregressive)]
    hooks = [
        step.network.register_forward_hook(lambda *call, step=step: calls.append((step, call[1])))
        for step in steps
    ]
    flow(noise.flatten(1), mel)  # finds the inputs of each network
    for hook in hooks:
        hook.remove()
    kept = cpu_seconds(lambda: flow.decode(noise, mel))
    plain = 0.0
    for step, inputs in calls:
        passes = [cpu_seconds(lambda: step.network(*inputs)) for _ in range(1 + N_PASSES)]  # noqa: B023
        plain += statistics.median(passes[1:]) * inputs[0].shape[step.axis]
    return kept, plain


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the seconds of both for each model, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="+", help="autoregressive models")
    parser.add_argument("--seconds", type=float, default=1.0, help="of audio")
    args = parser.parse_args(argv)
    config: MelConfig = MEL_PRESETS["hifigan"]
    mel = torch.full((1, config.n_mels, round(args.seconds * config.sample_rate / 256)), -5.0)
    rows = [("model", "kept s", "plain s", "plain / kept")]
    for name in args.types:
        torch.manual_seed(0)
        flow = build_flow(CONFIGS.validate_python({"type": name}), config).eval()
        kept, plain = measured(flow, mel)
        rows.append((name, f"{kept:.2g}", f"{plain:.2g}", f"{plain / kept:.0f}"))
    show_table(rows)


if __name__ == "__main__":
    lab.run(main)
