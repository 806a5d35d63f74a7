"""From a config to its Flow: the only place where model names meet code."""

from typing import Annotated

from pydantic import Field

from waveflow.audio.mel import MelConfig
from waveflow.errors import ConfigError
from waveflow.flow import Flow
from waveflow.models.frameglow import FrameGlowConfig, frameglow
from waveflow.models.waveglow import WaveGlowConfig, waveglow

FlowConfig = Annotated[FrameGlowConfig | WaveGlowConfig, Field(discriminator="type")]


def build_flow(config: FrameGlowConfig | WaveGlowConfig, mel: MelConfig) -> Flow:
    """A freshly initialised Flow for mels of the given settings."""
    if isinstance(config, WaveGlowConfig):
        if (config.n_mels, config.hop_length) != (mel.n_mels, mel.hop_length):
            raise ConfigError(
                f"model has n_mels {config.n_mels} and hop_length {config.hop_length}, "
                f"its mel {mel.n_mels} and {mel.hop_length}"
            )
        return waveglow(config)
    return frameglow(config, mel)
