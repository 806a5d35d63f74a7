"""What a graph says of itself. Nothing here imports torch."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from waveflow.audio.mel_config import MelConfig

# The key of the card among an ONNX file's metadata.
CARD = "waveflow"
# Names of the graphs' inputs and outputs.
MEL, SIGMA, NOISE, AUDIO, LOG_PROB = "mel", "sigma", "noise", "audio", "log_prob"
# Fewer have no place in the graph: sizes of 1 and 2 are special cases of padding and of torch.
FEWEST_FRAMES = 3
# Values of noise for each sample of audio; a flow has one, and more only by latents of its own.
_MOST_NOISE = 64


class GraphCard(BaseModel):
    """A graph of a vocoder.

    Attributes:
        model: type of the flow.
        mel: the mel that it takes.
        noise_channels: C of its noise (B, C, L).
        noise_per_frame: L for each frame.
        sigma: standard deviation of the noise; where it is an input, what to give by default.
        refine: mel refinement steps inside.
        judges: whether a mel that is clearly in another convention is refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[str, Field(max_length=100)]
    mel: MelConfig
    noise_channels: PositiveInt
    noise_per_frame: PositiveInt
    sigma: Annotated[float, Field(ge=0, le=10)]
    refine: NonNegativeInt
    judges: bool

    @model_validator(mode="after")
    def _check(self) -> Self:
        values = self.noise_channels * self.noise_per_frame
        if values > _MOST_NOISE * self.mel.hop_length:
            raise ValueError(f"{values} values of noise for a frame of audio")
        return self
