"""Sizes of a FrameGlow."""

from typing import Annotated, Literal

from pydantic import Field

from waveflow.models.registry import FlowConfig


class FrameGlowConfig(FlowConfig):
    """Sizes of a FrameGlow; bins = the mel's hop length.

    Attributes:
        minimum_phase: the source passes a filter with the mel's envelope. Without, as in files that
            do not say it, it is bare pulses.
        noise_share: a head learns how much of each band is noise, so that draws at a low sigma are
            as loud as their mel. Without, as in files that do not say it, they are quieter.
    """

    type: Literal["frameglow"] = "frameglow"
    n_levels: int = Field(default=4, ge=0, le=6)
    n_flows: int = Field(default=4, ge=0)
    network: Literal["wavenet", "convnext"] = "wavenet"
    hidden_channels: int = Field(default=96, gt=0)
    dilations: tuple[Annotated[int, Field(gt=0, le=4096)], ...] = Field(
        default=(1, 2, 4), max_length=64
    )
    pitch_channels: int = Field(default=128, gt=0)
    encoder_channels: int = Field(default=128, gt=0)
    encoder_layers: int = Field(default=4, ge=0)
    log_scale_bound: float = Field(default=3.0, gt=0, allow_inf_nan=False)
    phase_path: bool = True
    minimum_phase: bool = False
    noise_share: bool = False
