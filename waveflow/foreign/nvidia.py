"""Loads weights that have the names and the layout of the published WaveGlow code."""

from collections.abc import Mapping

from torch import Tensor

from waveflow.bijections import InvertibleConv1x1
from waveflow.budget import Budget
from waveflow.errors import CheckpointError
from waveflow.flow import Flow
from waveflow.models.waveglow import WaveGlowConfig, waveglow
from waveflow.nn.wavenet import WaveNet


def from_nvidia(state_dict: Mapping[str, Tensor], config: WaveGlowConfig) -> Flow:
    """Builds a WaveGlow with published weights; see `load_nvidia_state_dict`."""
    # The sizes are those of a few tensors; the others have to be there too.
    n_numbers = sum(tensor.numel() for tensor in state_dict.values())
    reason = (
        f"its first tensors are those of a larger model than its {n_numbers:,} numbers in "
        f"{len(state_dict)} tensors are: tensors are missing, or have other shapes"
    )
    with Budget(len(state_dict), n_numbers, reason, CheckpointError):
        flow = waveglow(config)
    load_nvidia_state_dict(flow, state_dict)
    return flow


def load_nvidia_state_dict(flow: Flow, state_dict: Mapping[str, Tensor]) -> None:
    """Loads weights named as in the published code, weight norm as `weight_g`, `weight_v`.

    Args:
        flow: a WaveGlow, built by `waveglow`.
        state_dict: tensors by their published names.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or belongs to no layer.
    """
    names = nvidia_names(flow)
    if missing := sorted(names.keys() - state_dict.keys()):
        raise CheckpointError(
            f"{len(missing)} tensors are missing, {missing[0]!r} the first: are these the weights "
            "of this configuration, in the fused layout with weight norm?"
        )
    if unknown := sorted(state_dict.keys() - names.keys()):
        raise CheckpointError(
            f"{len(unknown)} tensors belong to no layer, {unknown[0]!r} the first: are these the "
            "weights of this configuration?"
        )
    own = flow.state_dict()
    converted = {}
    for name, own_name in names.items():
        tensor, shape = state_dict[name], own[own_name].shape
        published_shape = (*shape, 1) if name.startswith("convinv.") else tuple(shape)
        if tuple(tensor.shape) != published_shape:
            raise CheckpointError(
                f"{name!r} has shape {tuple(tensor.shape)}, but this configuration needs "
                f"{published_shape}"
            )
        converted[own_name] = tensor.reshape(shape)
    flow.load_state_dict(converted)


def nvidia_names(flow: Flow) -> dict[str, str]:
    """Gives the flow's name of each parameter by the published name."""
    names = {
        f"upsample.{kind}": f"conditioner.upsample.convolution.{kind}"
        for kind in ("weight", "bias")
    }
    # Modules are listed depth first, so both lists are in the order of the flows.
    matrices = [n for n, m in flow.named_modules() if isinstance(m, InvertibleConv1x1)]
    networks = [(n, m) for n, m in flow.named_modules() if isinstance(m, WaveNet)]
    for k, name in enumerate(matrices):
        names[f"convinv.{k}.conv.weight"] = f"{name}.weight"
    for k, (name, network) in enumerate(networks):
        for own, _ in network.named_parameters():
            published = own.replace("parametrizations.weight.original0", "weight_g")
            published = published.replace("parametrizations.weight.original1", "weight_v")
            names[f"WN.{k}.{published}"] = f"{name}.{own}"
    return names
