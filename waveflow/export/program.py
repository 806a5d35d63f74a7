"""A vocoder as a program of torch.export, from which the ONNX graph is made too."""

import math
import warnings
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from waveflow.bijections import InvertibleConv1x1
from waveflow.engine.fast.packed import DecodingKit
from waveflow.engine.vocoder import Vocoder
from waveflow.errors import ConfigError
from waveflow.export.card import AUDIO, FEWEST_FRAMES, MEL, NOISE, SIGMA, GraphCard
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
        audio = self.flow.decode(noise, mel, sigma=sigma)
        return self.refinement(audio, mel, self.refine).clamp(-1, 1)

    def example(self, mel: Tensor, sigma: float = 1.0) -> dict[str, Tensor]:
        """Inputs for a mel (B, M, F), with the noise of seeds 0, 1, .."""
        noise = self.flow.noise(mel.shape[2], range(len(mel)))
        return {MEL: mel, SIGMA: torch.tensor(sigma), NOISE: noise}


class Listener(nn.Module):
    """audio (B, F hop_length) to its mel (B, M, F), noise (B, C, L) and log_prob (B, F).

    The noise is what `Speaker` makes this audio of at sigma 1; log_prob is in nats per sample of
    each frame.
    """

    def __init__(self, vocoder: Vocoder) -> None:
        super().__init__()
        self.flow = deepcopy(vocoder.flow)
        self.spectrogram = vocoder.mel_spectrogram
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        # No other runtime has a determinant.
        for module in self.flow.modules():
            if isinstance(module, InvertibleConv1x1):
                module.log_abs_det = partial(torch.Tensor.clone, module.log_abs_det())  # type: ignore[method-assign]

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mel = self.spectrogram(audio)[..., : audio.shape[1] // self.flow.hop_length]
        log_prob, _, noise = self.flow.by_frame(audio, mel, fitted=False)
        return mel, noise, log_prob


def traced_listener(listener: Listener) -> torch.export.ExportedProgram:
    """The listener as a program for any number of frames from `FEWEST_FRAMES` on, one item."""
    hop = listener.flow.hop_length
    frames = torch.export.Dim("frames", min=FEWEST_FRAMES, max=_MOST_FRAMES)
    example = 0.1 * torch.randn(1, _TRACED_FRAMES * hop, generator=torch.Generator().manual_seed(0))
    return _program(listener, {AUDIO: example}, {AUDIO: {1: hop * frames}}, "model")


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
    return _program(speaker, inputs, sizes, card.model)


@torch.no_grad()
def _program(
    module: nn.Module, inputs: dict[str, Tensor], sizes: dict[str, Any], name: str
) -> torch.export.ExportedProgram:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            program = torch.export.export(module, (), inputs, dynamic_shapes=sizes, strict=False)
            # oneDNN's operator, which no other runtime has.
            return program.run_decompositions({torch.ops.waveflow.product.default: F.linear})
    except Exception as error:  # of torch.export, which raises many kinds
        raise ConfigError(
            f"a {name} cannot be exported for all lengths: {str(error).splitlines()[0][:200]}"
        ) from error
