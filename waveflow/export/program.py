"""A vocoder as a program of torch.export, from which the ONNX graph is made too."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from waveflow.engine.fast.packed import DecodingKit
from waveflow.engine.vocoder import Vocoder
from waveflow.errors import ConfigError
from waveflow.export.card import FEWEST_FRAMES, MEL, NOISE, SIGMA, GraphCard
from waveflow.flow import Flow

# Frames and items of the mel that is traced. Sizes of 1 would be taken for constants.
_TRACED_FRAMES, _TRACED_ITEMS = 20, 2
_MOST_ITEMS = 64
_MOST_FRAMES = 1_000_000


class Speaker(nn.Module):
    """mel (B, M, F), sigma () and noise (B, C, L) to audio (B, F hop_length) in [-1, 1].

    Args:
        vocoder: the model, on a CPU.
        refine: mel refinement steps after the draw.

    Raises:
        ConfigError: the flow's inverse goes from sample to sample.
    """

    def __init__(self, vocoder: Vocoder, refine: int) -> None:
        super().__init__()
        if math.isinf(vocoder.flow.bijection.inverse_context.left):
            name = vocoder.config.model.type
            raise ConfigError(f"a {name} draws sample by sample: it cannot be exported")
        kit = DecodingKit()
        flow: Any = kit.replaced(vocoder.flow, bijection=kit.convert(vocoder.flow.bijection))
        self.flow: Flow = flow
        self.refinement = vocoder.refinement
        self.refine = refine
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def forward(self, mel: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        audio = self.flow.decode(sigma * noise, mel)
        return self.refinement(audio, mel, self.refine).clamp(-1, 1)

    def example(self, mel: Tensor, sigma: float = 1.0) -> dict[str, Tensor]:
        """Inputs for a mel (B, M, F), with the noise of seeds 0, 1, .."""
        noise = self.flow.noise(mel.shape[2], range(len(mel)))
        return {MEL: mel, SIGMA: torch.tensor(sigma), NOISE: noise}


@torch.no_grad()
def traced(speaker: Speaker, card: GraphCard) -> torch.export.ExportedProgram:
    """The speaker as a program for any number of items, and of frames from `FEWEST_FRAMES` on.

    Raises:
        ConfigError: the flow does something else for other lengths.
    """
    items = torch.export.Dim("items", min=1, max=_MOST_ITEMS)
    frames = torch.export.Dim("frames", min=FEWEST_FRAMES, max=_MOST_FRAMES)
    sizes: dict[str, Any] = {
        MEL: {0: items, 2: frames},
        SIGMA: {},
        NOISE: {0: items, 2: card.noise_per_frame * frames},
    }
    inputs = speaker.example(torch.full((_TRACED_ITEMS, card.mel.n_mels, _TRACED_FRAMES), -5.0))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            program = torch.export.export(speaker, (), inputs, dynamic_shapes=sizes, strict=False)
            # oneDNN's operator, which no other runtime has.
            return program.run_decompositions({torch.ops.waveflow.product.default: F.linear})
    except Exception as error:  # of torch.export, which raises many kinds
        raise ConfigError(
            f"a {card.model} cannot be exported for all lengths: {str(error).splitlines()[0][:200]}"
        ) from error
