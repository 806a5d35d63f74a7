"""Conditioners of several models: from a mel to the features that steer a flow."""

import torch
from torch import Tensor, nn

from waveflow.bijections.base import Condition
from waveflow.context import Context, total_context
from waveflow.flow import Conditioner, State
from waveflow.padding import zero_padding


class MelEncoder(Conditioner):
    """Two convolutions over a mel's frames; each frame's features are then held through its hop.

    The mel changes 86 times a second and audio 22,050 times, so features are computed at the
    frame rate, where they cost next to nothing.

    Args:
        n_mels: M, bands of the mel.
        n_features: channels of the condition.
        times: positions of the condition for each frame, hop_length / channels of the flow.
    """

    def __init__(self, n_mels: int, n_features: int, times: int) -> None:
        super().__init__()
        self.n_features = n_features
        self.times = times
        self.enter = nn.Conv1d(n_mels, n_features, 3, padding=1)
        self.leave = nn.Conv1d(n_features, n_features, 3, padding=1)
        self.context = total_context(self.enter, self.leave)

    def forward(self, mel: Tensor, mask: Tensor | None = None, state: State = None) -> Condition:
        """Mel (B, M, F) and mask (B, 1, F) to features (B, n_features, F times)."""
        # Natural logarithms of speech, -11.5 to 2, become inputs of order one.
        h = self.enter(zero_padding((mel + 5) / 3, mask)).relu()
        h = self.leave(zero_padding(h, mask)).repeat_interleave(self.times, 2)
        return Condition(h, None if mask is None else mask.repeat_interleave(self.times, 2))


class RepeatedMel(Conditioner):
    """Each mel frame held through its hop: M features, `times` positions for a frame."""

    context = Context()

    def __init__(self, n_mels: int, times: int) -> None:
        super().__init__()
        self.times = times
        self.n_features = n_mels

    def forward(self, mel: Tensor, mask: Tensor | None = None, state: State = None) -> Condition:
        """Mel (B, M, F) and mask (B, 1, F) to a condition of F times positions."""
        if mask is not None:
            mel, mask = zero_padding(mel, mask), mask.repeat_interleave(self.times, 2)
        return Condition(mel.repeat_interleave(self.times, 2), mask)

    def affine_map(self) -> tuple[Tensor, Tensor]:
        """As `UpsampledMel.affine_map`, of one frame."""
        eye = torch.eye(self.n_features, dtype=torch.float64)
        return eye.expand(self.times, -1, -1), eye.new_zeros(len(eye))
