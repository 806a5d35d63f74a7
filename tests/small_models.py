"""The models of papers, small: the cases that all tests of models share."""

from typing import Any

from waveflow.models.flowavenet import FloWaveNetConfig
from waveflow.models.glow import GlowConfig
from waveflow.models.maf import IAFConfig, MAFConfig
from waveflow.models.nice import NICEConfig
from waveflow.models.parallel_wavenet import ParallelWaveNetConfig
from waveflow.models.pixelcnn import PixelCNNConfig
from waveflow.models.realnvp import RealNVPConfig
from waveflow.models.registry import FlowConfig
from waveflow.models.squeezewave import SqueezeWaveConfig
from waveflow.models.vae import VAEConfig
from waveflow.models.waveflow import WaveFlowConfig
from waveflow.models.wavenet import WaveNetConfig

N_FEATURES = 4
SIZES: dict[str, Any] = {"hidden_channels": 4, "n_features": N_FEATURES}
# A config, and the samples of a position.
SMALL: dict[str, tuple[FlowConfig, int]] = {
    "nice": (NICEConfig(squeeze_factor=4, n_flows=2, **SIZES), 4),
    "realnvp": (RealNVPConfig(squeeze_factor=2, n_scales=2, n_flows=1, **SIZES), 2),
    "glow": (GlowConfig(squeeze_factor=4, n_levels=2, n_flows=1, **SIZES), 4),
    "flowavenet": (
        FloWaveNetConfig(squeeze_factor=2, n_blocks=2, n_flows=2, n_early_every=1, **SIZES),
        2,
    ),
    "maf": (MAFConfig(squeeze_factor=4, n_flows=2, **SIZES), 4),
    "iaf": (IAFConfig(squeeze_factor=4, n_flows=2, **SIZES), 4),
    "wavenet": (WaveNetConfig(n_layers=2, n_cycles=2, **SIZES), 1),
    "wavenet_mixture": (WaveNetConfig(n_layers=2, head="mixture", n_components=2, **SIZES), 1),
    "parallel_wavenet": (ParallelWaveNetConfig(flow_layers=(2, 1), **SIZES), 1),
    "squeezewave": (
        SqueezeWaveConfig(
            squeeze_factor=4,
            n_flows=2,
            n_early_every=1,
            n_early_size=2,
            n_layers=1,
            hidden_channels=4,
        ),
        4,
    ),
    "pixelcnn": (PixelCNNConfig(squeeze_factor=4, n_layers=1, **SIZES), 1),
    "vae": (VAEConfig(squeeze_factor=4, n_latents=2, n_flows=2, **SIZES), 4),
    "waveflow": (WaveFlowConfig(rows=8, n_flows=2, n_layers=2, **SIZES), 8),
}
