"""Models of random weights, written as checkpoints: speed and memory do not depend on training.

`against.py` also runs this file beside the package of another commit, so it uses few names of it.
"""

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from waveflow.audio.mel import MEL_PRESETS
from waveflow.checkpoint import EXAMPLE, ModelConfig, save_checkpoint
from waveflow.models.frameglow import FrameGlowConfig
from waveflow.models.registry import build_flow
from waveflow.models.waveglow import WaveGlowConfig

# Speech, 80 bands: the mel that comes with the default model.
SPEECH = Path(__file__).parent.parent / "pretrained" / "frameglow-cc0" / EXAMPLE
# Standard deviation of random shifts and log-scales, about that of a trained coupling.
SPREAD = 0.3
N_FRAMES = 16


def _squeezewave(squeeze_factor: int, hidden_channels: int) -> WaveGlowConfig:
    """A size of SqueezeWave (Zhai et al. 2020, table 1) in WaveGlow's own layers."""
    return WaveGlowConfig(
        squeeze_factor=squeeze_factor,
        hidden_channels=hidden_channels,
        n_early_every=2,
        n_early_size=16,
        conditioning="repeated",
    )


SIZES: dict[str, WaveGlowConfig | FrameGlowConfig] = {
    "waveglow-256": WaveGlowConfig(),
    "waveglow-64": WaveGlowConfig(hidden_channels=64),
    # Samples in a vector, channels.
    "squeezewave-128-256": _squeezewave(128, 256),
    "squeezewave-128-128": _squeezewave(128, 128),
    "squeezewave-256-256": _squeezewave(256, 256),
    "squeezewave-256-128": _squeezewave(256, 128),
    "frameglow": FrameGlowConfig(),
}


@torch.no_grad()
def untrained(config: WaveGlowConfig | FrameGlowConfig) -> tuple[ModelConfig, nn.Module]:
    """A config and its flow, with random weights in every layer.

    The last layer of a fresh coupling network is zero, so the coupling changes nothing, and a
    benchmark would take that for accuracy. Such a layer gets random weights, scaled in one
    synthesis so that its results spread by `SPREAD`.
    """
    mel = MEL_PRESETS["nvidia" if isinstance(config, WaveGlowConfig) else "hifigan"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = build_flow(config, mel).eval()
        hooks = [
            layer.register_forward_pre_hook(_randomise)
            for layer in flow.modules()
            if isinstance(layer, nn.Conv1d | nn.Linear) and not layer.weight.any()
        ]
        speech = torch.from_numpy(np.load(SPEECH))[None, : mel.n_mels, :N_FRAMES]
        flow.decode(flow.noise(N_FRAMES, [0]), speech)
    for hook in hooks:
        hook.remove()
    return ModelConfig(model=config, mel=mel), flow


def _randomise(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert isinstance(layer, nn.Conv1d | nn.Linear)
    channels = 1 if isinstance(layer, nn.Conv1d) else -1
    layer.weight.normal_(std=SPREAD / float(inputs[0].square().sum(channels).mean().sqrt()))


def write_untrained(name: str, folder: Path) -> None:
    """Writes the checkpoint of a size, with speech to calibrate int8."""
    config, flow = untrained(SIZES[name])
    example = io.BytesIO()
    np.save(example, np.load(SPEECH))
    save_checkpoint(folder, config, flow.state_dict(), {EXAMPLE: example.getvalue()})
