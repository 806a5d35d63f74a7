"""Finds the WaveGlow among the data of a checkpoint, whatever it is wrapped in."""

from collections.abc import Iterable, Iterator
from typing import Any

from waveflow.errors import CheckpointError
from waveflow.limits import TENSORS
from waveflow.torchfile.unpickle import Name, Record, TensorRef

# Every published WaveGlow has one tensor of this name. The text before it is the wrapping: a key of
# the checkpoint, the `module.` of DataParallel, an attribute of a larger model.
_MARK = "upsample.weight"
# torch.compile wraps modules anywhere in a model.
_COMPILED = "_orig_mod."
# If a file holds several models, the one under the first of these keys is taken.
_KEYS = ("model", "state_dict", "model_state_dict", "waveglow", "generator", "net")
# A limit of depth as well: every level adds to the name.
_MAX_NAME = 256


def model_names(names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Picks the tensors of one model by their names.

    Returns:
        The prefix that the model's tensors share, and the names in the file by the names in the
        model, which have no prefix.

    Raises:
        CheckpointError: no WaveGlow, several of equal rank, or one tensor under two names.
    """
    plain = {name: name.replace(_COMPILED, "") for name in names}
    marked = [f".{name}" for name in plain.values()]
    found = {name[1:].removesuffix(_MARK) for name in marked if name.endswith(f".{_MARK}")}
    best = min(map(_rank, found), default=0)
    prefixes = sorted(prefix for prefix in found if _rank(prefix) == best)
    if not prefixes:
        raise CheckpointError(f"it holds no WaveGlow: it has no tensor {_MARK!r}")
    if len(prefixes) > 1:
        raise CheckpointError(
            f"it holds {len(prefixes)} models, under {prefixes[0]!r:.60} and {prefixes[1]!r:.60}: "
            "save one of them to a file of its own"
        )
    picked: dict[str, str] = {}
    for name, own in plain.items():
        rest = own.removeprefix(prefixes[0])
        if own.startswith(prefixes[0]) and picked.setdefault(rest, name) != name:
            raise CheckpointError(f"it holds the tensor {rest!r:.60} twice, under two names")
    return prefixes[0], picked


def _rank(prefix: str) -> int:
    first = prefix.partition(".")[0]
    return _KEYS.index(first) if first in _KEYS else len(_KEYS)


def find_model(root: object) -> tuple[dict[str, object], dict[str, TensorRef]]:
    """Finds the model's tensors, and the fields of a `sandbox.Header` without the container.

    Args:
        root: the data that torch.save was given: a module, a state dict, or dicts that hold one.
    """
    found = list(_walk(root, "", set()))
    tensors = {name.removesuffix("."): it for name, it in found if isinstance(it, TensorRef)}
    TENSORS.check("it has", len(tensors), CheckpointError)
    objects = {name.replace(_COMPILED, ""): it for name, it in found if isinstance(it, Record)}
    try:
        prefix, names = model_names(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; at its top is {_described(root)}") from error
    outer = root.items if isinstance(root, Record) else {}
    iteration = outer.get("iteration")
    facts: dict[str, object] = {
        "lineage": _lineage(objects.get(prefix), outer.get("config")),
        "iteration": iteration if _is_count(iteration) else 0,
        "hop_length": _stride(objects.get(f"{prefix}upsample.")),
    }
    return facts, {own: tensors[name] for own, name in names.items()}


def _walk(value: object, name: str, seen: set[int]) -> Iterator[tuple[str, TensorRef | Record]]:
    """Yields tensors by the names that state dicts give them, and objects, with a dot behind.

    Of the attributes of modules only those count that state dicts hold: old weight norm keeps a
    stale `weight` beside them, and the published synthesis an inverse.
    """
    if len(name) > _MAX_NAME or id(value) in seen:
        return
    if isinstance(value, TensorRef):
        yield name, value
    elif isinstance(value, Record):
        seen.add(id(value))  # a file can have one thing in many places, even in itself
        if value.kind is not None:
            yield name, value
        for key, child in value.items.items():
            yield from _walk(child, f"{name}{key}.", seen)
        for group in ("_parameters", "_buffers", "_modules"):
            yield from _walk(value.state.get(group), name, seen)


def _lineage(module: Record | None, config: object) -> str | None:
    """Tells the code that the weights belong to by the file of the pickled class.

    DeepLearningExamples also saves state dicts, with the sizes of the model under "config".
    """
    file = "" if module is None else f".{module.kind}".rpartition(".")[0]
    for ending, lineage in (
        (".glow", "glow"),
        (".glow_old", "glow_old"),
        (".waveglow.model", "dle"),
    ):
        if file.endswith(ending):
            return lineage
    return "dle" if isinstance(config, Record) and "WN_config" in config.items else None


def _stride(upsample: Record | None) -> int | None:
    stride: Any = None if upsample is None else upsample.state.get("stride")
    is_one = type(stride) is tuple and len(stride) == 1 and _is_count(stride[0])
    return stride[0] if is_one else None


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


def _described(root: object) -> str:
    if isinstance(root, Name):
        return f"the name {root}"
    if not isinstance(root, Record):
        return f"a {type(root).__name__}"
    if root.kind is not None:
        return f"an object of {root.kind}"
    keys = ", ".join(f"{key!r:.40}" for key in list(root.items)[:5])
    return f"a dict with the keys {keys}" if keys else "an empty dict"
