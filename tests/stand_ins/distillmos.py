"""In the place of the judge of naturalness: it likes everything as much."""

from torch import Tensor, nn


class ConvTransformerSQAModel(nn.Module):
    def forward(self, audio: Tensor) -> Tensor:
        return audio.new_full((len(audio), 1), 3.0)
