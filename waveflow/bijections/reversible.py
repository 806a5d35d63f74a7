"""Reversible: a bijection whose backward pass rebuilds activations from outputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from waveflow.bijections.base import (
    Bijection,
    Condition,
    Inverse,
    record,
    record_log_dets,
    zero_log_det,
)


class Reversible(Bijection):
    """`bijection`, trained in memory that does not grow with its number of steps.

    The forward pass keeps the last step's output alone. The backward pass goes back step by
    step: the inverse rebuilds the step's input, the step is computed once more with a graph,
    and the graph is freed before the next (Gomez et al. 2017, The Reversible Residual Network,
    section 3.2). Values are those of `bijection`; gradients are as good as the inverse is exact
    (`record_drift`). A coupling evaluates its network twice instead of once, so a training step
    takes about 4/3 of the time.

    Each step is a node of autograd's graph with its own parameters as inputs: gradients reach
    a parameter, and the hooks by which DistributedDataParallel sends them, as soon as its step
    is done. Networks may be compiled each by itself; torch.compile does not look into this
    module. Gradients of gradients are not offered, and hooks on the parameters' tensors see
    each gradient twice.

    Args:
        bijection: every step of it has an inverse of one pass.
    """

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        self.bijection = bijection

    @torch.compiler.disable(recursive=False)
    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        steps = self.bijection.unroll(cond)
        log_det = zero_log_det(x)
        path = _Path(len(steps), _drifts.get())
        for i, (step, seen) in enumerate(steps):
            features, mask = (None, None) if seen is None else seen
            parameters = [p for p in step.parameters() if p.requires_grad]
            x, step_log_det, *terms = _Step.apply(path, i, step, mask, x, features, *parameters)
            log_det = log_det + step_log_det
            record(terms)
        return x, log_det

    def inverse(self, z: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        return Reversible(Inverse(self.bijection))(z, cond)


class Drift(NamedTuple):
    """How far a step's rebuilt input is from what it was.

    Attributes:
        step: its number, the first is 0.
        name: of its bijection, the innermost of a nested one.
        relative: root mean square of the difference over that of the input.
    """

    step: int
    name: str
    relative: float


@contextmanager
def record_drift() -> Iterator[list[Drift]]:
    """Collects the drift of the steps whose forward pass runs while it is open.

    For finding faults: it keeps every step's input, which is little beside what networks keep.
    The list is filled by the backward pass.
    """
    drifts: list[Drift] = []
    token = _drifts.set(drifts)
    try:
        yield drifts
    finally:
        _drifts.reset(token)


_drifts: ContextVar[list[Drift] | None] = ContextVar("drift_recorder", default=None)


class _Path:
    """What the steps of one forward pass share: the output that the next one back starts from."""

    def __init__(self, n_steps: int, drifts: list[Drift] | None) -> None:
        self.n_steps = n_steps
        self.drifts = drifts
        self.rebuilt: Tensor | None = None

    def take(self) -> Tensor:
        """What the step after rebuilt; it is not kept any longer."""
        rebuilt, self.rebuilt = self.rebuilt, None
        assert rebuilt is not None, "a step's backward pass ran before that of the step after it"
        return rebuilt


class _Step(torch.autograd.Function):
    """(x, features, *parameters) to (z, log_det, *recorded log-determinants) of one step."""

    @staticmethod
    def forward(
        ctx: Any,
        path: _Path,
        index: int,
        step: Bijection,
        mask: Tensor | None,
        x: Tensor,
        features: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.path, ctx.index, ctx.step = path, index, step
        ctx.autocast = _Autocast.now(x.device.type)
        ctx.set_materialize_grads(False)
        with ctx.autocast.again(), record_log_dets() as terms:
            z, log_det = step(x, _condition(features, mask))
        last = index == path.n_steps - 1
        # Saved, so that autograd notices if anything is changed before the backward pass.
        ctx.save_for_backward(z if last else None, features, mask, *parameters)
        ctx.input = None if path.drifts is None else x.detach()
        return z, log_det, *terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        z, features, mask, *parameters = ctx.saved_tensors
        z = ctx.path.take() if z is None else z
        if features is not None:
            features = features.detach().requires_grad_(ctx.needs_input_grad[5])
        with ctx.autocast.again(), record_log_dets() as terms:
            rebuilt = ctx.step.rebuild(z, _condition(features, mask))
        x = rebuilt.join(*(part.detach() for part in rebuilt.parts))
        _note_drift(ctx, x)
        ctx.path.rebuilt = x
        steered = features is not None and features.requires_grad
        leaves = [*rebuilt.parts, *([features] if steered else []), *parameters]
        found = _gradients([rebuilt.z, rebuilt.log_det, *terms], leaves, grads)
        n_parts = len(rebuilt.parts)
        parts = [
            torch.zeros_like(part) if grad is None else grad
            for part, grad in zip(rebuilt.parts, found[:n_parts], strict=True)
        ]
        rest = found[n_parts:] if steered else [None, *found[n_parts:]]
        return None, None, None, None, rebuilt.join(*parts), *rest


def _gradients(
    outputs: list[Tensor], leaves: list[Tensor], grads: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """Of the outputs that have a graph and were used, with respect to the leaves."""
    pairs = [
        (output, grad)
        for output, grad in zip(outputs, grads, strict=True)
        if grad is not None and output.requires_grad
    ]
    if not pairs:
        return [None] * len(leaves)
    used, upstream = zip(*pairs, strict=True)
    return list(torch.autograd.grad(used, leaves, upstream, allow_unused=True))


def _condition(features: Tensor | None, mask: Tensor | None) -> Condition | None:
    return None if features is None else Condition(features, mask)


def _note_drift(ctx: Any, x: Tensor) -> None:
    if ctx.input is not None:
        rms = torch.linalg.vector_norm(ctx.input)
        relative = (torch.linalg.vector_norm(x - ctx.input) / rms).item()
        *_, inner = (m for m in ctx.step.modules() if isinstance(m, Bijection))
        ctx.path.drifts.append(Drift(ctx.index, type(inner).__name__, relative))


class _Autocast(NamedTuple):
    """The state of autocast in a forward pass, for the computation again."""

    device: str
    dtype: torch.dtype
    enabled: bool

    @staticmethod
    def now(device: str) -> "_Autocast":
        enabled = torch.is_autocast_enabled(device)
        return _Autocast(device, torch.get_autocast_dtype(device), enabled)

    def again(self) -> torch.autocast:
        # Without autocast's cache of weights: filled without gradients, it would serve what follows
        # under the same autocast, and its weights would get none (pytorch/pytorch#165068).
        return torch.autocast(self.device, self.dtype, self.enabled, cache_enabled=False)
