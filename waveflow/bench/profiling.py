"""Where a synthesis spends its time: by kind of operator, by operator, by layer."""

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from waveflow.bench.benchmark import Contender, frames
from waveflow.bench.calibration import timed
from waveflow.bench.figures import Part, Profile, Settings
from waveflow.bench.subjects import PLAIN, speech_mel
from waveflow.engine.vocoder import VocoderWarning

# What disturbs a short run shows as an operator that it hit, hence several; the profiler's own
# books take long over many.
PROFILED_SECONDS, MOST_RUNS = 1.0, 5
N_OPERATORS = 8
OUTSIDE = "outside torch"
OTHER = "other"
BETWEEN = "between layers"

# Words in the names of operators, by kind; the first kind that has one is it.
GROUPS = {
    "convolution": ("conv",),
    "matrix product": ("mm", "linear", "matmul", "gemm"),
    "Fourier transform": ("fft",),
    "gate, activation": ("tanh", "sigmoid", "gelu", "relu"),
    "draw": ("rand", "normal_"),
    "normalisation": ("norm",),
    "view": (
        "as_strided", "view", "transpose", "permute", "slice", "expand", "select", "narrow",
        "squeeze", "reshape", "split", "chunk", "detach", "unfold",
    ),
    "copy": (
        "copy", "cat", "clone", "contiguous", "fill", "zero", "pad", "gather", "index", "roll",
        "reorder", "repeat", "empty", "resize", "mem", "dense", "flip", "stack",
    ),
    "elementwise": (
        "add", "sub", "mul", "div", "exp", "log", "cos", "sin", "lerp", "clamp", "abs", "pow",
        "where", "sum", "mean", "neg", "sqrt", "reciprocal", "ceil", "floor", "round",
        "square", "pool", "cumsum", "complex", "polar", "isfinite",
    ),
}  # fmt: skip


# Names in a layer's path that say where it stands, not what it does.
CONTAINERS = {"bijection", "steps", "rest", "layers", "blocks", "parametrizations"}


class Spent:
    """Seconds and calls of one part."""

    def __init__(self, seconds: float = 0.0, calls: int = 0) -> None:
        self.seconds = seconds
        self.calls = calls

    def add(self, seconds: float, calls: int) -> None:
        self.seconds += seconds
        self.calls += calls


@torch.inference_mode()
def profile(settings: Settings, contender: Contender) -> Profile:
    """Syntheses of the first length, after a warm-up, under torch's profiler.

    The shares are of the time that they take under the profiler, which weighs on small
    operators. What runs in another library is "outside torch", as is the time between operators.
    """
    subject, path, system, _ = contender
    seconds = settings.seconds[0]
    mel = speech_mel(subject.mel_config, frames(subject, seconds), settings.batch)
    mel = mel.to(settings.device)

    def run() -> None:
        system(mel).cpu()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VocoderWarning)
        run()
        repeats = min(MOST_RUNS, max(1, round(PROFILED_SECONDS / timed(run).wall)))
        groups, operators = _operators(run, repeats, mel.is_cuda)
        # On an accelerator a layer returns before its work is done.
        layers: tuple[Part, ...] = ()
        if path == PLAIN and subject.module is not None and not mel.is_cuda:
            layers = _layers(run, repeats, subject.module)
    return Profile(
        model=subject.name,
        path=path.label,
        precision=path.precision,
        seconds=seconds,
        groups=groups,
        operators=operators[:N_OPERATORS],
        layers=layers,
    )


def group_of(operator: str) -> str:
    """The kind of an operator, by its name."""
    for group, words in GROUPS.items():
        if any(word in operator for word in words):
            return group
    return OTHER


def role_of(name: str) -> str:
    """What a layer does, from its path: "network.in_layers" of "bijection.steps.2.network..."."""
    parts = [part for part in name.split(".") if not part.isdigit() and part not in CONTAINERS]
    return ".".join(parts[-2:])


def _operators(
    run: Callable[[], None], repeats: int, on_gpu: bool
) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """Shares of kinds of operators, and of operators."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with torch.profiler.profile(activities=activities) as profiler:
        total = sum(timed(run).wall for _ in range(repeats))
    groups: dict[str, Spent] = defaultdict(Spent)
    operators: dict[str, Spent] = {}
    for event in profiler.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel, whose time the operator that started it has already
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        name = event.key.removeprefix("aten::")
        operators[name] = Spent(microseconds / 1e6, event.count)
        groups[group_of(name)].add(microseconds / 1e6, event.count)
    groups[OUTSIDE] = Spent(max(0.0, total - sum(spent.seconds for spent in groups.values())))
    return _parts(groups, repeats, total), _parts(operators, repeats, total)


def _layers(run: Callable[[], None], repeats: int, module: nn.Module) -> tuple[Part, ...]:
    """Shares of the layers by role; what they leave is between them."""
    roles: dict[str, Spent] = defaultdict(Spent)
    begins: list[float] = []
    hooks = []
    for name, layer in module.named_modules():
        if next(layer.children(), None) is None:
            spent = roles[role_of(name)]

            def end(*_: object, spent: Spent = spent) -> None:
                spent.add(time.perf_counter() - begins.pop(), 1)

            hooks.append(
                layer.register_forward_pre_hook(lambda *_: begins.append(time.perf_counter()))
            )
            hooks.append(layer.register_forward_hook(end))
    try:
        total = sum(timed(run).wall for _ in range(repeats))
    finally:
        for hook in hooks:
            hook.remove()
    roles[BETWEEN] = Spent(max(0.0, total - sum(spent.seconds for spent in roles.values())))
    return _parts(roles, repeats, total)


def _parts(spent: Mapping[str, Spent], repeats: int, total: float) -> tuple[Part, ...]:
    """As shares of a total, the largest first; calls of one run."""
    parts = [
        Part(name=name, share=s.seconds / total, calls=s.calls // repeats)
        for name, s in spent.items()
    ]
    return tuple(sorted(parts, key=lambda part: -part.share))
