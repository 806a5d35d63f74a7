"""Turns the tensors of a published checkpoint into a WaveGlow.

Published WaveGlows come from three lineages of code: `glow` (NVIDIA/waveglow), `glow_old` (its
older network) and `dle` (NVIDIA's DeepLearningExamples). They compute the same, except that in
`glow_old` the halves of a coupling swap their roles from flow to flow. Their networks also differ
in how layers are split and named; the names of the tensors tell which layout it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from waveflow.bijections import InvertibleConv1x1
from waveflow.checkpoint import (
    ModelConfig,
    Provenance,
    SynthesisConfig,
    first_problem,
    parse_tensors,
)
from waveflow.door import read_plain
from waveflow.errors import CheckpointError
from waveflow.flow import Flow
from waveflow.foreign.config import mel_config, read_config
from waveflow.foreign.model import model_names
from waveflow.foreign.nvidia import from_nvidia
from waveflow.foreign.sandbox import Header, read_torch_file
from waveflow.limits import WEIGHTS_BYTES
from waveflow.models.waveglow import WaveGlowConfig

Lineage = Literal["auto", "glow", "glow_old", "dle"]
# Both are constants in the published code, and missing in its configs.
_TAPS, _HOP = 1024, 256
# What the published code recommends for synthesis (0.666 in one place, 0.6 in another).
_SIGMA = 0.6
_MAX_SAFETENSORS_HEADER = 100_000_000


@dataclass(frozen=True)
class Converted:
    """A published checkpoint as ours, and the facts that were read from it."""

    config: ModelConfig
    flow: Flow
    header: Header
    lineage: Lineage


def convert(path: Path, config_path: Path | None = None, lineage: Lineage = "auto") -> Converted:
    """Reads a published WaveGlow checkpoint of any lineage.

    Args:
        path: a file of torch.save, or a state dict as safetensors.
        config_path: a published config.json, with the settings of the mel. Its sizes must be those
            of the weights. Without it the published defaults hold.
        lineage: the code that the weights belong to; "auto" infers it from the checkpoint.

    Raises:
        CheckpointError: missing, damaged, refused, no WaveGlow, or of an unclear lineage.
    """
    if not path.is_file():  # a pipe would block, a device never ends
        raise CheckpointError(f"{path} is not a file")
    published = read_config(config_path)
    header, weights = _read_weights(path)
    try:
        layers = _layers(weights)
        lineage = _inferred(lineage, header, layers)
        state_dict = _fused(layers)
        hop = header.hop_length or published.data_config.hop_length
        model = _model_config(state_dict, published.waveglow_config.stated(), lineage, hop)
        mel = mel_config(model, published.data_config)
        flow = from_nvidia(state_dict, model)
        _check_invertible(flow)
        _check_norms(flow)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    origin = f"unknown; converted from a published {lineage} checkpoint, {path.name}"
    config = ModelConfig(
        model=model,
        mel=mel,
        synthesis=SynthesisConfig(sigma=_SIGMA),
        provenance=Provenance(data=origin, steps=header.iteration),
    )
    return Converted(config, flow.eval(), header, lineage)


def _read_weights(path: Path) -> tuple[Header, dict[str, Tensor]]:
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if start[8:] != b"{" or int.from_bytes(start[:8], "little") >= _MAX_SAFETENSORS_HEADER:
        return read_torch_file(path)
    weights = parse_tensors(read_plain(path, WEIGHTS_BYTES, CheckpointError), path)
    try:
        _, names = model_names(weights)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Header(container="safetensors"), {own: weights[name] for own, name in names.items()}


def _layers(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sorts tensors by layer and kind (weight, weight_g, weight_v, bias), as float32."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        own = name
        for newer, older in (("original0", "weight_g"), ("original1", "weight_v")):
            own = own.replace(f"parametrizations.weight.{newer}", older)
        layer, _, kind = own.rpartition(".")
        if not tensor.is_floating_point():
            raise CheckpointError(f"its tensor {name!r:.60} is {tensor.dtype}: no weights")
        tensor = tensor.float()
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"its tensor {name!r:.60} holds values that are not finite")
        if kind in layers.setdefault(layer, {}):
            raise CheckpointError(f"it holds the tensor {own!r:.60} twice, under two names")
        layers[layer][kind] = tensor
    return layers


def _inferred(asked: Lineage, header: Header, layers: Mapping[str, Any]) -> Lineage:
    """Decides the lineage by the file itself, the flag, or the layout, in this order."""
    if header.lineage is not None:
        if asked != "auto" and (header.lineage == "glow_old") != (asked == "glow_old"):
            raise CheckpointError(f"it is of {header.lineage}: leave out --lineage {asked}")
        return header.lineage
    if asked != "auto":
        return asked
    if "WN.0.cond_layers.0" in layers and "WN.0.res_skip_layers.0" in layers:
        raise CheckpointError(
            "without their classes, these weights may be of glow_old or of other code, which "
            "computes something else: say --lineage glow_old, dle or glow"
        )
    return "glow"


def _fused(layers: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Brings all layers to the names and the layout of the newest published code.

    There a network has one layer for the condition, and one for residual and skip. Every layer of a
    network has weight norm.
    """
    fused = dict(layers)
    for k in range(_count(layers, "convinv.{}.conv")):
        for name in _numbered(layers, f"WN.{k}.res_layers"):
            skip = name.replace("res_layers", "skip_layers")
            rows = [fused.pop(name), fused.pop(skip, {})]
            fused[name.replace("res_layers", "res_skip_layers")] = _stacked(rows, skip)
        for name in _numbered(layers, f"WN.{k}.skip_layers"):
            if name in fused:  # the last one, which has no residual
                fused[name.replace("skip_layers", "res_skip_layers")] = fused.pop(name)
        parts = _numbered(layers, f"WN.{k}.cond_layers")
        if parts:
            rows = [fused.pop(name) for name in parts]
            fused[f"WN.{k}.cond_layer"] = _stacked(rows, parts[0])
    return {
        f"{name}.{kind}": tensor
        for name, layer in fused.items()
        for kind, tensor in (_normed(layer, name) if _has_norm(name) else layer).items()
    }


def _has_norm(layer: str) -> bool:
    return layer.startswith("WN.") and not layer.endswith(".end")


def _normed(layer: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Gives a layer weight norm, w = g v / |v| for each row (Salimans and Kingma 2016).

    A `weight` beside g and v is a leftover without meaning.
    """
    if "weight_g" in layer or "weight_v" in layer:
        return {kind: tensor for kind, tensor in layer.items() if kind != "weight"}
    if "weight" not in layer or layer["weight"].dim() != 3:
        raise CheckpointError(f"its layer {name!r:.60} has no weight (out, in, taps)")
    weight = layer["weight"]
    norm = weight.double().flatten(1).norm(dim=1)[:, None, None]
    # A row of zeros has no direction, so any will do: its g is 0.
    direction = torch.where(norm > 0, weight, torch.ones_like(weight))
    rest = {kind: tensor for kind, tensor in layer.items() if kind != "weight"}
    return {"weight_g": norm.float(), "weight_v": direction, **rest}


def _stacked(rows: list[dict[str, Tensor]], name: str) -> dict[str, Tensor]:
    """Joins layers that have the same input. Weight norm is by row, so it stays exact."""
    layers = [_normed(layer, name) for layer in rows]
    if any(layer.keys() != layers[0].keys() for layer in layers):
        raise CheckpointError(f"its layers beside {name!r:.60} are incomplete")
    try:
        return {kind: torch.cat([layer[kind] for layer in layers]) for kind in layers[0]}
    except RuntimeError as error:
        raise CheckpointError(f"its layers beside {name!r:.60} differ in size") from error


def _numbered(layers: Mapping[str, Any], prefix: str) -> list[str]:
    return [f"{prefix}.{i}" for i in range(_count(layers, f"{prefix}.{{}}"))]


def _count(layers: Mapping[str, Any], pattern: str) -> int:
    count = 0
    while pattern.format(count) in layers:
        count += 1
    return count


def _model_config(
    weights: Mapping[str, Tensor], stated: dict[str, int], lineage: Lineage, hop: int | None
) -> WaveGlowConfig:
    """Takes the sizes from the shapes and checks them against the stated ones."""
    taps = _shape(weights, "upsample.weight", 3)
    group, *matrices = [
        _shape(weights, f"convinv.{k}.conv.weight", 3)[0]
        for k in range(max(1, _count(weights, "convinv.{}.conv.weight")))
    ]
    kernel = _shape(weights, "WN.0.in_layers.0.weight_v", 3)
    sizes = {
        "n_mel_channels": taps[0],
        "n_flows": 1 + len(matrices),
        "n_group": group,
        "n_layers": _count(weights, "WN.0.in_layers.{}.weight_v"),
        "n_channels": kernel[1],
        "kernel_size": kernel[2],
    } | _early_sizes([group, *matrices], stated.get("n_early_every", 0))
    for name, size in sizes.items():
        if stated.get(name, size) != size:
            raise CheckpointError(
                f"{name} is stated as {stated[name]}, but the shapes of the weights make it {size}"
            )
    every, flows = sizes["n_early_every"], range(1, sizes["n_flows"])
    if lineage == "glow_old" and any((k % every == 0) != (k % 4 == 0) for k in flows):
        raise CheckpointError(
            f"n_early_every is {every}, but glow_old always synthesises with 4: say --lineage glow "
            "or dle if the weights are not of glow_old"
        )
    hop = hop or (_HOP if taps[2] == _TAPS else None)
    if hop is None:
        raise CheckpointError(
            f"its upsampler has {taps[2]} taps, not {_TAPS}: give --config with the hop_length"
        )
    try:
        return WaveGlowConfig(
            n_mels=sizes["n_mel_channels"],
            hop_length=hop,
            n_flows=sizes["n_flows"],
            squeeze_factor=group,
            n_early_every=sizes["n_early_every"],
            n_early_size=sizes.get("n_early_size", WaveGlowConfig().n_early_size),
            n_layers=sizes["n_layers"],
            hidden_channels=sizes["n_channels"],
            kernel_size=sizes["kernel_size"],
            upsample_kernel=taps[2],
            alternate=lineage == "glow_old",
        )
    except ValidationError as error:
        raise CheckpointError(first_problem(error)) from error


def _check_norms(flow: Flow) -> None:
    """Refuses rows of zeros: they have no direction, and their weight would be 0 / 0."""
    for name, module in flow.named_modules():
        if is_parametrized(module) and not torch.isfinite(cast(Tensor, module.weight)).all():
            raise CheckpointError(
                f"the weight_v of its layer {name.rpartition('.')[2]} has a row of zeros"
            )


def _check_invertible(flow: Flow) -> None:
    matrices = [m.weight for m in flow.modules() if isinstance(m, InvertibleConv1x1)]
    for k, matrix in enumerate(matrices):
        if not torch.linalg.slogdet(matrix.detach().double()).logabsdet.isfinite():
            raise CheckpointError(f"its 1x1 convolution {k} has no inverse")


def _shape(weights: Mapping[str, Tensor], name: str, n_axes: int) -> tuple[int, ...]:
    if name not in weights:
        raise CheckpointError(f"it has no tensor {name!r}: is it a WaveGlow?")
    shape = tuple(weights[name].shape)
    if len(shape) != n_axes or 0 in shape:
        raise CheckpointError(f"its tensor {name!r} has the shape {shape}")
    return shape


def _early_sizes(matrices: list[int], stated_every: int) -> dict[str, int]:
    """Tells from the sizes of the 1x1 matrices when and how many channels leave early.

    Channels leave before flow k if k > 0 is a multiple of n_early_every. If none leave,
    n_early_every is at least the number of flows, and n_early_size has no meaning.
    """
    drops = {k: matrices[k - 1] - matrices[k] for k in range(1, len(matrices))}
    first = next((k for k, drop in drops.items() if drop), None)
    if first is None:
        return {"n_early_every": max(stated_every, len(matrices))}
    if drops[first] < 0 or any(
        drop != (drops[first] if k % first == 0 else 0) for k, drop in drops.items()
    ):
        raise CheckpointError(f"its 1x1 convolutions have the sizes {matrices}: not a WaveGlow's")
    return {"n_early_every": first, "n_early_size": drops[first]}
