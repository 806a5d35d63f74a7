"""The optimizer: groups of parameters, the learning rate, and the running mean of the weights."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from waveflow.bijections import BatchNorm
from waveflow.errors import ConfigError
from waveflow.flow import Flow
from waveflow.training.config import TrainConfig


def make_optimizer(flow: Flow, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over all parameters that are not frozen.

    It serves all phases of a run: it leaves parameters without a gradient as they are.

    Raises:
        ConfigError: wrong `rates`.
    """
    device = next(flow.parameters()).device
    return torch.optim.AdamW(
        parameter_groups(flow, config.rates),
        lr=config.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=config.weight_decay,
        # One pass over all weights; only a CPU and CUDA have such kernels.
        fused=device.type in ("cpu", "cuda"),
    )


def parameter_groups(flow: Flow, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """The optimizer's groups: parameters by their `factor` of the learning rate.

    Parameters with factor 0 are frozen.

    Raises:
        ConfigError: no parameter begins with a name in `rates`, or all are frozen.
    """
    named = dict(flow.named_parameters())
    for prefix in rates:
        if not any(_begins(name, prefix) for name in named):
            raise ConfigError(
                f"rates: no parameter begins with {prefix!r}; there are, for example, "
                f"{', '.join(sorted({name.partition('.')[0] for name in named}))}"
            )
    groups: dict[float, list[Tensor]] = {}
    for name, parameter in named.items():
        fitting = [prefix for prefix in rates if _begins(name, prefix)]
        factor = rates[max(fitting, key=len)] if fitting else 1.0
        if factor == 0:
            parameter.requires_grad_(False)
        else:
            groups.setdefault(factor, []).append(parameter)
    if not groups:
        raise ConfigError("rates: every parameter is frozen, so there is nothing to train")
    return [{"params": params, "factor": factor} for factor, params in groups.items()]


def learning_rate(config: TrainConfig, step: int, steps_left: float, cooldown: float) -> float:
    """Linear warm-up, then 1 / sqrt(1 + step / decay_steps), and a linear end at zero.

    Args:
        step: of the phase.
        steps_left: until its end.
        cooldown: the last steps, in which the rate falls to zero; 0: none.
    """
    factor = min(1.0, (step + 1) / config.warmup_steps)
    if cooldown:
        factor *= min(1.0, steps_left / cooldown)
    return config.learning_rate * factor / math.sqrt(1 + step / config.decay_steps)


@torch.no_grad()
def decay_of_average(flow: Flow, decay: float) -> float:
    """The decay of a flow's running mean of weights; 0, for no mean, with `BatchNorm` in it.

    Averaged weights do not fit its running moments: a RealNVP of 5,666 steps had -5.8 nats per
    sample with them, and 4.1 with its own.
    """
    return 0.0 if any(isinstance(module, BatchNorm) for module in flow.modules()) else decay


def update_average(average: dict[str, Tensor], flow: Flow, decay: float, step: int) -> None:
    """Moves a running mean of the weights towards those of a flow, in place.

    Args:
        average: tensors by name, those of `flow.state_dict()`.
        decay: weight of the old mean. It is lower in the first steps, or the random start would
            stay in the mean for long.
        step: steps done before.
    """
    decay = min(decay, (1 + step) / (10 + step))
    for name, value in flow.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)


def _begins(name: str, prefix: str) -> bool:
    return f"{name}.".startswith(f"{prefix}.")
