"""The interface of a model and its training: the batch of a step, and phases with a loss each."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor


class Share(NamedTuple):
    """Items [start, stop) of the `total` items of a step."""

    start: int
    stop: int
    total: int

    @property
    def weight(self) -> float:
        """Its part of the step's items: means over shares, times these, add up to the mean."""
        return (self.stop - self.start) / self.total

    def of(self, whole: Tensor, axis: int = 0) -> Tensor:
        """Its items of a tensor that holds those of the whole step along an axis."""
        return whole.narrow(axis, self.start, self.stop - self.start)

    def split(self, n_parts: int) -> "list[Share]":
        """Consecutive shares whose sizes differ by at most one item; none is empty."""
        size = self.stop - self.start
        n_parts = min(n_parts, size)
        edges = [self.start + size * part // n_parts for part in range(n_parts + 1)]
        return [Share(start, stop, self.total) for start, stop in itertools.pairwise(edges)]


@dataclass(frozen=True, eq=False)
class Batch:
    """The items of a training step, or the part of them that is in memory at once.

    Several processes, and the parts of one process (`accumulate`), share a step. A loss then
    keeps two rules, so that the number of parts changes it by rounding alone. It divides by what
    the whole step counts (`step_mean`), and it draws the random numbers of the whole step from
    torch's generator and takes its own (`share.of(torch.randn(share.total, ...))`).

    Attributes:
        audio: (B, T) float32 in [-1, 1].
        mel: (B, M, F) of the audio, T = F hop_length.
        f0: (B, F), Hz at the centre of each frame, 0 where unvoiced.
        share: which items of the step these are; B items of `share.total`.
        step: the step's number, from 0 on.
        sum_all: adds up a tensor over all processes.
    """

    audio: Tensor
    mel: Tensor
    f0: Tensor
    share: Share
    step: int = 0
    sum_all: Callable[[Tensor], Tensor] = lambda values: values
    _own: "Batch | None" = None  # the process's items, of which this is a part
    _means: dict[str, Tensor] = field(default_factory=dict)

    def split(self, n_parts: int) -> "list[Batch]":
        """Parts of a process's items, as `Share.split` cuts them."""
        parts = []
        for share in self.share.split(n_parts):
            items = slice(share.start - self.share.start, share.stop - self.share.start)
            audio, mel, f0 = self.audio[items], self.mel[items], self.f0[items]
            part = replace(self, audio=audio, mel=mel, f0=f0, share=share, _own=self._own or self)
            parts.append(part)
        return parts

    def step_mean(self, name: str, statistic: Callable[["Batch"], Tensor]) -> Tensor:
        """The mean of a statistic over all items of the step, of all processes.

        It is computed once a step, under its name; all parts and processes then share it.

        Args:
            statistic: a mean over the items of the batch that it is given.
        """
        own = self._own or self
        if name not in own._means:
            own._means[name] = own.sum_all(statistic(own) * own.share.weight)
        return own._means[name]


class Loss(NamedTuple):
    """The loss of a step, and the terms that it reports.

    Attributes:
        value: a scalar, a mean over the items of the batch.
        terms: scalars by name, means over the same items.
    """

    value: Tensor
    terms: dict[str, Tensor]


class Score(NamedTuple):
    """What a validation finds of a model whose likelihood of speech takes too long.

    Attributes:
        value: (B,), nats per audio sample, higher is better; `Flow.measure` is its name.
        draw_log_likelihood: (B,), the model's log-likelihood of its own draw.
        draw: (B, T).
    """

    value: Tensor
    draw_log_likelihood: Tensor
    draw: Tensor


# Of a flow, mels (B, M, F) and noise (B, C, L).
ScoreOf = Callable[[Any, Tensor, Tensor], Score]


class Phase(NamedTuple):
    """Steps of a training that minimise one loss.

    Attributes:
        name: for messages.
        steps: how many; math.inf for all that follow.
        loss: of a batch. Parameters that it gives no gradient stay as they are.
        score: what validation measures instead of the likelihood of speech; of a phase without end.
        whole: whether it trains the whole flow, as a phase without end does, and not a part of it
            that is frozen afterwards.
    """

    name: str
    steps: float
    loss: Callable[[Batch], Loss]
    score: ScoreOf | None = None
    whole: bool = False
